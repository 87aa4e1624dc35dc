# SPDX-License-Identifier: Apache-2.0
"""Configuration of PIRL."""

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import BankConfig, check_fields, check_unused, strict

PRETEXTS = {"jigsaw": ("jigsaw",), "rotation": ("rotation",), "jigsaw_rotation": ("jigsaw", "rotation")}
"""The transformations of each value of `pretext`."""
LOSSES = ("vissl", "vissl_softmax", "pycontrast")
HEADS = ("linear", "vissl_mlp", "pycontrast_mlp")


@strict
class PIRLConfig(BankConfig):
    """PIRL (Misra and van der Maaten, arXiv:1912.01991).

    The defaults are those of the authors' code in VISSL.

    Attributes:
        pretext: the transformation of an image: "jigsaw" (nine patches in random order), "rotation" (by 0,
            90, 180 or 270 degrees), or "jigsaw_rotation" (both, each with its own term and head; the loss
            contains the mean of both terms).
        pretext_weight: lambda, the weight of the transformed image. The weight of the image is 1 - lambda.
        loss: "vissl" is noise-contrastive estimation (NCE) with separate negatives for each term.
            "vissl_softmax" is cross entropy with separate negatives (VISSL's later settings). "pycontrast" is
            cross entropy, and all terms of an image share their negatives.
        temperature: divides the cosines (0.07; with heads of two layers 0.1 in VISSL, 0.2 in PyContrast).
        head: "linear" is one layer for the image, and one for each patch before the concatenation. In
            "vissl_mlp" and "pycontrast_mlp", each of them has two layers. In VISSL, ReLU also follows the
            second layer of the patches.
        projection_size: width of the rows in the memory bank, and of a projected patch (128).
        projection_hidden_size: hidden width of heads with two layers. None means the width of the features.
        sub_crop: side of the random sub-crop of each cell, in pixels of the views before `views.enlarge` (as
            the sizes of patches in CPC). Sub-crops are enlarged by the same factor as the views. None keeps
            the paper's ratio, 64 pixels for cells of 85 pixels.
        patch_size: side of the patches that the encoder receives, in pixels of its input. The sub-crops are
            resized to it (bilinear). None chooses the larger one of two sides: that of the sub-crops, and the
            stride of the encoder (32 pixels for a ResNet). For a vision transformer, None also rounds this
            side up to a multiple of the encoder's own patch size.
        patch_augmentation: whether each patch has its own flip, colors and rotation, with the settings of the
            first view, as in VISSL. The patches of PyContrast share those of the view.
    """

    model_type = "ssl_pirl"

    pretext: str = "jigsaw"
    pretext_weight: float = 0.5
    loss: str = "vissl"
    temperature: float = 0.07
    negatives: int = 32000
    head: str = "linear"
    projection_size: int = 128
    projection_hidden_size: int | None = None
    sub_crop: int | None = None
    patch_size: int | None = None
    patch_augmentation: bool = False

    def validate_method(self) -> None:
        """Raise `ValueError` for an unknown name, or a weight or size outside of its range."""
        check_fields(
            *(
                (name, value, value in known, f"one of {', '.join(known)}")
                for name, value, known in (
                    ("pretext", self.pretext, PRETEXTS),
                    ("loss", self.loss, LOSSES),
                    ("head", self.head, HEADS),
                )
            ),
            ("pretext_weight", self.pretext_weight, 0 <= self.pretext_weight <= 1, "a number from 0 to 1"),
            (
                "patch_size",
                self.patch_size,
                self.patch_size is None or self.patch_size >= 1,
                "null or at least 1 pixel",
            ),
        )
        if self.head == "linear":
            check_unused(self, ["projection_hidden_size"], "method.head=linear")
        if self.pretext == "rotation":
            check_unused(self, ["sub_crop", "patch_size", "patch_augmentation"], "method.pretext=rotation")


AutoConfig.register(PIRLConfig.model_type, PIRLConfig)
