# SPDX-License-Identifier: Apache-2.0
"""Configuration of I-JEPA."""

from typing import Any, ClassVar

from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.modeling.configuration import TeacherConfig, check_fields, patch_grid, strict, width_field
from hf_ssl.views.masks import Size, block_size

DISTANCES = ("smooth_l1", "squared_l2")


@strict
class IJEPAConfig(TeacherConfig):
    """I-JEPA (Assran et al., arXiv:2301.08243).

    The defaults are those of facebookresearch/ijepa, `configs/in1k_vith14_ep300.yaml`.

    Attributes:
        target_blocks: number of target blocks of an image, each predicted separately (4).
        target_scale: smallest and largest share of the image's patches in a target block.
        target_aspect_ratio: smallest and largest ratio of rows to columns of a target block.
        context_scale: smallest and largest share of the image's patches in the square context block, before
            the target blocks are removed from it.
        context_more_than: a context must have more patches than this number (the authors' `min_keep`).
        blocks_reach_edges: whether blocks may include the last row and column of patches. In the authors'
            code they never do, so these patches are neither context nor targets. They are 12 % of a grid of
            16 x 16, and more of a smaller grid.
        predictor_depth, predictor_hidden_size: number of layers and width of the predictor.
        predictor_attention_heads: number of the predictor's attention heads. None means that of the encoder.
        initializer_range: standard deviation of the predictor's initial weights. The encoder's configuration
            has its own value.
        distance: distance between predicted and true features. "smooth_l1" is the mean smooth L1 distance of
            the authors' code. "squared_l2" is the loss of the paper, a squared distance that is summed over
            the patches of a block and their features (`hf_ssl.losses.latent_squared_l2`).
        momentum, momentum_end, momentum_schedule: momentum of the teacher (0.996 to 1, linear schedule).
    """

    model_type = "ssl_ijepa"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="ijepa")
    }

    target_blocks: int = 4
    target_scale: list[float] | tuple[float, ...] = (0.15, 0.2)
    target_aspect_ratio: list[float] | tuple[float, ...] = (0.75, 1.5)
    context_scale: list[float] | tuple[float, ...] = (0.85, 1.0)
    context_more_than: int = 10
    blocks_reach_edges: bool = False
    predictor_depth: int = 12
    predictor_hidden_size: int = 384
    predictor_attention_heads: int | None = None
    initializer_range: float = 0.02
    distance: str = "smooth_l1"
    momentum_schedule: str = "linear"

    @property
    def grid(self) -> Size:
        """Return the numbers of rows and columns of patches in an image."""
        return patch_grid(self.backbone_config)

    def target_size(self, number: float) -> Size:
        """Return the rows and columns of target blocks. A number in [0, 1) selects the size."""
        return self._size(number, self.target_scale, self.target_aspect_ratio)

    def context_size(self, number: float) -> Size:
        """Return the rows and columns of context blocks. A number in [0, 1) selects the size."""
        return self._size(number, self.context_scale, (1.0, 1.0))

    def _size(self, number: float, scale: Any, aspect_ratio: Any) -> Size:
        return block_size(
            number,
            scale=tuple(scale),
            aspect_ratio=tuple(aspect_ratio),
            grid=self.grid,
            reach_edges=self.blocks_reach_edges,
        )

    def validate_ranges(self) -> None:
        """Raise `ValueError` for a decreasing range, or for shares of an image outside of 0 to 1."""
        for key in ("target_scale", "target_aspect_ratio", "context_scale"):
            values = list(self.to_dict()[key])
            most = float("inf") if key == "target_aspect_ratio" else 1.0
            if len(values) != 2 or not 0 < values[0] <= values[1] <= most:
                limit = "" if most > 1 else " and at most 1"
                raise ValueError(
                    f"method.{key}: expected two numbers above 0{limit} in ascending order, got {values}"
                )

    def validate_predictor(self) -> None:
        """Raise `ValueError` for a predictor without layers or with a wrong width (see `width_field`)."""
        backbone: Any = self.backbone_config
        width, depth = self.predictor_hidden_size, self.predictor_depth
        heads = self.predictor_attention_heads or backbone.to_dict().get("num_attention_heads", 1)
        check_fields(
            width_field("predictor_hidden_size", width, "predictor_attention_heads", heads),
            ("predictor_depth", depth, depth >= 1, "at least 1"),
        )

    def validate_distance(self) -> None:
        """Raise `ValueError` for an unknown distance."""
        known = self.distance in DISTANCES
        check_fields(("distance", self.distance, known, f"one of {', '.join(DISTANCES)}"))

    def validate_blocks(self) -> None:
        """Raise `ValueError` if the smallest context block of the image does not exceed `context_more_than`.

        Also check the number of blocks and the size of the image.
        """
        backbone: Any = self.backbone_config
        if not {"image_size", "patch_size"} <= backbone.to_dict().keys():
            return  # The encoder is not a vision transformer. The model raises the error.
        check_fields(
            ("target_blocks", self.target_blocks, self.target_blocks >= 1, "at least 1"),
            ("context_more_than", self.context_more_than, self.context_more_than >= 0, "at least 0"),
        )
        if min(self.grid) < 2:
            needed = "expected at least 2 x 2 patches in an image"
            raise ValueError(f"backbone.patch_size: {needed}, got {self.grid[0]} x {self.grid[1]}")
        rows, columns = self.context_size(0.0)
        if rows * columns <= self.context_more_than:
            raise ValueError(
                f"method.context_more_than: expected less than {rows * columns}, the size of the smallest "
                f"context block in {self.grid[0]} x {self.grid[1]} patches, got {self.context_more_than}"
            )


AutoConfig.register(IJEPAConfig.model_type, IJEPAConfig)
