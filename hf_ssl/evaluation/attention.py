# SPDX-License-Identifier: Apache-2.0
"""Attention maps of vision transformers and their pictures: maps and masks over images, patches as colors.

Legend: B images, C channels, H, W pixels, h, w rows and columns of patches, A heads, S special tokens (class
token, distillation token, registers), T = S + h * w tokens, Q queries, D features.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_ssl.data.decode import as_pillow, read_photo
from hf_ssl.errors import UserError
from hf_ssl.evaluation.features import load_encoder, pixel_values
from hf_ssl.files import replaced_file
from hf_ssl.modeling.backbones import input_channels, normalization
from hf_ssl.modeling.configuration import patch_sides, size_arguments
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.image_encoders import image_encoder
from hf_ssl.modeling.parallel_encoders import ParallelEncoders
from hf_ssl.modeling.pooling import has_class_token
from hf_ssl.names import renamed_arguments


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of one layer; its query is the class token or, without one, the mean of the patches.

    Attributes:
        heads: (B, A, h, w) float32 on the CPU, the weight of each patch. The weights of a head in `heads` and
            `special` sum to 1.
        special: (B, A, S), the weights of the special tokens, which the maps do not show.
        rollout: (B, h, w), the attention through all layers; see `attention_rollout`.
        patches: (B, h, w, D), the patch features of the last layer; see `pca_colors`.
        query: "class token" or "mean of the patches".
    """

    heads: Tensor
    special: Tensor
    rollout: Tensor
    patches: Tensor
    query: str

    @property
    def mean(self) -> Tensor:
        """Return the mean over the heads (B, h, w)."""
        return self.heads.mean(dim=1)


def has_attention(model: nn.Module) -> bool:
    """Return whether `attention_maps` supports an encoder.

    In a supported encoder, each token attends to all tokens of one patch grid in every layer. These are ViT,
    DeiT, DINOv2 (also with registers), DINOv3, I-JEPA, MAE, MSN and BEiT of transformers. Convolutional
    networks and models with window attention (Swin) are not supported. Models of timm are not supported,
    because they do not return attention weights.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    config = model.config.to_dict()
    return (
        "attentions" in (type(model)._can_record_outputs or {})
        and bool(config.get("patch_size"))
        and len(set(patch_sides(model.config))) == 1
        and all(isinstance(config.get(key), int) for key in ("num_attention_heads", "num_hidden_layers"))
    )


def attention_maps(model: nn.Module, images: Tensor, *, layer: int = -1) -> AttentionMaps:
    """Return the attention maps of one layer, computed in evaluation mode and without gradient.

    The maps need the attention implementation "eager", because SDPA returns no attention weights. The call
    does not change the encoder's attention implementation, training flags or weights. The rollout needs the
    attention weights of all layers, which take 4 * A * T * T bytes per layer and image.

    Args:
        model: an encoder that `has_attention` supports.
        images: (B, C, H, W) float, normalized as by the encoder's processor. H and W can have any size of at
            least one patch, because the position embeddings are interpolated.
        layer: number of the layer, from 0. Negative numbers count from the last layer.

    Raises:
        UserError: the encoder has no attention maps or no such layer, or the images have a wrong shape.
    """
    encoder = _with_attention(cast(nn.Module, image_encoder(model)))
    grid = _patch_grid(encoder, images)
    layers: int = encoder.config.num_hidden_layers
    if not -layers <= layer < layers:
        raise UserError(f"layer: expected a number from {-layers} to {layers - 1}, got {layer}")
    images = images.to(next(encoder.parameters()))  # to its device and precision
    with evaluation_mode(encoder), eager_attention(encoder):
        outputs = encoder(images, output_attentions=True, **size_arguments(encoder, images))
    # The clones are normal tensors on the CPU, so that a caller can compute gradients with them.
    attentions = [weights.float().cpu().clone() for weights in outputs.attentions]
    features = outputs.last_hidden_state.float().cpu().clone()
    return _maps(attentions, features, layer, grid, has_class_token(encoder))


def attention_rollout(attentions: Sequence[Tensor], query_BQT: Tensor | None = None) -> Tensor:
    """Return the attention rollout, the share of each input token in each query of the last layer.

    The rollout assumes that only attention mixes tokens. Layer l is M_l = 0.5 * A_l + 0.5 * I, where A_l is
    the mean over heads and I represents the residual connection. Its rows sum to 1.
    The rollout is M_L ... M_2 M_1.

    Args:
        attentions: attention weights of each layer (B, A, T, T), first layer first.
        query_BQT: weights over the output tokens. Few queries need much less computation than the complete
            matrix. None: each token is a query.

    Returns:
        (B, Q, T) or (B, T, T). Each row has the same sum as its query.

    Source: Abnar and Zuidema 2020, arXiv:2005.00928, section 3.
    """
    first = attentions[0]
    batch, tokens = first.shape[0], first.shape[-1]
    rows = torch.eye(tokens).expand(batch, -1, -1) if query_BQT is None else query_BQT
    for weights_BATT in reversed(attentions):
        rows = 0.5 * rows @ weights_BATT.mean(dim=1) + 0.5 * rows
    return rows


def threshold_attention(maps: Tensor, mass: float = 0.6) -> Tensor:
    """Return the mask of the smallest set of patches that contains a given share of the attention.

    Args:
        maps: (..., h, w), not negative.
        mass: share in (0, 1]. The pictures of the DINO paper use 0.6.

    Returns:
        bool (..., h, w).

    Raises:
        UserError: `mass` is outside (0, 1].

    Source: Caron et al. 2021, arXiv:2104.14294, figure 4 and visualize_attention.py of the authors.
    """
    if not 0 < mass <= 1:
        raise UserError(f"mass: expected a share of the attention above 0 and at most 1, got {mass}")
    flat = maps.flatten(-2).double()
    values, order = flat.sort(dim=-1, descending=True)
    before = values.cumsum(dim=-1) - values  # sum over the patches with larger weights
    kept = before < mass * flat.sum(dim=-1, keepdim=True) * (1 - 1e-6)  # tolerance for an exact share
    return torch.zeros_like(kept).scatter(-1, order, kept).reshape(maps.shape)


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


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switch to eager attention, which returns its weights, inside the block."""
    implementation: str = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def patch_size(model: nn.Module) -> int:
    """Return the side of a patch in pixels.

    Raises:
        UserError: the encoder has no attention maps.
    """
    return patch_sides(_with_attention(model).config)[0]


