# SPDX-License-Identifier: Apache-2.0
"""Configuration of CPC."""

from typing import TYPE_CHECKING, ClassVar, cast, get_type_hints

from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.errors import UserError, check_keys
from hf_ssl.modeling.configuration import SSLConfig, check_fields, check_unused, strict
from hf_ssl.views.preset import ViewPreset, ViewSettings, check_settings, color_probability

if TYPE_CHECKING:
    from hf_ssl.views.patches import PatchLayout

CONTEXTS = ("residual", "gated")
_SWITCHES = ("flip", "jitter", "gray", "blur", "solarize", "quarter_turns", "rotation")
_OF_CROPS = ("size", "count", "scale", "ratio", "interpolation")


@strict
class CPCConfig(SSLConfig):
    """CPC (van den Oord et al., arXiv:1807.03748, section 3.2) and CPC v2 (Henaff et al., arXiv:1905.09272).

    All sizes of patches are in pixels of the views before `views.enlarge` (as `sub_crop` in PIRL). Patches
    are enlarged by the same factor as the views.

    Attributes:
        patch_size: side of a patch. None means a quarter of the view (64 of 256 pixels in the paper).
        patch_stride: distance of neighboring patches. None means half a patch. Both defaults make a grid of
            7 x 7.
        patch_crop: side of the random part of a patch that is kept; zeros replace the rest. None keeps all.
            The first paper has 60 of 64 pixels.
        patch_augmentation: flip, color jitter, gray, blur, solarization and rotation of each patch, as fields
            of `hf_ssl.views.ViewSettings`. Operations without a probability are off. None changes no patch.
        color_dropping: probability that a patch keeps only one of its three channels (v2).
        patch_rotation: largest rotation of a patch in degrees (v2; at most 30 in AutoAugment). Every patch is
            rotated, and zeros replace the pixels outside of it. `patch_augmentation` mirrors its edges.
        patch_shear: largest shear of a patch along each axis, as a factor (v2; at most 0.3 in AutoAugment).
            `hf_ssl.views.grid_layout` lists the parts of the augmentation of v2 that are missing.
        prediction_steps: number of predicted rows below a context (at most 5 in the first paper).
        skip_step: number of rows between a context and its first predicted row. With 1, no predicted patch
            overlaps the patches of the context (loeweX/Greedy_InfoMax, rschwarz15/CPCV2-PyTorch).
        directions: 1 to 4. Each further direction turns the grid of encodings clockwise by 90 degrees.
            Contexts then also predict patches to the right of them, above them and to the left (v2).
        negatives: number of sampled negatives of each prediction, as in Greedy InfoMax (16). None uses all
            other patches of the batch.
        context: network that computes contexts. "residual" consists of residual blocks with a bottleneck, as
            in the code of pytorch-lightning-bolts. "gated" is the gated PixelCNN of Greedy InfoMax.
        context_layers: number of residual blocks (5) or of gated layers (4 in Greedy InfoMax).
        context_hidden_size: width of the bottleneck of residual blocks. The gated context has none.
        projection_size: width of predictions and targets. A linear map projects the encodings to targets of
            this width (64 in the code of bolts). None uses the encodings as targets (first paper).
        prediction_scale: factor of the predictions, which lowers the first scores (0.1 in the code of bolts).
    """

    model_type = "ssl_cpc"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="convnextv2")
    }

    patch_size: int | None = None
    patch_stride: int | None = None
    patch_crop: int | None = None
    patch_augmentation: dict | None = None
    color_dropping: float = 0.0
    patch_rotation: float = 0.0
    patch_shear: float = 0.0
    prediction_steps: int = 5
    skip_step: int = 1
    directions: int = 1
    negatives: int | None = None
    context: str = "residual"
    context_layers: int = 5
    context_hidden_size: int = 256
    projection_size: int | None = 64
    prediction_scale: float = 0.1

    @property
    def preset(self) -> ViewPreset:
        """Return the views."""
        return ViewPreset.from_dict(self.views or {})

    @property
    def enlargement(self) -> int:
        """Return the factor by which views and patches are enlarged."""
        return self.preset.final_size // self.preset.size

    @property
    def patch(self) -> int:
        """Return the side of a patch."""
        return max(2, self.preset.size // 4) if self.patch_size is None else self.patch_size

    @property
    def stride(self) -> int:
        """Return the distance of neighboring patches."""
        return max(1, self.patch // 2) if self.patch_stride is None else self.patch_stride

    @property
    def patch_settings(self) -> ViewSettings | None:
        """Return the augmentation of each patch."""
        if self.patch_augmentation is None:
            return None
        side = self.patch_crop or self.patch
        settings = ViewSettings(**dict.fromkeys(_SWITCHES, 0.0) | self.patch_augmentation | {"size": side})
        settings.blur_kernel = settings.blur_kernel_size
        return settings

    @property
    def layout(self) -> "PatchLayout":
        """Return the places and the augmentation of the patches of a view, in pixels before enlargement.

        Raises:
            UserError: the grid does not fit the view, or has fewer than two patches per row.
        """
        from hf_ssl.views.patches import grid_layout  # torch is slow to import

        preset = self.preset
        return grid_layout(
            (len(preset.mean), preset.size, preset.size),
            patch=self.patch,
            stride=self.stride,
            sub_crop=self.patch_crop,
            settings=self.patch_settings,
            color_dropping=self.color_dropping,
            rotation=self.patch_rotation,
            shear=self.patch_shear,
        )

    def validate_fields(self) -> None:
        """Raise `ValueError` for a value outside of its limits, or for a grid that does not fit the view."""
        self._check_patches()
        self._check_predictions()

    def _check_patches(self) -> None:
        preset, crop = self.preset, self.patch_crop
        channels, size = len(preset.mean), preset.size
        crops = crop is None or 1 <= crop <= self.patch
        check_fields(
            ("patch_size", self.patch_size, 1 <= self.patch <= size, f"1 to {size} pixels, the views' side"),
            ("patch_stride", self.patch_stride, self.stride >= 1, "at least 1 pixel"),
            ("patch_crop", crop, crops, f"1 to {self.patch} pixels, the side of a patch"),
            color_probability("color_dropping", self.color_dropping, channels),
            ("patch_rotation", self.patch_rotation, 0 <= self.patch_rotation <= 180, "0 to 180 degrees"),
            ("patch_shear", self.patch_shear, 0 <= self.patch_shear < 1, "at least 0 and less than 1"),
        )
        if self.patch_augmentation is not None:
            section = "method.patch_augmentation"
            check_keys(self.patch_augmentation, _CHANGES, section)
            check_settings(cast(ViewSettings, self.patch_settings), None, section, channels)
        if preset.final_size % size:
            raise UserError(
                f"views.enlarge: expected a multiple of views.size={size}, because patches are enlarged by "
                f"the same whole factor, got {preset.final_size}"
            )

    def _check_predictions(self) -> None:
        steps, skipped, rows = self.prediction_steps, self.skip_step, self.layout.shape[0]
        check_fields(
            ("prediction_steps", steps, steps >= 1, "at least 1"),
            ("skip_step", skipped, skipped >= 0, "at least 0"),
            ("directions", self.directions, 1 <= self.directions <= 4, "1 to 4"),
            ("negatives", self.negatives, _positive(self.negatives), "at least 1, or null for all"),
            ("context", self.context, self.context in CONTEXTS, f"one of {', '.join(CONTEXTS)}"),
            ("prediction_scale", self.prediction_scale, self.prediction_scale > 0, "a number above 0"),
        )
        if self.context == "gated":
            check_unused(self, ["context_hidden_size"], "method.context=gated")
        if steps + skipped >= rows:
            most = max(0, rows - 1 - skipped)
            raise UserError(
                f"method.prediction_steps: expected at most {most}, because the grid has {rows} rows and "
                f"method.skip_step={skipped}, got {steps}"
            )


def _positive(number: int | None) -> bool:
    return number is None or number >= 1


_CHANGES = tuple(name for name in get_type_hints(ViewSettings) if name not in _OF_CROPS)

AutoConfig.register(CPCConfig.model_type, CPCConfig)
