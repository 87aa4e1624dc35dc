# SPDX-License-Identifier: Apache-2.0
"""Configuration of the triplet loss."""

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig


@strict
class TripletConfig(SSLConfig):
    """Triplets of an image's two views and another image (Schroff, Kalenichenko and Philbin,
    arXiv:1503.03832).

    Attributes:
        margin: by which the squared distance of unit vectors to the other image must be larger (0.2).
        negatives: which other image of the batch: "semi_hard", the nearest that is farther away than the
            other view, or the farthest where none is; or "random".
        projection_size, projection_hidden_size, projection_layers: of the projector, as SimCLR's.
    """

    model_type = "ssl_triplet"

    margin: float = 0.2
    negatives: str = "semi_hard"
    projection_size: int = 128
    projection_hidden_size: int | None = None
    projection_layers: int = 2

    def validate_negatives(self) -> None:
        """The choice must be known, the margin positive."""
        if self.negatives not in ("semi_hard", "random"):
            raise ValueError(f"method.negatives must be semi_hard or random, got {self.negatives!r}")
        if self.margin <= 0:
            raise ValueError(f"method.margin must be positive, got {self.margin}")


AutoConfig.register(TripletConfig.model_type, TripletConfig)
