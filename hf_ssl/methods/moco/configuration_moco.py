# SPDX-License-Identifier: Apache-2.0
"""Configuration of MoCo v1 and v2."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import TeacherConfig, check_fields, strict


@strict
class MoCoConfig(TeacherConfig):
    """MoCo (He et al., arXiv:1911.05722) and MoCo v2 (Chen et al., arXiv:2003.04297).

    The defaults are those of MoCo v2. MoCo v1 has temperature 0.07 and one projection layer.

    Attributes:
        temperature: temperature of the softmax over similarities (facebookresearch/moco: 0.07, v2 0.2).
        queue_size: number of keys of earlier batches in the queue, which are the negatives (65536; 4096 to
            32768 on CIFAR-10).
        momentum, momentum_end, momentum_schedule: momentum of the key encoder (constant, 0.999).
        projection_size, projection_hidden_size, projection_layers: output width, hidden width and number of
            layers of the projector, which has no BatchNorm. MoCo v1 has 1 layer, and v2 has 2. A hidden width
            of None means the width of the features.
        symmetric: whether both views are queries and both are keys, as in lightly's and solo-learn's CIFAR
            settings. The authors use the first view as query and the second as key.
        batch_norm_splits: number of parts of a process's batch that BatchNorm normalizes separately, as if
            each part were on its own device (1; lightly's CIFAR-10 setting: 8).
        shuffle_batch_norm: whether the key encoder receives the batch in another order than the query
            encoder. The order differs only if BatchNorm's statistics cover a part of the batch. In the
            same order, a query and its key would share statistics, which would reveal the positive key.
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

    def validate_splits(self) -> None:
        """Raise `ValueError` for a batch without parts."""
        splits = self.batch_norm_splits
        check_fields(("batch_norm_splits", splits, splits >= 1, "at least 1"))


AutoConfig.register(MoCoConfig.model_type, MoCoConfig)
