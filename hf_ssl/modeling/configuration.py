# SPDX-License-Identifier: Apache-2.0
"""The base configuration of all methods, the schedules that configurations name, and sizes in patches."""

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, cast

from huggingface_hub import dataclasses as hub_dataclasses
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec
from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.errors import UserError, check_values
from hf_ssl.losses.upcasting import SMALLEST_TEMPERATURE
from hf_ssl.precision import PRECISIONS
from hf_ssl.sections import as_setting, check_finite
from hf_ssl.views.preset import ViewPreset

CLS_POOLER_TYPES = ("vit", "deit")
"""Model types whose pooler is a Linear layer and an activation on the class token. No method trains it."""
MASKING_TYPE = "vit_mae"
"""Model type of the only encoder of transformers that hides patches also in evaluation mode."""
SCHEDULES = ("constant", "linear", "cosine")
BANK_STARTS = ("unit", "uniform", "images")
_INTERPOLATES = "interpolate_pos_encoding"
"""Name of the argument, and of the method of an embedding, that interpolates its position table."""
_POSITION_TABLES = ("position_embeddings", "position_embedding")


if TYPE_CHECKING:
    from huggingface_hub.dataclasses import strict
else:

    def strict(cls: type) -> type:
        """Return a config class that checks its fields, like `strict` of huggingface_hub.

        The rules for all settings also apply to these fields: `as_setting` converts their values, and numbers
        must be finite. Without the conversion, `strict` would raise an error for 1 in a field of type float.
        """
        cls = hub_dataclasses.strict(cls)
        checked, annotations = cls.__setattr__, {item.name: item.type for item in fields(cls)}

        def __setattr__(self: Any, name: str, value: Any) -> None:
            if name in annotations:
                value = as_setting(value, annotations[name])
                check_finite(f"method.{name}", value)
            checked(self, name, value)

        cls.__setattr__ = __setattr__
        return cls


@strict
class SSLConfig(PreTrainedConfig):
    """Base configuration of a method. A subclass adds the fields of the method.

    Attributes:
        backbone_config: any transformers vision config, as an object or a dict with its `model_type`; timm
            through `model_type="timm_wrapper"`. A ViT's pooler is changed to return its class token.
        views: the augmentation preset (`hf_ssl.views.ViewPreset`) as plain data. It is stored here so that a
            checkpoint records the augmentations.
        may_be_missing: fields `.._layers` and `.._size` that may be 0, which leaves out the part.
    """

    model_type = "ssl"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="resnet")
    }

    may_be_missing: ClassVar[tuple[str, ...]] = ()

    backbone_config: dict | PreTrainedConfig | None = None
    views: dict | None = None

    @property
    def global_views(self) -> int:
        """Return the number of global views of an image."""
        return ViewPreset.from_dict(self.views or {}).count

    def validate_temperatures(self) -> None:
        """Raise `ValueError` for a field `..temperature` or `..temperature_start` that is too small."""
        for name in (item.name for item in fields(self)):
            if name.endswith(("temperature", "temperature_start")):
                value = getattr(self, name)
                check_fields((name, value, value >= SMALLEST_TEMPERATURE, f"at least {SMALLEST_TEMPERATURE}"))

    def validate_layers(self) -> None:
        """Raise `ValueError` for a field `.._layers` below 1, or below 0 for a part that may be missing."""
        for name in (item.name for item in fields(self) if item.name.endswith("_layers")):
            least = 0 if name in self.may_be_missing else 1
            check_fields((name, getattr(self, name), getattr(self, name) >= least, f"at least {least}"))

    def validate_sizes(self) -> None:
        """Raise `ValueError` for a field `.._size` below 1, or below 0 for a part that may be missing."""
        for name in (item.name for item in fields(self) if item.name.endswith("_size")):
            least, value = 0 if name in self.may_be_missing else 1, getattr(self, name)
            check_fields((name, value, value is None or value >= least, f"at least {least}"))

    def validate_momentum(self) -> None:
        """Raise `ValueError` for a field `..momentum` or `..momentum_end` outside of 0 to 1."""
        for name in (item.name for item in fields(self) if item.name.endswith(("momentum", "momentum_end"))):
            check_fields((name, getattr(self, name), 0 <= getattr(self, name) <= 1, "a number from 0 to 1"))

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        # This is always a config object here. It is copied because the caller's own must not change.
        self.backbone_config = backbone = copy.deepcopy(cast(Any, self.backbone_config))
        backbone.dtype = None  # training needs weights in float32, also if a checkpoint has others
        # transformers (5.20 to 5.24) writes the folder that a nested config came from into `config.json`.
        backbone.name_or_path = ""
        if backbone.model_type in CLS_POOLER_TYPES:
            backbone.pooler_act = "linear"
            backbone.pooler_output_size = backbone.hidden_size


