# SPDX-License-Identifier: Apache-2.0
"""Configuration of SwAV."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_fields, strict


@strict
class SwAVConfig(SSLConfig):
    """SwAV (Caron et al., arXiv:2006.09882).

    The defaults are those of facebookresearch/swav for batches of 4096.

    Attributes:
        temperature: temperature of the softmax over prototypes (0.1).
        epsilon: weight of the entropy of the assignments in Sinkhorn-Knopp (0.05; 0.03 in some settings).
        sinkhorn_iterations: number of Sinkhorn-Knopp iterations (3).
        hard_codes: whether each view predicts only the prototype with the largest assignment, as in Asano et
            al. (arXiv:1911.05371). In the paper (section 3.1), hard codes converge fast, but to a worse
            solution. The README of the authors recommends them if the loss stays at log(prototypes).
        prototypes: number of prototypes (3000).
        prototype_freeze_steps: number of first optimizer steps in which the prototypes are frozen (313; 5005
            with batches of 256).
        queue_size: number of embeddings of earlier batches in the queue of each global view. They are
            assigned together with the batch. 0 means no queue (3840 with batches of 256).
        queue_start_epoch: number of epochs before the queue is used (15). A queue that is not full is not
            used.
        projection_size, projection_hidden_size: output and hidden width of the projector, which is Linear,
            BatchNorm, ReLU, Linear.
    """

    model_type = "ssl_swav"
    may_be_missing = ("queue_size",)

    temperature: float = 0.1
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    hard_codes: bool = False
    prototypes: int = 3000
    prototype_freeze_steps: int = 313
    queue_size: int = 0
    queue_start_epoch: float = 15.0
    projection_size: int = 128
    projection_hidden_size: int = 2048

    def validate_assignment(self) -> None:
        """Raise `ValueError` for settings of the assignment outside of their ranges."""
        check_fields(
            ("epsilon", self.epsilon, self.epsilon > 0, "a number above 0"),
            ("sinkhorn_iterations", self.sinkhorn_iterations, self.sinkhorn_iterations >= 1, "at least 1"),
            ("prototypes", self.prototypes, self.prototypes >= 2, "at least 2"),
        )


AutoConfig.register(SwAVConfig.model_type, SwAVConfig)
