# SPDX-License-Identifier: Apache-2.0
"""Cuts views into patches: the overlapping grid of CPC and the jigsaw of nine of PIRL.

`grid_layout` and `jigsaw_layout` describe the patches of a view. `sample_patches` samples the parameters of
every patch on the host, as a pure function of one seed per image. `cut_patches` cuts all patches of a batch
at once, on the device of the pixels. Each patch may have its own augmentation.

Legend: B images, P patches of an image, N = B * P patches, C channels, H, W sides of the images, S side of
the sub-crops.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from hf_ssl.errors import UserError, check_values
from hf_ssl.random import GOLDEN, UInt64Array, uniforms
from hf_ssl.views.operations import mapped, rotations, to_device
from hf_ssl.views.parameters import CHANGE_NUMBERS, COLUMNS, sample_changes
from hf_ssl.views.pipeline import Sampled, change_pixels, sort_for_jitter
from hf_ssl.views.preset import ViewSettings, check_settings, color_probability

Size = tuple[int, int]
PATCH_COLUMNS = (
    "cell",  # number of the patch in the image, row by row
    "top",  # corner of the sub-crop, in pixels of the image
    "left",
    "channel",  # 1, 2 or 3: the only channel that color dropping keeps; 0 keeps all
    *COLUMNS[4:],  # flip, color jitter and the operations after it
    "turn",  # rotation in degrees
    "shear_x",  # factors, see `rotate_and_shear`
    "shear_y",
)
JIGSAW_SIDE = 3  # rows and columns of the jigsaw
_PAPER_CELL, _PAPER_SUB_CROP = 85, 64  # of the jigsaw, for views of 255 pixels

# Positions in the stream of an image: after the numbers of all views, before those of methods.
_FIRST_GRID_NUMBER, _FIRST_JIGSAW_NUMBER = 1 << 19, 1 << 18
_NUMBERS_PER_PATCH = 64
_POSITION, _DROPPING, _CHANGES = slice(0, 2), slice(2, 4), slice(4, 4 + CHANGE_NUMBERS)
_AFFINE = slice(61, 64)  # at the end, because new operations extend the changes
_NO_CHANGES = ViewSettings(flip=0, jitter=0, gray=0, blur=0, solarize=0)


@dataclass(frozen=True)
class PatchLayout:
    """The places and sizes of the patches of a view, and the augmentation of each patch."""

    image_shape: tuple[int, int, int]
    """Channels, height and width of the view."""
    shape: Size
    """Rows and columns of patches."""
    cell: Size
    """Height and width of the part of the view from which a patch is cut."""
    step: Size
    """Distance of neighboring cells, down and to the right."""
    first: Size
    """Top and left of the first cell."""
    sub_crop: int
    """Side of the square that is cut at a random place in a cell."""
    size: int
    """Side of a patch. A smaller sub-crop is in its center, with zeros around it."""
    shuffled: bool
    """Whether the patches are in random order."""
    settings: ViewSettings | None
    """Flip, color jitter and operations of each patch, if any. Settings of crops are not used."""
    color_dropping: float
    """The probability that a patch keeps only one of its three channels."""
    rotation: float = 0.0
    """The largest rotation of a patch around its center, in degrees."""
    shear: float = 0.0
    """The largest shear of a patch, as a factor."""

    @property
    def is_affine(self) -> bool:
        """Whether patches are rotated or sheared."""
        return self.rotation > 0 or self.shear > 0

    @property
    def is_random(self) -> bool:
        """Whether patches depend on random numbers."""
        changes = self.settings is not None or self.color_dropping > 0 or self.is_affine
        return changes or self.shuffled or self.sub_crop < min(self.cell)

    @property
    def num_patches(self) -> int:
        """The number of patches of a view."""
        return self.shape[0] * self.shape[1]


def grid_layout(
    image_shape: tuple[int, int, int],
    *,
    patch: int,
    stride: int,
    sub_crop: int | None = None,
    settings: ViewSettings | None = None,
    color_dropping: float = 0.0,
    rotation: float = 0.0,
    shear: float = 0.0,
) -> PatchLayout:
    """Return the layout of an overlapping grid that covers the view exactly (CPC).

    Args:
        image_shape: channels, height and width of the views.
        patch: side of a patch in pixels.
        stride: distance of neighboring patches in pixels.
        sub_crop: side of the random sub-crop of each patch, which is padded back to `patch`. None keeps the
            whole patch. CPC uses 60 of 64 pixels.
        settings: flip, color jitter and operations of each patch. None changes no pixels.
        color_dropping: the probability that a patch keeps one random channel of three (CPC v2).
        rotation: each patch is rotated by a random angle up to this one, in degrees (CPC v2).
        shear: each patch is sheared along both axes by random factors up to this one (CPC v2). Zeros replace
            the pixels outside of the patch, so that no patch contains more pixels of its neighbors.

    Raises:
        UserError: the grid does not fit the view, it has fewer than two rows or columns, or a setting is
            outside its limits.

    Source: van den Oord et al., arXiv:1807.03748, section 3.2 (7 x 7 patches of 64 pixels with stride 32);
    Henaff et al., arXiv:1905.09272, section 4.1 and appendix. The papers do not say how they pad and what
    replaces dropped channels. Here it is the mean color, 0 after normalization.

    Two parts of the augmentation of CPC v2 are missing: elastic deformations, and the color operations of
    AutoAugment except brightness, contrast, saturation and solarization (posterization, equalization,
    sharpness and so on). Every patch is rotated and sheared, if these settings are above 0. We could not
    verify how often and how strongly the paper does this.
    """
    check_values(
        "patches",
        ("rotation", rotation, 0 <= rotation <= 180, "an angle from 0 to 180 degrees"),
        ("shear", shear, 0 <= shear < 1, "a factor of at least 0 and less than 1"),
        ("patch", patch, patch >= 1, "a side of at least 1 pixel"),
        ("stride", stride, stride >= 1, "at least 1 pixel"),
    )
    rows, columns = (_count(side, patch, stride) for side in image_shape[1:])
    sub_crop = patch if sub_crop is None else sub_crop
    return PatchLayout(
        image_shape=image_shape,
        shape=(rows, columns),
        cell=(patch, patch),
        step=(stride, stride),
        first=(0, 0),
        sub_crop=sub_crop,
        size=patch,
        shuffled=False,
        settings=_checked(settings, sub_crop, patch, color_dropping, image_shape[0]),
        color_dropping=color_dropping,
        rotation=rotation,
        shear=shear,
    )


def jigsaw_layout(
    image_shape: tuple[int, int, int],
    *,
    sub_crop: int | None = None,
    settings: ViewSettings | None = None,
    color_dropping: float = 0.0,
) -> PatchLayout:
    """Return the layout of a jigsaw: nine cells, a random sub-crop of each, in random order (PIRL).

    The cells are the largest equal ones in the center of the view.

    Args:
        image_shape: channels, height and width of the views.
        sub_crop: side of a sub-crop in pixels. None uses the paper's ratio: 64 for cells of 85 pixels.
        settings, color_dropping: as in `grid_layout`. The code of PyContrast has neither. VISSL changes the
            colors of each patch independently.

    Raises:
        UserError: a cell is smaller than the sub-crop, or a setting is outside its limits.

    Source: Misra and van der Maaten, arXiv:1912.01991, section 3.2 and appendix (views of 255 pixels).
    """
    channels, height, width = image_shape
    cell = (height // JIGSAW_SIDE, width // JIGSAW_SIDE)
    if sub_crop is None:
        sub_crop = min(cell) * _PAPER_SUB_CROP // _PAPER_CELL
        if sub_crop < 1:
            raise UserError(
                f"views.size: expected at least 6 pixels for a jigsaw of nine cells, got {height} x {width}"
            )
    return PatchLayout(
        image_shape=image_shape,
        shape=(JIGSAW_SIDE, JIGSAW_SIDE),
        cell=cell,
        step=cell,
        first=((height - JIGSAW_SIDE * cell[0]) // 2, (width - JIGSAW_SIDE * cell[1]) // 2),
        sub_crop=sub_crop,
        size=sub_crop,
        shuffled=True,
        settings=_checked(settings, sub_crop, min(cell), color_dropping, channels),
        color_dropping=color_dropping,
    )


def sample_patches(seeds: UInt64Array, layout: PatchLayout) -> Tensor:
    """Sample the parameters of all patches. Those of an image depend only on its seed and on the layout.

    Args:
        seeds: (B,) uint64, from `hf_ssl.random.image_seeds`.
        layout: of the patches.

    Returns:
        (B, P, len(PATCH_COLUMNS)) float32 on the CPU. Whole numbers up to 2**24 are exact. In a jigsaw, the
        patches have their random order, and the column `cell` contains the permutation.
    """
    seeds, count = np.asarray(seeds, np.uint64), layout.num_patches
    first = _FIRST_JIGSAW_NUMBER if layout.shuffled else _FIRST_GRID_NUMBER
    # The stream of patch p is that of the image, from position p * _NUMBERS_PER_PATCH on.
    shift = np.arange(count, dtype=np.uint64) * np.uint64(_NUMBERS_PER_PATCH) * GOLDEN
    streams = (seeds[:, None] + shift).flatten()
    numbers = uniforms(streams, first, _CHANGES.stop)
    cell = np.tile(np.arange(count), len(seeds))
    down, right = (
        number * (side - layout.sub_crop + 1)
        for number, side in zip(numbers[:, _POSITION].T, layout.cell, strict=True)
    )
    whether, which = numbers[:, _DROPPING].T
    columns = (
        cell,
        layout.first[0] + cell // layout.shape[1] * layout.step[0] + np.floor(down),
        layout.first[1] + cell % layout.shape[1] * layout.step[1] + np.floor(right),
        np.where(whether < layout.color_dropping, 1 + np.floor(3 * which), 0),
    )
    changes = sample_changes(numbers[:, _CHANGES], layout.settings or _NO_CHANGES)
    affine = np.zeros((len(streams), 3))
    if layout.is_affine:
        affine = 2 * uniforms(streams, first + _AFFINE.start, 3) - 1
        affine *= (layout.rotation, layout.shear, layout.shear)
    table = np.concatenate((np.stack(columns, axis=1), changes, affine), axis=1).astype(np.float32)
    table = table.reshape(len(seeds), count, len(PATCH_COLUMNS))
    if layout.shuffled:
        order = np.argsort(uniforms(seeds, first + count * _NUMBERS_PER_PATCH, count), axis=1, kind="stable")
        table = np.take_along_axis(table, order[:, :, None], axis=1)
    return torch.from_numpy(table)


@torch.no_grad()
def cut_patches(
    images: Tensor, layout: PatchLayout, table: Tensor, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Return the patches of a batch of views, without gradient. Equal input gives equal patches.

    The steps are sub-crop, flip, color jitter, the operations of `hf_ssl.views.operations.OPERATIONS`,
    rotation and shear, color dropping and padding. Colors are changed before normalization: the pixels of the
    views are converted to [0, 1] and back. Without settings, rotation and shear in the layout, the patches
    contain exactly the pixels of the views.

    Args:
        images: (B, C, H, W) views, normalized.
        layout: of the patches.
        table: from `sample_patches` for these images. If it is on a device, the host waits for its copy.
        mean, std: of the normalization, one number for each channel.

    Returns:
        (B, rows, columns, C, size, size) for a grid and (B, 9, C, size, size) for a jigsaw, in the type of
        the views.

    Raises:
        ValueError: the views do not have the layout's shape, or the table is not for these images.
    """
    channels = layout.image_shape[0]
    if images.shape[1:] != layout.image_shape:
        raise ValueError(
            f"images: expected views {layout.image_shape}, the shape of the layout, got "
            f"{tuple(images.shape[1:])}"
        )
    if table.shape != (len(images), layout.num_patches, len(PATCH_COLUMNS)):
        raise ValueError(
            f"table: expected the parameters of {layout.num_patches} patches of {len(images)} images, got "
            f"the shape {tuple(table.shape)}"
        )
    sampled = dict(zip(PATCH_COLUMNS, table.cpu().numpy().reshape(-1, len(PATCH_COLUMNS)).T, strict=True))
    with torch.autocast(images.device.type, enabled=False):
        if layout.settings is None:
            patches = _cut(images, sampled, np.arange(sampled["cell"].size), layout)
        else:
            rows = sort_for_jitter(sampled)
            mean_C11, std_C11 = (
                to_device(np.array(values, np.float32)[:, None, None], images.device)
                for values in (mean, std)
            )
            patches = _cut(images, sampled, rows, layout).float().mul_(std_C11).add_(mean_C11)
            patches = change_pixels(patches, sampled, rows, layout.settings)
            patches = patches.sub_(mean_C11).div_(std_C11).to(images.dtype)
        if layout.is_affine:
            patches = rotate_and_shear(patches, sampled["turn"], sampled["shear_x"], sampled["shear_y"])
    if layout.color_dropping:
        kept = sampled["channel"][:, None]
        kept = (kept == 0) | (kept == np.arange(1, channels + 1))
        patches *= to_device(kept, images.device)[:, :, None, None]
    missing = layout.size - layout.sub_crop
    if missing:
        before, after = missing // 2, missing - missing // 2
        patches = pad(patches, (before, after, before, after))
    shape = (layout.num_patches,) if layout.shuffled else layout.shape
    return patches.view(len(images), *shape, channels, layout.size, layout.size)


