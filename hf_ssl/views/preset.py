# SPDX-License-Identifier: Apache-2.0
"""A preset: everything that decides how views of an image are made, as plain data. Loads neither torch nor
numpy.

The recipe's `views` section is this dataclass (OmegaConf structures it), and the method's config keeps it as
a dict, so that a checkpoint alone is enough to repeat its views. Colour strengths are torchvision's:
`brightness=0.8` draws a factor from [0.2, 1.8], `hue=0.2` a rotation from [-0.2, 0.2] turns.
"""

from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any

from hf_ssl.errors import UserError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass
class ViewOverrides:
    """What differs from the preset for some of its views; None means: as in the preset."""

    size: int | None = None
    count: int | None = None
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    interpolation: str | None = None
    flip: float | None = None
    jitter: float | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    gray: float | None = None
    blur: float | None = None
    blur_sigma: tuple[float, float] | None = None
    blur_kernel: int | None = None
    solarize: float | None = None
    solarize_threshold: float | None = None


@dataclass(frozen=True)
class ViewSettings:
    """One view with every override filled in; the fields mean what they mean in `ViewPreset`."""

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: str
    flip: float
    jitter: float
    brightness: float
    contrast: float
    saturation: float
    hue: float
    gray: float
    blur: float
    blur_sigma: tuple[float, float]
    blur_kernel: int
    solarize: float
    solarize_threshold: float


@dataclass
class ViewPreset:
    """How views are made. Sizes are pixels of a square's side; `flip`, `jitter`, `gray`, `blur`, `solarize`
    are probabilities; `scale` is the share of the image's area that a crop keeps, `ratio` its width / height.

    The order of the operations: crop, flip, jitter (its four parts in random order), grey, blur, solarise,
    enlarge, normalise. The defaults are SimCLR's for ImageNet (arXiv:2002.05709, appendix A) but for bilinear
    crops and normalised pixels.
    """

    size: int = 224
    count: int = 2
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    gray: float = 0.2
    blur: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int | None = None
    """Pixels; None: 2 * (size // 20) + 1, at least 3, as the SimCLR author's code has it."""
    solarize: float = 0.0
    solarize_threshold: float = 0.5
    second: ViewOverrides | None = None
    """What differs for every second global view (numbers 1, 3, ...): BYOL, Barlow Twins, DINO."""
    local: ViewOverrides | None = None
    """Local views (multi-crop): `count` is required, the rest is inherited."""
    enlarge: int | None = None
    """Side to which global views are enlarged (bilinear) at the end; local views by the same factor."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ViewPreset":
        """The inverse of `to_dict`; absent keys keep their defaults, an unknown one raises `UserError`."""
        return _read(cls, values, "views")

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers, strings and dicts: equal to itself after a round trip through JSON."""
        return _plain(asdict(self))

    def check(self, channels: int) -> None:
        """Raises `UserError` with one sentence if images of so many channels cannot be viewed like this."""
        from hf_ssl.views.checks import check_preset

        check_preset(self, channels)

    def expand(self) -> list[ViewSettings]:
        """The settings of each view of an image: global views first, then local ones."""
        views = [_fill(self, self.second if number % 2 else None) for number in range(self.count)]
        return views + [_fill(self, self.local) for _ in range(self.local_count)]

    @property
    def global_count(self) -> int:
        return self.count

    @property
    def local_count(self) -> int:
        return 0 if self.local is None else (self.local.count or 0)

    @property
    def local_size(self) -> int:
        """Side of a local view before it is enlarged."""
        return self.size if self.local is None or self.local.size is None else self.local.size

    @property
    def final_size(self) -> int:
        """Side of a global view as the model sees it."""
        return self.size if self.enlarge is None else self.enlarge

    @property
    def final_local_size(self) -> int:
        """Side of a local view as the model sees it."""
        return self.local_size * self.final_size // self.size


def _fill(preset: ViewPreset, overrides: ViewOverrides | None) -> ViewSettings:
    values = {}
    for field in fields(ViewSettings):
        value = None if overrides is None else getattr(overrides, field.name)
        values[field.name] = getattr(preset, field.name) if value is None else value
    if values["blur_kernel"] is None:
        values["blur_kernel"] = max(3, 2 * (values["size"] // 20) + 1)
    return ViewSettings(**values)


def _read(cls: type, values: dict[str, Any], where: str) -> Any:
    names = [field.name for field in fields(cls)]
    for name in values:
        if name not in names:
            close = get_close_matches(name, names, 1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; expected one of {', '.join(names)}."
            raise UserError(f"Unknown key {where}.{name}{hint}")
    read = {}
    for name, value in values.items():
        if name in ("second", "local") and value is not None:
            if not isinstance(value, dict):
                raise UserError(f"{where}.{name}: expected null or keys that differ, got {value!r}.")
            value = _read(ViewOverrides, value, f"{where}.{name}")
        read[name] = tuple(value) if isinstance(value, list) else value
    return cls(**read)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
