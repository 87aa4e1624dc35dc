# SPDX-License-Identifier: Apache-2.0
"""What a preset may not say: one clear sentence for each mistake."""

from typing import NoReturn

from hf_ssl.errors import UserError
from hf_ssl.views.preset import INTERPOLATIONS, ViewOverrides, ViewPreset, ViewSettings

PROBABILITIES = ("flip", "jitter", "gray", "blur", "solarize")
LARGEST = 1e6
COLOR_STRENGTHS = ("brightness", "contrast", "saturation", "hue")


def check_preset(preset: ViewPreset, channels: int) -> None:
    """Raises `UserError` naming the key (`views.local.scale`) if `preset` cannot be done to such images."""
    if channels < 1:
        raise UserError(f"Expected images of at least one channel, got channels={channels}.")
    _whole(preset.count, "views.count")
    _check_overrides(preset)
    views = preset.expand()
    named: list[tuple[ViewSettings, ViewOverrides | None, str]] = [(views[0], None, "views")]
    if preset.second is not None and preset.count > 1:
        named.append((views[1], preset.second, "views.second"))
    if preset.local is not None:
        named.append((views[-1], preset.local, "views.local"))
    for settings, overrides, section in named:
        _check_numbers(settings, overrides, section)
        _check_channels(settings, overrides, section, channels)
    _check_final(preset, channels)


def _check_overrides(preset: ViewPreset) -> None:
    if preset.second is not None:
        if preset.second.count is not None:
            _refuse("views.second.count", "null (it is every second global view)", preset.second.count)
        if preset.second.size not in (None, preset.size):
            expected = f"views.size, {preset.size}, because global views are one tensor"
            _refuse("views.second.size", expected, preset.second.size)
        if preset.count < 2:
            _refuse("views.count", "at least 2 where views.second is given", preset.count)
    if preset.local is not None:
        _whole(preset.local.count, "views.local.count")


def _check_numbers(settings: ViewSettings, overrides: ViewOverrides | None, section: str) -> None:
    def key(name: str) -> str:
        return _key(name, overrides, section)

    _whole(settings.size, key("size"))
    for name in PROBABILITIES:
        value = getattr(settings, name)
        if not _between(value, 0, 1):
            _refuse(key(name), "a probability between 0 and 1", value)
    for name in COLOR_STRENGTHS:
        value = getattr(settings, name)
        if not _between(value, 0, 0.5 if name == "hue" else LARGEST):
            _refuse(
                key(name), "between 0 and 0.5 turns" if name == "hue" else "a number of at least 0", value
            )
    _ordered(settings.scale, key("scale"), "shares of the image's area with 0 < low <= high <= 1", 1.0)
    _ordered(settings.ratio, key("ratio"), "ratios of width to height with 0 < low <= high", LARGEST)
    _ordered(settings.blur_sigma, key("blur_sigma"), "sigmas in pixels with 0 < low <= high", LARGEST)
    if settings.interpolation not in INTERPOLATIONS:
        _refuse(key("interpolation"), " or ".join(INTERPOLATIONS), settings.interpolation)
    kernel = settings.blur_kernel
    _whole(kernel, key("blur_kernel"))
    if kernel % 2 == 0:
        _refuse(key("blur_kernel"), "an odd number of pixels", kernel)
    if settings.blur and kernel // 2 >= settings.size:
        expected = (
            f"less than {2 * settings.size} pixels for a view of {settings.size}, whose border is mirrored"
        )
        _refuse(key("blur_kernel"), expected, kernel)
    if not _between(settings.solarize_threshold, 0, 1):
        _refuse(key("solarize_threshold"), "a pixel between 0 and 1", settings.solarize_threshold)


def _check_channels(
    settings: ViewSettings, overrides: ViewOverrides | None, section: str, channels: int
) -> None:
    if channels == 3:
        return
    images = f"0, because images of {channels} channel{'s' if channels > 1 else ''} have no colour"
    asked = [name for name in COLOR_STRENGTHS if settings.jitter and getattr(settings, name)]
    if channels == 1:
        refused = [name for name in asked if name in ("saturation", "hue")]
    else:
        refused = ["jitter"] if asked else []
    for name in refused + (["gray"] if settings.gray else []):
        _refuse(_key(name, overrides, section), images, getattr(settings, name))


def _check_final(preset: ViewPreset, channels: int) -> None:
    for name in ("mean", "std"):
        values = getattr(preset, name)
        if not isinstance(values, tuple | list) or len(values) != channels:
            _refuse(f"views.{name}", f"one number for each of {channels} channels", values)
        if not all(_between(value, -LARGEST, LARGEST) and (name == "mean" or value > 0) for value in values):
            _refuse(f"views.{name}", "finite numbers" + (" above 0" if name == "std" else ""), list(values))
    if preset.enlarge is None:
        return
    _whole(preset.enlarge, "views.enlarge")
    if preset.enlarge < preset.size:
        _refuse("views.enlarge", f"at least views.size, {preset.size}", preset.enlarge)
    if preset.local_count and preset.local_size * preset.enlarge % preset.size:
        expected = f"a side that enlarges local views of {preset.local_size} pixels to whole pixels"
        _refuse("views.enlarge", expected, preset.enlarge)


def _key(name: str, overrides: ViewOverrides | None, section: str) -> str:
    """Where the person wrote the value: in the overrides, or in the preset that they inherit from."""
    return f"views.{name}" if overrides is None or getattr(overrides, name) is None else f"{section}.{name}"


def _whole(value: object, key: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(key, "a whole number of at least 1", value)


def _between(value: object, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _ordered(pair: tuple[float, float], key: str, expected: str, largest: float) -> None:
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not (is_pair and all(_between(value, 0, largest) for value in pair) and 0 < pair[0] <= pair[1]):
        _refuse(key, expected, list(pair) if isinstance(pair, tuple) else pair)


def _refuse(key: str, expected: str, got: object) -> NoReturn:
    raise UserError(f"{key}: expected {expected}, got {got!r}.")