def rotate_and_shear(
    pixels: Tensor, turn: NDArray[np.float32], shear_x: NDArray[np.float32], shear_y: NDArray[np.float32]
) -> Tensor:
    """Return square images (N, C, S, S) that are rotated and sheared around their centers (bilinear).

    The pixel at the offset (x, y) from the center has the value of the original image at the offset
    R (x + shear_x y, y + shear_y x), where R is the rotation by `turn`. Outside of the original image, the
    value is 0.

    Args:
        pixels: (N, C, S, S). Half precision is computed in float32.
        turn: (N,) degrees. Positive angles turn the content counterclockwise.
        shear_x, shear_y: (N,) factors.
    """
    shear = np.tile(np.eye(2), (len(turn), 1, 1))
    shear[:, 0, 1], shear[:, 1, 0] = shear_x, shear_y
    exact = pixels if pixels.dtype == torch.float64 else pixels.float()
    return mapped(exact, rotations(np.deg2rad(turn.astype(np.float64))) @ shear, "zeros").to(pixels.dtype)


def enlarged(pixels: Tensor, factor: int) -> Tensor:
    """Return pixels (..., C, H, W) with sides that are `factor` times as long (bilinear).

    Backbones with a large stride cannot encode small patches. A method enlarges patches and whole images by
    the same factor, so that the objects in both have the same size.
    """
    if factor == 1:
        return pixels
    size = [side * factor for side in pixels.shape[-2:]]
    flat = pixels.reshape(-1, *pixels.shape[-3:])
    larger = interpolate(flat, size, mode="bilinear", align_corners=False)
    return larger.view(*pixels.shape[:-2], *size)


