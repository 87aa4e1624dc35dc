# SPDX-License-Identifier: Apache-2.0
"""Pictures of attention maps: maps and masks over images, patches as colors (layer 1).

Legend: B images, C channels, H, W pixels, h, w rows and columns of patches, D features.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging as transformers_logging

from hf_ssl.data.decode import as_pillow
from hf_ssl.data.photos import read_photo
from hf_ssl.data.pixels import BrokenImage, ValueRange
from hf_ssl.errors import UserError
from hf_ssl.evaluation.attention import attention_maps, patch_size, threshold_attention
from hf_ssl.evaluation.encoders import load_encoder, pixel_values
from hf_ssl.files import replaced_file
from hf_ssl.modeling.backbones import input_channels
from hf_ssl.modeling.loading import normalization
from hf_ssl.names import renamed_arguments

SHOWN_SIDE = 320  # smallest shorter edge of the pictures in pixels
OVERVIEW_HEIGHT = 128
COLORS = "inferno"
OPACITY = 0.65


def pca_colors(patches_BhwD: Tensor) -> Tensor:
    """Return the first three principal components of patch features as red, green and blue.

    Patches with similar features have similar colors. All images share the components. Each channel is scaled
    so that its 2nd percentile is 0 and its 98th percentile is 1. Equal features give equal colors, up to
    rounding, if the three largest variances are distinct. Directions of equal variance are not unique: they
    depend on the version of torch and on the processor.

    Args:
        patches_BhwD: `AttentionMaps.patches`, or other features on a grid with D >= 3.

    Returns:
        (B, h, w, 3) float32 in [0, 1].

    Source: the pictures of Oquab et al. 2023, arXiv:2304.07193, figure 1, without their removal of the
    background.
    """
    rows = patches_BhwD.flatten(0, 2).double()
    rows = rows - rows.mean(dim=0)
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:3]
    # The sign of a direction is arbitrary. This code makes the largest component positive. Components that
    # differ by less than a ten-thousandth count as equal, and the first of them is used. Otherwise, rounding
    # would determine the sign.
    sizes = directions.abs()
    tied = sizes >= (1 - 1e-4) * sizes.amax(dim=1, keepdim=True)
    largest = directions.gather(1, tied.int().argmax(dim=1, keepdim=True))
    values = rows @ (directions * largest.sign()).T
    values = nn.functional.pad(values, (0, 3 - values.shape[1]))
    low, high = torch.quantile(values, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    spread = high - low
    spread = spread.clamp(min=1e-6 * float(spread.max()) + 1e-30)  # ignores rounding errors
    colors = ((values - low) / spread).clamp(0, 1)
    return colors.float().reshape(*patches_BhwD.shape[:3], 3)


def attention_pictures(
    model: nn.Module,
    processor: Any,
    photo: Tensor,
    *,
    layer: int = -1,
    size: int | None = None,
    mass: float = 0.6,
    shown_side: int = SHOWN_SIDE,
) -> dict[str, Image.Image]:
    """Return all attention pictures of one photo.

    Args:
        model, processor: an encoder that `has_attention` supports, and its image processor.
        photo: uint8 (C, H, W).
        layer: see `attention_maps`.
        size: shortest edge of the input in pixels. The photo is not cropped, and both edges are rounded down
            to whole patches. None: the square image that the processor returns.
        mass: share of the attention in the mask.
        shown_side: smallest length of the shorter edge of the pictures in pixels.

    Returns:
        RGB pictures of one size: "image" (the input of the encoder), "mean", "rollout", "mask", "colors"
        (`pca_colors`), "head 1", "head 2", ...

    Raises:
        UserError: `size` is smaller than one patch, or `attention_maps` raises.
    """
    device = next(model.parameters()).device
    if size is None:
        pixels = pixel_values(processor, [photo], device)
    else:
        pixels = _at_size(processor, photo, size, patch_size(model), device)
    maps = attention_maps(model, pixels, layer=layer)
    height, width = (count * patch_size(model) for count in maps.heads.shape[-2:])
    mean, std = (torch.tensor(values)[:, None, None] for values in normalization(processor, pixels.shape[1]))
    seen = _enlarge(_as_picture(pixels[0, :, :height, :width].cpu().float() * std + mean), shown_side)
    attention = maps.mean[0]
    colors = pca_colors(maps.patches)[0].permute(2, 0, 1)
    pictures = {
        "image": seen,
        "mean": overlay(seen, attention),
        "rollout": overlay(seen, maps.rollout[0]),
        "mask": darken_outside_mask(seen, threshold_attention(attention, mass)),
        "colors": _as_picture(_resized(colors, seen.size, smooth=False)),
    }
    heads = {f"head {number}": overlay(seen, head) for number, head in enumerate(maps.heads[0], start=1)}
    return pictures | heads


@renamed_arguments(colours="colors")
def overlay(
    photo: Image.Image,
    values_hw: Tensor,
    *,
    colors: str = COLORS,
    opacity: float = OPACITY,
    smooth: bool = True,
) -> Image.Image:
    """Return a photo with a map over it, whose smallest value is dark and whose largest value is bright.

    Args:
        photo: RGB picture.
        values_hw: map (h, w) with any range. A constant map is shown as zeros.
        colors: name of a colormap of matplotlib.
        opacity: opacity of the map, from 0 to 1.
        smooth: whether to interpolate between patches. False shows them as squares.

    Returns:
        RGB picture of the photo's size.
    """
    import matplotlib  # imported here because it loads slowly

    low, high = values_hw.min(), values_hw.max()
    scaled = (values_hw.float() - low) / (high - low).clamp(min=1e-12)
    large = _resized(scaled[None], photo.size, smooth)[0].clamp(0, 1)
    colored = matplotlib.colormaps[colors](large.numpy(), bytes=True)
    colored[..., 3] = round(255 * opacity)
    layers = (photo.convert("RGBA"), Image.fromarray(colored))
    return Image.alpha_composite(*layers).convert("RGB")


def darken_outside_mask(photo: Image.Image, mask_hw: Tensor, *, darkness: float = 0.75) -> Image.Image:
    """Return a photo that is darkened where the mask (h, w) is False. Patches are shown as squares."""
    light = _resized(mask_hw.float()[None], photo.size, smooth=False)[0]
    factor = 1 - darkness * (1 - light.numpy()[..., None])
    return Image.fromarray((np.asarray(photo.convert("RGB")) * factor).round().astype(np.uint8))


def visible_part(
    processor: Any, height: int, width: int, channels: int = 3
) -> tuple[float, float, float, float]:
    """Return the part of a photo that an image processor gives to the encoder: left, top, right and bottom.

    The numbers are shares of the width and the height of the photo, from 0 to 1. Most processors crop the
    middle of a photo. This function processes ramps, so it needs no settings of the processor.

    Args:
        processor: an image processor.
        height, width: size of the photo in pixels.
        channels: number of channels of the encoder.
    """
    scale = 256 / max(height, width)
    rows, columns = (max(round(side * scale), 1) for side in (height, width))
    down = torch.arange(rows, dtype=torch.uint8)[:, None].expand(rows, columns)
    across = torch.arange(columns, dtype=torch.uint8).expand(rows, columns)
    photos = [torch.zeros_like(down), torch.full_like(down, 255), across, down]
    photos = [photo.expand(channels, -1, -1).contiguous() for photo in photos]
    black, white, *ramps = pixel_values(processor, photos, torch.device("cpu"))[:, 0].double()
    borders = []
    for ramp, length, axis in zip(ramps, (columns, rows), (0, 1), strict=True):
        places = ((ramp - black) / (white - black) * 255 + 0.5).mean(dim=axis).numpy()
        # A line through the inner half gives the borders, because resampling changes the outer values.
        inner = np.arange(len(places) // 4, len(places) - len(places) // 4)
        slope, start = np.polyfit(inner + 0.5, places[inner], 1)
        borders.append(np.clip([start / length, (start + slope * len(places)) / length], 0, 1).tolist())
    (left, right), (top, bottom) = borders
    return left, top, right, bottom


def fade_outside(photo: Image.Image, part: tuple[float, float, float, float]) -> Image.Image:
    """Return a photo that is gray outside the part from `visible_part`."""
    left, right = (round(share * photo.width) for share in part[::2])
    top, bottom = (round(share * photo.height) for share in part[1::2])
    faded = Image.blend(photo.convert("RGB"), Image.new("RGB", photo.size, (128, 128, 128)), 0.7)
    faded.paste(photo.crop((left, top, right, bottom)), (left, top))
    return faded


def write_attention_pictures(
    model: str,
    photos: Sequence[Path],
    folder: Path,
    *,
    layer: int = -1,
    size: int | None = None,
    value_range: ValueRange | None = None,
) -> list[Path]:
    """Write the pictures of each photo as PNG files into one subfolder of `folder` per photo.

    The file `overview.png` in `folder` shows all pictures side by side.

    Args:
        model: a folder or a Hub id.
        photos: picture files. If several files have the same name, the folders after the first get a number.
        layer, size: see `attention_pictures`.
        value_range: the values of photos of more than 8 bits that become black and white, as in the training
            of the encoder. None: the limits of the file format.

    Returns:
        The folders of the photos.

    Raises:
        UserError: the encoder does not exist or has no attention maps, or a file is not a picture.
    """
    transformers_logging.disable_progress_bar()
    encoder, processor = load_encoder(model)
    patch_size(encoder)  # raises for an unsupported encoder before any photo is read
    written: list[Path] = []
    rows: list[dict[str, Image.Image]] = []
    for photo in photos:
        try:
            channels = input_channels(encoder.config)
            pixels = read_photo(photo, channels=channels, value_range=value_range)
        except (UserError, OSError) as error:
            reason: object = error.strerror if isinstance(error, OSError) else error
            if isinstance(error.__cause__, BrokenImage):
                reason = error.__cause__  # the sentence for visitors of a page has no advice
            raise UserError(f"{photo}: {reason}") from error
        target = _unused_folder(folder, photo.stem, written)
        rows.append(attention_pictures(encoder, processor, pixels, layer=layer, size=size))
        for name, picture in rows[-1].items():
            with replaced_file(target / f"{name.replace(' ', '_')}.png") as path:
                picture.save(path)
        written.append(target)
    with replaced_file(folder / "overview.png") as path:
        overview(rows).save(path)
    return written


def overview(rows: Sequence[dict[str, Image.Image]], *, height: int = OVERVIEW_HEIGHT) -> Image.Image:
    """Return one picture with a row per photo and a column per kind of picture, under its name.

    Args:
        rows: output of `attention_pictures` for at least one photo. All rows have the same names, and all
            pictures of a row have the same size.
        height: height of each picture in pixels.
    """
    heading, gap = 14, 3
    firsts = [next(iter(row.values())) for row in rows]
    widths = [round(picture.width * height / picture.height) for picture in firsts]
    step = max(widths) + gap
    size = (step * len(rows[0]) - gap, heading + (height + gap) * len(rows) - gap)
    sheet = Image.new("RGB", size, "white")
    for number, name in enumerate(rows[0]):
        ImageDraw.Draw(sheet).text((number * step + 2, 1), name, fill="black")
    for line, (row, width) in enumerate(zip(rows, widths, strict=True)):
        for number, picture in enumerate(row.values()):
            small = picture.resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(small, (number * step, heading + line * (height + gap)))
    return sheet


def _unused_folder(folder: Path, stem: str, taken: list[Path]) -> Path:
    """Return a folder for a photo with this name that is not in `taken`."""
    names = [stem, *(f"{stem}_{number}" for number in range(2, len(taken) + 2))]
    return next(folder / name for name in names if folder / name not in taken)


def _at_size(processor: Any, photo: Tensor, size: int, patch: int, device: torch.device) -> Tensor:
    """Return the photo (1, C, H, W), resized and normalized by the processor without cropping.

    The shortest edge has `size` pixels, and both edges are rounded down to whole patches.
    """
    if size < patch:
        raise UserError(f"size: expected at least {patch} pixels (one patch), got {size}")
    short = min(photo.shape[1:])
    height, width = (max(round(edge * size / short) // patch, 1) * patch for edge in photo.shape[1:])
    exact = {"size": {"height": height, "width": width}, "do_resize": True, "do_center_crop": False}
    return pixel_values(processor, [photo], device, **exact)


def _enlarge(photo: Image.Image, side: int) -> Image.Image:
    """Return the photo, enlarged by an integer factor if its shorter edge is below `side` pixels."""
    factor = -(-side // min(photo.size))
    if factor <= 1:
        return photo
    return photo.resize((photo.width * factor, photo.height * factor), Image.Resampling.NEAREST)


def _as_picture(values_CHW: Tensor) -> Image.Image:
    """Return the RGB picture of gray or RGB values from 0 to 1."""
    pixels = values_CHW.mul(255).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1)
    return as_pillow(pixels)


def _resized(values_Chw: Tensor, size: tuple[int, int], smooth: bool) -> Tensor:
    """Return values (C, H, W) for a picture of `size` (width, height)."""
    return F.interpolate(values_Chw[None], size[::-1], mode="bicubic" if smooth else "nearest-exact")[0]
