# SPDX-License-Identifier: Apache-2.0
"""Configuration of the triplet loss."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import SSLConfig, check_fields, strict


@strict
class TripletConfig(SSLConfig):
    """Triplet loss (Schroff, Kalenichenko and Philbin, arXiv:1503.03832).

    A triplet consists of two views of an image and a view of another image.

    Attributes:
        margin: required difference between the squared distances to the negative and to the positive (0.2).
            The distances are those of unit vectors.
        negatives: choice of the negative in the batch, "semi_hard" or "random". A semi-hard negative is the
            nearest of those farther away than the positive. If none is farther away, it is the farthest.
        projection_size, projection_hidden_size, projection_layers: output width, hidden width and number of
            layers of the projector, as in SimCLR. A hidden width of None means the width of the features.
    """

    model_type = "ssl_triplet"

    margin: float = 0.2
    negatives: str = "semi_hard"
    projection_size: int = 128
    projection_hidden_size: int | None = None
    projection_layers: int = 2

    def validate_negatives(self) -> None:
        """Raise `ValueError` for an unknown choice of negatives or a margin that is not positive."""
        known = self.negatives in ("semi_hard", "random")
        check_fields(
            ("negatives", self.negatives, known, "semi_hard or random"),
            ("margin", self.margin, self.margin > 0, "a number above 0"),
        )


AutoConfig.register(TripletConfig.model_type, TripletConfig)