@strict
class TeacherConfig(SSLConfig):
    """Base configuration of a method with a momentum encoder. The defaults are those of BYOL and DINO.

    Attributes:
        momentum, momentum_end, momentum_schedule: momentum of the EMA update at the start and at the end of
            the run, and its schedule between them (see `scheduled_value`).
    """

    momentum: float = 0.996
    momentum_end: float = 1.0
    momentum_schedule: str = "cosine"

    def validate_schedule(self) -> None:
        """Raise `ValueError` for an unknown schedule of the momentum."""
        schedule = self.momentum_schedule
        check_fields(("momentum_schedule", schedule, schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"))


@strict
class BankConfig(SSLConfig):
    """Base configuration of a method with a memory bank (`hf_ssl.modeling.memory_bank.MemoryBank`).

    Attributes:
        negatives: number of rows that are sampled as negatives for each image, with replacement.
        bank_momentum: share of the old row in the new one (0.5 in CMC, VISSL and PyContrast).
        bank_start: the rows before the first step: "unit" for random unit vectors (VISSL, PyContrast), or
            "uniform" for random numbers whose rows have length 1 only on average (CMC). With "images", all
            images are embedded once before the first step. No paper does this. It helps short runs, because
            a random row is a random target in the first epoch.
        bank_precision: precision of the rows. Half precision needs half of the memory.
        num_samples: number of training images. The memory bank has one row for each.
            `hf_ssl.building.build_model` sets this number.
    """

    negatives: int = 16384
    bank_momentum: float = 0.5
    bank_start: str = "unit"
    bank_precision: str = "float32"
    num_samples: int = 0

    def validate_bank(self) -> None:
        """Raise `ValueError` without negatives, or for an unknown name or a momentum outside of 0 to 1."""
        start, precision, momentum = self.bank_start, self.bank_precision, self.bank_momentum
        check_fields(
            ("negatives", self.negatives, self.negatives >= 1, "at least 1"),
            ("bank_momentum", momentum, 0 <= momentum < 1, "at least 0 and less than 1"),
            ("bank_start", start, start in BANK_STARTS, f"one of {', '.join(BANK_STARTS)}"),
            ("bank_precision", precision, precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
        )


def method_of(model_type: str) -> str | None:
    """Return the name of the method with a model type ("moco_v3" for "ssl_moco_v3"); None for an encoder."""
    first, _, name = model_type.partition("_")
    return name or first if first == SSLConfig.model_type else None


def patch_sides(config: Any) -> tuple[int, int]:
    """Return height and width of the patches of an encoder; (1, 1) for an encoder without patches."""
    return as_pair(config.to_dict().get("patch_size") or 1)


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return the height and width of a size in the config of an encoder. One number means a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def patch_grid(backbone: Any) -> tuple[int, int]:
    """Return the rows and columns of patches in an image, from the config of a vision transformer."""
    (height, width), (rows, columns) = as_pair(backbone.image_size), as_pair(backbone.patch_size)
    return height // rows, width // columns


def size_arguments(encoder: Any, images: Any) -> dict[str, bool]:
    """Return the argument that interpolates position tables for images (N, C, H, W) of another size.

    It is empty for an encoder without this argument.

    Raises:
        UserError: the encoder's own images are not square, and these images have another size.
    """
    config = getattr(encoder, "config", None)  # modules of users may have none
    if config is None:
        return {}
    own: Any = getattr(config, "image_size", None)
    size = tuple(images.shape[-2:])
    if has_rectangular_table(encoder) and size != as_pair(own):
        height, width = as_pair(own)
        raise UserError(
            f"encoder: expected images of {height} x {width} pixels, the size of its position table, got "
            f"{size[0]} x {size[1]}; use images of this size, or an encoder of square images"
        )
    if _INTERPOLATES not in inspect.signature(encoder.forward).parameters:
        return {}
    return {_INTERPOLATES: own is None or size != as_pair(own)}


def has_rectangular_table(encoder: Any) -> bool:
    """Return whether an encoder has a position table for images that are not square.

    transformers (seen with 5.24) interpolates each table as that of a square. For images of 4 x 4 patches, a
    table of 2 x 8 patches gives wrong positions without an error. timm had the same fault
    (github.com/huggingface/pytorch-image-models/pull/2737).
    """
    own = getattr(encoder.config, "image_size", None)
    if own is None or isinstance(own, int) or len(set(as_pair(own))) == 1:
        return False
    owners = [module for module in encoder.modules() if hasattr(module, _INTERPOLATES)]
    return any(getattr(owner, table, None) is not None for owner in owners for table in _POSITION_TABLES)


def cosine_factor(step: float, steps: float, warmup: float = 0) -> float:
    """Return the factor of half a cosine on a learning rate: 1 after the warmup, 0 after all steps."""
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def scheduled_value(start: float, end: float, schedule: str, fraction: float) -> float:
    """Return a value between `start` (at `fraction` 0) and `end` (at `fraction` 1).

    Args:
        schedule: "constant" (always `start`), "linear", or "cosine" (half a period).
        fraction: completed share of the run, 0 to 1.
    """
    if schedule == "constant":
        return start
    weight = fraction if schedule == "linear" else (1 - math.cos(math.pi * fraction)) / 2
    return start + (end - start) * weight


def width_field(name: str, width: int, heads_name: str, heads: int) -> tuple[str, int, bool, str]:
    """Return the row of `check_fields` for the width of a transformer with a sine-cosine position table.

    The width must be a multiple of the number of heads, and of 4 for the position table.
    """
    fits = width > 0 and heads > 0 and width % 4 == 0 and width % heads == 0
    return name, width, fits, f"a multiple of 4 and of {heads_name} = {heads}"


def check_fields(*fields: tuple[str, Any, bool, str]) -> None:
    """Raise `UserError` for the first field of a method with a value outside of its range.

    Args:
        fields: see `hf_ssl.errors.check_values`.
    """
    check_values("method", *fields)


def check_unused(config: SSLConfig, names: Sequence[str], condition: str) -> None:
    """Raise `UserError` for the first field that was set although it has no effect.

    A field with its default value passes, so that stored configs can be loaded.

    Args:
        config: config of a method.
        names: fields without effect.
        condition: the other setting, with which these fields have no effect, such as "method.head=linear".
    """
    defaults = {item.name: item.default for item in fields(config)}
    for name in names:
        value = getattr(config, name)
        if value != defaults[name]:
            raise UserError(
                f"method.{name}: expected no value, because it has no effect with {condition}, got {value}; "
                "leave it out"
            )
