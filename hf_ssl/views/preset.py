# SPDX-License-Identifier: Apache-2.0
"""The settings of the augmentation as plain data, with their limits.

`ViewSettings` is the only list of settings: name, type, default, limits and meaning. `ViewOverrides` (the
same settings, all optional) and `ViewPreset` (the same settings and those of a whole preset) derive from it.
This module loads neither torch nor numpy.

The recipe's section `views` is a `ViewPreset`. A method's config stores it as a dict, so that a checkpoint is
enough to repeat the augmentation.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, NoReturn, get_type_hints

from hf_ssl.errors import UserError, check_keys
from hf_ssl.sections import as_setting

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FURTHER_MEAN, FURTHER_STD = 0.5, 0.25
"""Normalization of the channels of further image columns. The mean is that of a full range from 0 to 1."""
INTERPOLATIONS = ("bilinear", "bicubic")
COLOR_STRENGTHS = ("brightness", "contrast", "saturation", "hue")
LARGEST = 1e6


def _setting(default: Any, expected: str, holds: Callable[[Any], bool]) -> Any:
    """Return a dataclass field with the limits of its values: a test, and its description for errors."""
    return field(default=default, metadata={"expected": expected, "holds": holds})


_WHOLE = "a whole number of at least 1"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _whole(default: int) -> Any:
    return _setting(default, _WHOLE, _is_whole)


def _probability(default: float) -> Any:
    return _setting(default, "a probability between 0 and 1", lambda value: _is_between(value, 0, 1))


def _strength(default: float) -> Any:
    return _setting(default, "a number of at least 0", lambda value: _is_between(value, 0, LARGEST))


def _range(default: tuple[float, float], meaning: str, largest: float = LARGEST) -> Any:
    def holds(value: Any) -> bool:
        is_pair = isinstance(value, tuple | list) and len(value) == 2
        return is_pair and all(_is_between(end, 0, largest) for end in value) and 0 < value[0] <= value[1]

    limit = " <= 1" if largest == 1 else ""
    return _setting(default, f"{meaning} with 0 < low <= high{limit}", holds)


@dataclass
class ViewSettings:
    """The settings of one view.

    Fields that switch an operation on, such as `flip` and `solarize`, are probabilities. The strengths of the
    color jitter are those of torchvision: `brightness=0.8` samples a factor from [0.2, 1.8].
    """

    size: int = _whole(224)
    """The side of the view in pixels."""
    count: int = _whole(2)
    """The number of global views of an image, or of local views."""
    scale: tuple[float, float] = _range((0.08, 1.0), "fractions of the image's area", 1)
    """The fraction of the image's area that the crop keeps."""
    ratio: tuple[float, float] = _range((3 / 4, 4 / 3), "ratios of width to height")
    """The width of the crop divided by its height."""
    interpolation: str = _setting(
        "bilinear", " or ".join(INTERPOLATIONS), lambda value: value in INTERPOLATIONS
    )
    flip: float = _probability(0.5)
    """The probability of a horizontal flip."""
    jitter: float = _probability(0.8)
    """The probability of the color jitter."""
    brightness: float = _strength(0.8)
    contrast: float = _strength(0.8)
    saturation: float = _strength(0.8)
    hue: float = _setting(0.2, "between 0 and 0.5 turns", lambda value: _is_between(value, 0, 0.5))
    """`hue=0.2` samples a rotation from [-0.2, 0.2] turns."""
    gray: float = _probability(0.2)
    """The probability of the conversion to grayscale."""
    blur: float = _probability(0.5)
    """The probability of the Gaussian blur."""
    blur_sigma: tuple[float, float] = _range((0.1, 2.0), "sigmas in pixels")
    blur_kernel: int | None = _setting(
        None, "an odd number of pixels of at least 1", lambda value: _is_whole(value) and value % 2 == 1
    )
    """Side of the kernel in pixels. None selects max(3, 2 * (size // 20) + 1), as in the code of SimCLR."""
    solarize: float = _probability(0.0)
    """The probability of the solarization."""
    solarize_threshold: float = _setting(
        0.5, "a pixel value between 0 and 1", lambda value: _is_between(value, 0, 1)
    )
    quarter_turns: float = _probability(0.0)
    """The probability of a rotation by 90, 180 or 270 degrees. The three angles are equally likely. So 0.75
    makes all four orientations equally likely. SimCLR's paper tests this rotation (section 3.1)."""
    rotation: float = _probability(0.0)
    """The probability of a rotation by a random angle. The edges of the view are mirrored."""
    rotation_degrees: float = _setting(
        30.0, "an angle between 0 and 180 degrees", lambda value: _is_between(value, 0, 180)
    )
    """`rotation_degrees=30` samples an angle from [-30, 30] degrees, as torchvision's RandomRotation(30)."""

    @property
    def blur_kernel_size(self) -> int:
        """The side of the blur's kernel in pixels, also where `blur_kernel` is None."""
        return max(3, 2 * (self.size // 20) + 1) if self.blur_kernel is None else self.blur_kernel


def _convert(settings: Any) -> None:
    """Convert the values of a dataclass, in place, as `as_setting` describes."""
    for item in fields(settings):
        setattr(settings, item.name, as_setting(getattr(settings, item.name), item.type))


# mypy uses `Any`, so that it accepts all settings as arguments. The types of the fields exist at run time.
_OptionalSettings: Any = make_dataclass(
    "_OptionalSettings",
    [(name, hint | None, None) for name, hint in get_type_hints(ViewSettings).items()],
    namespace={"__post_init__": _convert},
)


class ViewOverrides(_OptionalSettings):
    """The settings that some of the views have instead of the preset's; None keeps the preset's value.

    The base class is a dataclass. Without a decorator of its own, this class has the constructor of the base.
    """


@dataclass
class ViewPreset(ViewSettings):
    """The settings of all views of an image.

    The augmentations run in this order: crop, flip, color jitter (its four parts in random order), the
    operations in `hf_ssl.views.operations.OPERATIONS`, enlargement, normalization. The defaults are SimCLR's
    for ImageNet (arXiv:2002.05709, appendix A), except bilinear crops and normalized pixels.
    """

    second: ViewOverrides | None = None
    """Other settings for every second global view (numbers 1, 3, ...): BYOL, Barlow Twins, DINO."""
    local: ViewOverrides | None = None
    """Settings of the local views (multi-crop). `count` is required, the others are inherited."""
    enlarge: int | None = None
    """Side to which global views are enlarged at the end (bilinear). Local views have the same factor."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        _convert(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ViewPreset":
        """Return the preset of a dict made by `to_dict`. Absent keys keep their defaults.

        Raises:
            UserError: a key is unknown.
        """
        return _read(cls, values, "views")

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, numbers, strings and dicts, which are equal after a round trip through JSON."""
        return json.loads(json.dumps(asdict(self)))

    def check(self, channels: int) -> None:
        """Check all settings for images with this number of channels.

        Raises:
            UserError: a setting is outside its limits. The message names the key, for example `views.hue`.
        """
        if channels < 1:
            raise UserError(f"channels: expected at least 1, got {channels}")
        _check_whole("views.count", self.count)
        _check_whole("views.size", self.size)  # the default of `blur_kernel` depends on it
        _check_overrides(self)
        views = self.expand()
        kinds: list[tuple[ViewSettings, ViewOverrides | None, str]] = [(views[0], None, "views")]
        if self.second is not None and self.count > 1:
            kinds.append((views[1], self.second, "views.second"))
        if self.local is not None:
            kinds.append((views[-1], self.local, "views.local"))
        for settings, overrides, section in kinds:
            check_settings(settings, overrides, section, channels)
        check_output(self, channels)

    def expand(self) -> list[ViewSettings]:
        """Return the settings of each view of an image: global views first, then local ones."""
        views = [_filled(self, self.second if number % 2 else None) for number in range(self.count)]
        return views + [_filled(self, self.local) for _ in range(self.local_count)]

    @property
    def local_count(self) -> int:
        """The number of local views of an image."""
        return 0 if self.local is None else (self.local.count or 0)

    @property
    def local_size(self) -> int:
        """The side of a local view in pixels before it is enlarged."""
        return self.size if self.local is None or self.local.size is None else self.local.size

    @property
    def final_size(self) -> int:
        """The side of a global view in pixels in the model's input."""
        return self.size if self.enlarge is None else self.enlarge

    @property
    def final_sizes(self) -> list[int]:
        """Sides in pixels of the views that the encoder receives: of global, then of local ones, if any."""
        return [self.final_size, *([self.final_local_size] if self.local_count else [])]

    @property
    def final_local_size(self) -> int:
        """The side of a local view in pixels in the model's input."""
        return self.local_size * self.final_size // self.size


def _filled(preset: ViewPreset, overrides: ViewOverrides | None) -> ViewSettings:
    """Return the settings of one view, with `blur_kernel` as a number."""
    values = {}
    for item in fields(ViewSettings):
        value = None if overrides is None else getattr(overrides, item.name)
        values[item.name] = getattr(preset, item.name) if value is None else value
    settings = ViewSettings(**values)
    settings.blur_kernel = settings.blur_kernel_size
    return settings


def _check_overrides(preset: ViewPreset) -> None:
    if preset.second is not None:
        if preset.second.count is not None:
            _fail("views.second.count", "null, as it is for every second global view", preset.second.count)
        if preset.second.size not in (None, preset.size):
            expected = f"views.size, {preset.size}, because global views are one tensor"
            _fail("views.second.size", expected, preset.second.size)
        if preset.count < 2:
            _fail("views.count", "at least 2 because views.second is given", preset.count)
    if preset.local is not None:
        _check_whole("views.local.count", preset.local.count)
        if preset.local.size is not None:
            _check_whole("views.local.size", preset.local.size)


def check_settings(
    settings: ViewSettings, overrides: ViewOverrides | None, section: str, channels: int
) -> None:
    """Check the settings of one kind of view: each against its limits, then those that belong together.

    Args:
        settings: all settings of this kind of view.
        overrides: those that differ from the preset's, if this kind of view has any.
        section: where the settings or the overrides are, for the messages.
        channels: number of channels of the images.

    Raises:
        UserError: a setting is outside its limits.
    """

    def fail(name: str, expected: str) -> NoReturn:
        # The key names the place of the value: in the overrides, or in the preset that they inherit from.
        inherited = overrides is not None and getattr(overrides, name) is None
        _fail(f"views.{name}" if inherited else f"{section}.{name}", expected, getattr(settings, name))

    for item in fields(ViewSettings):
        if not item.metadata["holds"](getattr(settings, item.name)):
            fail(item.name, item.metadata["expected"])
    if settings.blur and settings.blur_kernel_size // 2 >= settings.size:
        fail("blur_kernel", f"less than {2 * settings.size}, twice the view size, because edges are mirrored")
    if channels == 3:
        return
    strengths = [name for name in COLOR_STRENGTHS if settings.jitter and getattr(settings, name)]
    if channels == 1:
        needs_color = [name for name in strengths if name in ("saturation", "hue")]
    else:
        needs_color = ["jitter"] if strengths else []
    for name in needs_color + (["gray"] if settings.gray else []):
        fail(name, without_color(channels))


def check_output(preset: ViewPreset, channels: int) -> None:
    """Raise `UserError` unless normalization and enlargement fit images with this number of channels."""
    for name in ("mean", "std"):
        values = getattr(preset, name)
        if not isinstance(values, tuple | list) or len(values) != channels:
            _fail(f"views.{name}", f"one number for each of {channels} channels", values)
        if not all(_is_between(value, -LARGEST, LARGEST) for value in values):
            _fail(f"views.{name}", "finite numbers", values)
        if name == "std" and min(values) <= 0:
            _fail("views.std", "numbers above 0", values)
    if preset.enlarge is None:
        return
    _check_whole("views.enlarge", preset.enlarge)
    if preset.enlarge < preset.size:
        _fail("views.enlarge", f"at least views.size, {preset.size}", preset.enlarge)
    if preset.local_count and preset.local_size * preset.enlarge % preset.size:
        expected = f"a side that enlarges local views of {preset.local_size} pixels to whole pixels"
        _fail("views.enlarge", expected, preset.enlarge)


def color_probability(key: str, value: float, channels: int) -> tuple[str, float, bool, str]:
    """Return the row of `check_values` for the probability of an operation that needs three channels."""
    if channels == 3:
        return key, value, 0 <= value <= 1, "a probability between 0 and 1"
    return key, value, value == 0, without_color(channels)


def without_color(channels: int) -> str:
    """Return a text: the value 0 that a setting for color must have, with the reason."""
    return f"0, because images with {channels} channel{'s' if channels > 1 else ''} have no color"


def _check_whole(key: str, value: Any) -> None:
    if not _is_whole(value):
        _fail(key, _WHOLE, value)


def _fail(key: str, expected: str, got: object) -> NoReturn:
    raise UserError(f"{key}: expected {expected}, got {list(got) if isinstance(got, tuple) else got!r}")


def _read(cls: type, values: dict[str, Any], where: str) -> Any:
    check_keys(values, (item.name for item in fields(cls)), where)
    read = {}
    for name, value in values.items():
        if name in ("second", "local") and value is not None:
            if not isinstance(value, dict):
                _fail(f"{where}.{name}", "null or settings that differ", value)
            value = _read(ViewOverrides, value, f"{where}.{name}")
        read[name] = tuple(value) if isinstance(value, list) else value
    return cls(**read)
