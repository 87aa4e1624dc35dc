# SPDX-License-Identifier: Apache-2.0
"""Configuration of DirectPred and DirectCopy."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import TeacherConfig, check_fields, strict


@strict
class DirectPredConfig(TeacherConfig):
    """DirectPred (Tian, Chen and Ganguli, arXiv:2102.06810) and DirectCopy (Wang et al., arXiv:2110.04947).

    Attributes:
        exponent: exponent of the correlation matrix's eigenvalues in the predictor. DirectPred uses 0.5, and
            DirectCopy uses 1.
        epsilon: number added to each eigenvalue of the predictor (the paper's results on CIFAR-10 and STL-10,
            table 8: 0.1; the command in the README of facebookresearch/luckmatters: 0.01).
        normalize_eigenvalues: whether the eigenvalues are divided by the largest one before the power and the
            addition of `epsilon`. None means true unless `exponent` is 1, as in the authors'
            `byol_trainer.py`. Their DirectCopy adds `epsilon` times the identity to the correlation matrix
            itself.
        correlation_momentum: momentum of the correlation matrix's EMA update, rho in the paper (0.3). The
            first batch's matrix is copied.
        update_frequency: number of optimizer steps between two updates of the predictor (1; also 5 in table 8
            of the paper).
        learn_between_updates: whether gradients train the predictor between two updates if `update_frequency`
            is above 1, as in the authors' code. False keeps it constant until its next update.
        momentum, momentum_end, momentum_schedule: momentum of the target network (constant, 0.996).
        projection_size, projection_hidden_size: output and hidden width of the projector, which is Linear,
            BatchNorm without gain and offset, ReLU, Linear.
    """

    model_type = "ssl_directpred"

    exponent: float = 0.5
    epsilon: float = 0.1
    normalize_eigenvalues: bool | None = None
    correlation_momentum: float = 0.3
    update_frequency: int = 1
    learn_between_updates: bool = True
    momentum_end: float = 0.996
    momentum_schedule: str = "constant"
    projection_size: int = 128
    projection_hidden_size: int = 512

    @property
    def learns_predictor(self) -> bool:
        """Return whether the predictor is a parameter."""
        return self.learn_between_updates and self.update_frequency > 1

    def validate_predictor(self) -> None:
        """Raise `ValueError` for settings of the predictor outside of their ranges."""
        check_fields(
            ("exponent", self.exponent, self.exponent > 0, "a number above 0"),
            ("epsilon", self.epsilon, self.epsilon >= 0, "a number of at least 0"),
            ("update_frequency", self.update_frequency, self.update_frequency >= 1, "at least 1"),
        )


AutoConfig.register(DirectPredConfig.model_type, DirectPredConfig)
