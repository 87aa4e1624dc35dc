# SPDX-License-Identifier: Apache-2.0
"""PIRL: pretext-invariant representation learning (arXiv:1912.01991).

Legend: B images, T transformed images (1, or 2 with both pretexts), C channels, H, W sides of a view, S side
of a patch, D width of the features, P width of the projections, K negatives.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.losses import memory_nce, memory_scores, memory_softmax
from hf_ssl.losses.upcasting import upcast
from hf_ssl.methods.pirl.configuration_pirl import PRETEXTS, PIRLConfig
from hf_ssl.modeling.backbones import check_image_sizes, encode, feature_size, input_channels
from hf_ssl.modeling.configuration import check_fields, patch_sides
from hf_ssl.modeling.eval_mode import copy_without_values
from hf_ssl.modeling.heads import MLPHead
from hf_ssl.modeling.memory_bank import MemoryBankModel, NCEConstants
from hf_ssl.modeling.outputs import SSLOutput
from hf_ssl.random import FIRST_METHOD_NUMBER, uniforms
from hf_ssl.views import PatchLayout, ViewPreset, cut_patches, jigsaw_layout, sample_patches
from hf_ssl.views.patches import JIGSAW_SIDE

_EPSILON = 2.0**-23  # VISSL adds it to the denominators of the NCE loss
_FIRST_ROTATION_NUMBER = FIRST_METHOD_NUMBER + 2**40  # after the negatives
_CELLS = JIGSAW_SIDE**2
_LARGE_SIDE = 256


class PIRLForPreTraining(MemoryBankModel):
    """An image and its transformed version become similar to the image's row in a memory bank.

    The transformed version is a jigsaw: the backbone encodes nine patches of the view separately, and a head
    maps the concatenation of their projections. It can also be a rotation. Random rows of the bank are the
    negatives. The loss is lambda * L(m, g(transformed)) + (1 - lambda) * L(m, f(image)), where m is the row
    of the image. Each row is a moving average of f(image). Transformed images never enter the bank.

    The jigsaw is cut from the last view of an image. With one view, image and jigsaw have the same crop. With
    two views, the second can have other settings (`views.second`). Both public codes use crops with 60 % of
    the area or more. Cells and sub-crops are proportional to the view. In both codes, they have 85 and 64
    pixels in views of 255 pixels.

    The backbone encodes the images and the patches in two batches, so BatchNorm has separate statistics for
    both. Its running statistics are averages over both.

    No public code combines both pretexts. The mean of both terms is our choice.
    """

    config_class = PIRLConfig
    maximum_views = 2
    mask_inputs = ("patch_parameters", "rotations", "draw_seeds")
    memory_inputs = ("projections", "transformed", "sample_index", "draw_seeds")

    def __init__(self, config: PIRLConfig) -> None:
        super().__init__(config)
        self.pretexts = PRETEXTS[config.pretext]
        width, size = feature_size(self.backbone), config.projection_size
        hidden = [] if config.head == "linear" else [config.projection_hidden_size or width]

        def head() -> MLPHead:
            return MLPHead([width, *hidden, size], norm=False, last_bias=True)

        self.projector = head()
        if "jigsaw" in self.pretexts:
            self.layout = _layout(config)
            self.patch_size = config.patch_size or _side_for_encoder(self.backbone, self.layout)
            check_image_sizes(self.backbone, [self.patch_size], self.layout.image_shape[0])
            layers = [head(), nn.ReLU()] if config.head == "vissl_mlp" else [head()]
            self.patch_projector = nn.Sequential(*layers)
            self.jigsaw_projector = nn.Linear(_CELLS * size, size)
        if "rotation" in self.pretexts:
            self.rotation_projector = head()
        self.bank = self.make_bank(size)
        self.constants = NCEConstants(1, config.temperature)
        self.post_init()

    def sample_masks(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the seeds of the negatives and the parameters of the pretexts.

        These are `patch_parameters` (B, 9, columns) of the jigsaw, and `rotations` (B,), quarter turns.
        """
        sampled = super().sample_masks(seeds)
        if "jigsaw" in self.pretexts:
            sampled["patch_parameters"] = sample_patches(seeds, self.layout)
        if "rotation" in self.pretexts:
            turns = np.floor(4 * uniforms(seeds, _FIRST_ROTATION_NUMBER, 1)[:, 0])
            sampled["rotations"] = torch.from_numpy(turns.astype(np.int64))
        return sampled

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return unit projections of images (B, P) and of transformed images (B, T, P), row numbers, seeds.

        Raises:
            ValueError: row numbers, seeds or the parameters of a pretext are missing.
        """
        embeddings, source = self.embed_images(inputs), inputs["pixel_values"][:, -1]
        transformed = [self._transformed(pretext, source, inputs) for pretext in self.pretexts]
        return embeddings | {"transformed": normalize(upcast(torch.stack(transformed, dim=1)), dim=-1)}

    def embed_images(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return unit projections of images (B, P), row numbers and seeds. The memory bank needs no more.

        Raises:
            ValueError: row numbers or seeds are missing.
        """
        keys = self.image_keys(inputs)
        image = self.projector(encode(self.backbone, inputs["pixel_values"][:, 0]))
        return keys | {"projections": normalize(upcast(image), dim=-1)}

    def _transformed(self, pretext: str, images: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """Return the projections (B, P) of images (B, C, H, W) after a pretext transformation."""
        name = {"jigsaw": "patch_parameters", "rotation": "rotations"}[pretext]
        if name not in inputs:
            raise ValueError(f"{name}: expected numbers for each image, got none; pass **sample_masks(seeds)")
        if pretext == "jigsaw":
            return self.project_patches(encode(self.backbone, self._patches(images, inputs[name])))
        return self.rotation_projector(encode(self.backbone, rotate(images, inputs[name])))

    def _patches(self, images: Tensor, table: Tensor) -> Tensor:
        """Return the patches (B * 9, C, S, S) of images, resized for the encoder."""
        preset = ViewPreset.from_dict(self.config.views or {})
        patches = cut_patches(images, self.layout, table, mean=preset.mean, std=preset.std).flatten(0, 1)
        if patches.shape[-1] == self.patch_size:
            return patches
        size = [self.patch_size] * 2
        return interpolate(patches, size, mode="bilinear", align_corners=False)

    def project_patches(self, features: Tensor) -> Tensor:
        """Return the projections (B, P) of jigsaws from the features (B * 9, D) of their patches."""
        projected = self.patch_projector(features).unflatten(0, (-1, _CELLS))
        return self.jigsaw_projector(projected.flatten(1))

    def scores(self, anchors_BP: Tensor, embeddings: dict[str, Tensor], term: int) -> tuple[Tensor, Tensor]:
        """Return the cosines (B,) with the row of each image, and (B, K) with random rows.

        Args:
            anchors_BP: unit projections.
            embeddings: `sample_index` and `draw_seeds` of the images.
            term: number of the term of the loss. In VISSL, each term has its own random rows.
        """
        draw = 0 if self.config.loss == "pycontrast" else term
        negatives_BK = self.bank.draw(embeddings["draw_seeds"], self.config.negatives, draw)
        indices = torch.cat((embeddings["sample_index"][:, None], negatives_BK), dim=1)
        scores = memory_scores(anchors_BP, self.bank.rows, indices)
        return scores[:, 0], scores[:, 1:]

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return lambda * the mean loss of transformed images + (1 - lambda) * the loss of images."""
        images, transformed = embeddings["projections"], embeddings["transformed"].unbind(1)
        pairs = [self.scores(each, embeddings, term) for term, each in enumerate((*transformed, images))]
        if self.config.loss == "vissl":
            rows = len(self.bank.rows)
            # The first transformed term sets the constant, as in VISSL.
            z = self.constants.get(0, *pairs[0], num_rows=rows)
            temperature = self.config.temperature
            losses = [
                memory_nce(*pair, num_rows=rows, z=z, temperature=temperature, epsilon=_EPSILON)
                for pair in pairs
            ]
        else:
            losses = [memory_softmax(*pair, temperature=self.config.temperature) for pair in pairs]
        weight = self.config.pretext_weight
        loss = weight * torch.stack(losses[:-1]).mean() + (1 - weight) * losses[-1]
        terms = dict(zip((*self.pretexts, "image"), (each.detach() for each in losses), strict=True))
        return SSLOutput(loss=loss, terms=terms, embeddings=torch.stack((images, *transformed), dim=1))

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Keep the images for the memory bank, and the constant of the first batch."""
        if self.config.loss == "vissl" and not self.constants.are_set:
            pair = self.scores(embeddings["transformed"][:, 0], embeddings, term=0)
            self.constants.update(pair, num_rows=len(self.bank.rows))
        super().update_memory(embeddings)

    def update_banks(self, embeddings: dict[str, Tensor]) -> None:
        """Keep the images for the memory bank."""
        self.bank.update(embeddings["sample_index"], embeddings["projections"])


def rotate(images: Tensor, rotations: Tensor) -> Tensor:
    """Return images (B, C, H, W) after `rotations` (B,) counterclockwise quarter turns.

    If the rotations are on a device, the host waits for their copy.
    """
    rotated, turns = images.clone(), rotations.tolist()
    for turn in (1, 2, 3):
        chosen = [number for number, each in enumerate(turns) if each == turn]
        if chosen:
            index = torch.tensor(chosen).to(images.device, non_blocking=True)
            rotated[index] = images[index].rot90(turn, (2, 3))
    return rotated


def _layout(config: PIRLConfig) -> PatchLayout:
    """Return the layout of the jigsaw in a view.

    Raises:
        UserError: a cell is smaller than the sub-crop, or the settings do not fit such small patches.
    """
    preset = ViewPreset.from_dict(config.views or {})
    settings = None
    if config.patch_augmentation:
        settings = replace(preset.expand()[0], blur_kernel=preset.blur_kernel)
    channels = input_channels(config.backbone_config)
    shape, sub_crop = (channels, preset.final_size, preset.final_size), config.sub_crop
    if sub_crop is not None:
        cell = preset.size // JIGSAW_SIDE
        fits = 1 <= sub_crop <= cell
        check_fields(("sub_crop", sub_crop, fits, f"1 to {cell} pixels, the side of a cell"))
        sub_crop = sub_crop * preset.final_size // preset.size  # the jigsaw is cut from enlarged views
    return jigsaw_layout(shape, sub_crop=sub_crop, settings=settings)


def _side_for_encoder(backbone: PreTrainedModel, layout: PatchLayout) -> int:
    """Return the side of patches for the encoder: see `PIRLConfig.patch_size`."""
    unit = max(patch_sides(backbone.config))
    return -(-max(layout.size, _stride(backbone, layout.image_shape[0])) // unit) * unit


def _stride(backbone: PreTrainedModel, channels: int) -> int:
    """Return how many pixels a position of the last feature map covers; 1 for encoders without such a map."""
    images = torch.empty(1, channels, _LARGE_SIDE, _LARGE_SIDE, device="meta")
    try:
        hidden = copy_without_values(backbone)(pixel_values=images).last_hidden_state
    except (RuntimeError, ValueError):  # a transformer for one size, or operations that depend on values
        return 1
    return _LARGE_SIDE // hidden.shape[-1] if hidden.ndim == 4 else 1


AutoModelForPreTraining.register(PIRLConfig, PIRLForPreTraining)