def _with_attention(model: nn.Module) -> PreTrainedModel:
    if isinstance(model, ParallelEncoders):
        raise UserError(
            "model: expected one vision transformer, got an encoder of several narrow ones, which have no "
            "common attention maps; train with another method for them"
        )
    if not has_attention(model):
        raise UserError(
            "model: expected a vision transformer of transformers such as ViTModel, Dinov2Model, "
            f"DINOv3ViTModel or IJepaModel, got {type(model).__name__}, which has no attention maps"
        )
    return cast(PreTrainedModel, model)


def _patch_grid(model: PreTrainedModel, images: Tensor) -> tuple[int, int]:
    channels, side = input_channels(model.config), patch_size(model)
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < side:
        raise UserError(
            f"images: expected (B, {channels}, H, W) with at least {side} x {side} pixels (one patch), got "
            f"{tuple(images.shape)}"
        )
    return images.shape[2] // side, images.shape[3] // side


def _maps(
    attentions: list[Tensor], features: Tensor, layer: int, grid: tuple[int, int], class_token: bool
) -> AttentionMaps:
    batch, _, tokens, _ = attentions[0].shape
    special = tokens - grid[0] * grid[1]
    if special < 0 or features.shape[1] != tokens:
        raise UserError(f"model: expected {grid[0]} x {grid[1]} patches in its output, got {tokens} tokens")
    query = torch.zeros(batch, 1, tokens)
    if class_token:
        query[..., 0] = 1
    else:
        query[..., special:] = 1 / (tokens - special)
    weights = (query[:, None] @ attentions[layer]).squeeze(2)
    rollout = attention_rollout(attentions, query).squeeze(1)
    return AttentionMaps(
        heads=weights[..., special:].unflatten(-1, grid),
        special=weights[..., :special],
        rollout=rollout[..., special:].unflatten(-1, grid),
        patches=features[:, special:].unflatten(1, grid),
        query="class token" if class_token else "mean of the patches",
    )


SHOWN_SIDE = 320  # smallest shorter edge of the pictures in pixels
OVERVIEW_HEIGHT = 128
COLORS = "inferno"
OPACITY = 0.65


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


def write_attention_pictures(
    model: str, photos: Sequence[Path], folder: Path, *, layer: int = -1, size: int | None = None
) -> list[Path]:
    """Write the pictures of each photo as PNG files into one subfolder of `folder` per photo.

    The file `overview.png` in `folder` shows all pictures side by side.

    Args:
        model: a folder or a Hub id.
        photos: picture files. If several files have the same name, the folders after the first get a number.
        layer, size: see `attention_pictures`.

    Returns:
        The folders of the photos.

    Raises:
        UserError: the encoder does not exist or has no attention maps, or a file is not a picture.
    """
    encoder, processor = load_encoder(model)
    patch_size(encoder)  # raises for an unsupported encoder before any photo is read
    written: list[Path] = []
    rows: list[dict[str, Image.Image]] = []
    for photo in photos:
        try:
            pixels = read_photo(photo, channels=input_channels(encoder.config))
        except (UserError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
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