@torch.no_grad()
def reduced(pixels: Tensor, factor: int) -> Tensor:
    """Return the original pixels (..., C, H, W) of pixels that `enlarged` has enlarged, up to rounding.

    For an odd factor, each original pixel is one of the enlarged pixels. For an even factor, it lies halfway
    between two enlarged pixels. The values on each side of it are linear. So the two nearest enlarged pixels
    on one side give the original value exactly.

    Args:
        pixels: the result of `enlarged`.
        factor: the factor of the enlargement.
    """
    if factor == 1:
        return pixels
    for dim in (-2, -1):
        last = pixels.shape[dim] - 1
        index = torch.arange(factor // 2, last + 1, factor, device=pixels.device)
        near = pixels.index_select(dim, index)
        if factor % 2 == 0:  # the nearest enlarged pixel is half a step away, and the next one a step more
            near = near + (near - pixels.index_select(dim, (index + 1).clamp_(max=last))) / 2
        pixels = near
    return pixels


def _cut(images: Tensor, sampled: Sampled, rows: NDArray[np.int64], layout: PatchLayout) -> Tensor:
    """Return the sub-crops (N, C, S, S) in the order `rows`, flipped according to the table."""
    (channels, height, width), side = layout.image_shape, layout.sub_crop
    top, left, flip = (sampled[name][rows].astype(np.int64) for name in ("top", "left", "flip"))
    image = rows // layout.num_patches
    if flip.any():
        # A flipped sub-crop is a sub-crop of the flipped image.
        image, left = image + flip * len(images), np.where(flip, width - side - left, left)
        images = torch.cat((images, images.flip(3)))
    # Windows (C, S, S) that begin at each pixel share the memory of the images. Copying a window is faster
    # than gathering its pixels.
    plane = height * width
    last = images.numel() - (channels - 1) * plane - (side - 1) * (width + 1)
    windows = images.contiguous().as_strided((last, channels, side, side), (1, plane, width, 1))
    corner = image * channels * plane + top * width + left
    return windows.index_select(0, to_device(corner, images.device))


def _count(side: int, patch: int, stride: int) -> int:
    """Return the number of patches along a side of the view."""
    count, rest = divmod(side - patch, stride)
    if count < 1:
        raise UserError(
            f"views.size: expected at least two patches per row, {patch} + {stride} = {patch + stride} "
            f"pixels, got {side}"
        )
    if rest:
        raise UserError(
            f"views.size: expected a side that patches of {patch} pixels with stride {stride} cover, such as "
            f"{side - rest} or {side - rest + stride}, got {side}"
        )
    return count + 1


def _checked(
    settings: ViewSettings | None, sub_crop: int, cell: int, color_dropping: float, channels: int
) -> ViewSettings | None:
    """Return the settings for sub-crops of this side.

    Raises:
        UserError: a setting is outside its limits.
    """
    check_values(
        "patches",
        ("sub_crop", sub_crop, 1 <= sub_crop <= cell, f"1 to {cell} pixels, the side of a cell"),
        color_probability("color_dropping", color_dropping, channels),
    )
    if settings is None:
        return None
    settings = replace(settings, size=sub_crop)
    settings.blur_kernel = settings.blur_kernel_size
    check_settings(settings, None, "patches", channels)
    return settings
