# SPDX-License-Identifier: Apache-2.0
"""Configuration of MoCo v1 and v2."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_momentum


@strict
class MoCoConfig(SSLConfig):
    """MoCo (He et al., arXiv:1911.05722) and MoCo v2 (Chen et al., arXiv:2003.04297).

    The defaults are MoCo v2's; v1 has temperature 0.07 and one projection layer.

    Attributes:
        temperature: of the softmax over similarities (facebookresearch/moco: 0.07, v2 0.2).
        queue_size: keys of earlier batches that serve as negatives (65536; CIFAR-10: 4096 to 32768).
        momentum, momentum_end, momentum_schedule: of the key encoder; 0.999 throughout.
        projection_size, projection_hidden_size, projection_layers: of the projector, without BatchNorm.
            Layers: 1 in v1, 2 in v2; hidden width None takes that of the features.
        symmetric: whether both views are queries and both are keys, as in lightly's and solo-learn's CIFAR
            settings; the authors use the first as query and the second as key.
        batch_norm_splits: parts of a process's batch that BatchNorm normalises by themselves, which plays the
            role of so many devices (lightly's CIFAR-10 setting: 8). 1: the whole batch.
        shuffle_batch_norm: whether keys are made in another order and so with other companions than queries,
            where BatchNorm does not span all of the batch: the statistics would give away which key belongs
            to a query.
    """

    model_type = "ssl_moco"

    temperature: float = 0.2
    queue_size: int = 65536
    momentum: float = 0.999
    momentum_end: float = 0.999
    momentum_schedule: str = "constant"
    projection_size: int = 128
    projection_hidden_size: int | None = None
    projection_layers: int = 2
    symmetric: bool = False
    batch_norm_splits: int = 1
    shuffle_batch_norm: bool = True

    def validate_temperature(self) -> None:
        """Logits are bounded by 1 / temperature."""
        if self.temperature < 0.003:
            raise ValueError(f"method.temperature must be at least 0.003, got {self.temperature}")

    def validate_momentum(self) -> None:
        """The schedule must be known, its ends between 0 and 1."""
        check_momentum(self)

    def validate_queue(self) -> None:
        """A queue holds something, and a batch has at least one part."""
        if self.queue_size < 1 or self.batch_norm_splits < 1:
            raise ValueError(
                "method.queue_size and method.batch_norm_splits must be at least 1, "
                f"got {self.queue_size} and {self.batch_norm_splits}"
            )


AutoConfig.register(MoCoConfig.model_type, MoCoConfig)
