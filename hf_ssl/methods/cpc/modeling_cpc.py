# SPDX-License-Identifier: Apache-2.0
"""CPC: contrastive predictive coding for images (arXiv:1807.03748, section 3.2; v2: arXiv:1905.09272).

Legend: B images, R rows and W columns of the grid of patches, G = R * W, T directions, K prediction steps,
D width of the encodings, P width of predictions and targets, M candidates of a prediction.
"""

import logging
import math
from typing import Any

import numpy as np
import torch
import transformers.initialization as init
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.errors import UserError
from hf_ssl.losses import cpc_info_nce
from hf_ssl.methods.cpc.configuration_cpc import CPCConfig
from hf_ssl.modeling.backbones import (
    check_image_sizes,
    encode,
    feature_size,
)
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.batch_norm import batch_norms
from hf_ssl.modeling.outputs import SSLOutput
from hf_ssl.random import FIRST_METHOD_NUMBER, uniforms
from hf_ssl.views import cut_patches, enlarged, reduced, sample_patches

logger = logging.getLogger(__name__)

# On a CPU, patches are encoded in parts, so that activations stay in the cache: about a sixth less time.
_CPU_PIXELS, _LEAST_PATCHES = 2**14, 64
_LARGEST_FACTOR = 32  # of an enlargement that an error message recommends


class CPCForPreTraining(SSLPreTrainedModel):
    """Contexts predict the encodings of the patches below them. Other patches are the negatives.

    The view is cut into a grid of overlapping patches. The backbone encodes each patch separately. A context
    network of masked convolutions receives the row of a patch and the rows above it. One linear map per step
    k predicts the encoding k + `skip_step` rows below. InfoNCE compares the prediction with its own target
    and with negatives. These are all other patches of the batch, or sampled ones.

    The loss is the mean over steps and directions. For each step, the term `information_step_k` is
    log M - loss, a lower bound of the mutual information of contexts and targets, in nats.

    All directions share encoder, context network and targets. Each direction has its own prediction maps, as
    in rschwarz15/CPCV2-PyTorch. That code applies the maps to the targets, which gives the same scores. It
    and Greedy InfoMax use `projection_size=None`, `prediction_scale=1`, `negatives=16` and the gated context.

    The published encoder receives whole images, enlarged by the same factor as the patches. The papers'
    linear classification uses the mean over the grid of patches. The evaluation measures both features.

    BatchNorm in the encoder uses statistics of all patches of an image, so an encoding contains information
    about the other patches. Therefore the papers use no normalization, or LayerNorm. ConvNeXt V2 has
    LayerNorm.
    """

    config_class = CPCConfig
    couples_samples = True
    minimum_views = 1
    maximum_views = 1
    mask_inputs = ("patch_parameters", "noise")

    def __init__(self, config: CPCConfig) -> None:
        super().__init__(config)
        self.layout = layout = config.layout
        _check_patches(self.backbone, config)
        self.has_batch_norm = bool(batch_norms(self.backbone))
        if self.has_batch_norm:
            logger.warning(
                "backbone.model_type: expected an encoder without BatchNorm for CPC, got %s; BatchNorm mixes "
                "the patches of an image, so that predictions can use statistics instead of content; use "
                "convnextv2", self.backbone.config.model_type,
            )  # fmt: skip
        width = feature_size(self.backbone)
        projected = config.projection_size or width
        gated = config.context == "gated"
        self.context = (
            GatedContext(width, config.context_layers)
            if gated
            else ResidualContext(width, config.context_hidden_size, config.context_layers)
        )
        has_targets = config.projection_size is not None
        # A bias of the targets would change all scores of a prediction equally, and so not the loss.
        self.target = nn.Linear(width, projected, bias=False) if has_targets else nn.Identity()
        self.predictors = nn.ModuleList(
            nn.Linear(width, config.prediction_steps * projected, bias=has_targets)
            for _ in range(config.directions)
        )
        self._fixed_table = None if layout.is_random else sample_patches(np.zeros(1, np.uint64), layout)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, ContextNetwork):
            # torch's initialization, which the public implementations use. Chains of layers with the small
            # weights of transformers would return contexts near zero.
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    bound = 1 / math.sqrt(layer.weight[0].numel())
                    init.uniform_(layer.weight, -bound, bound)

    def sample_masks(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the random numbers of images.

        `patch_parameters` (B, G, columns) describe the places and the augmentation of the patches. They are
        missing if all patches are cut without random changes. `noise` (B, N) in [0, 1) selects the negatives.
        It is missing without the setting `negatives`.
        """
        sampled = {}
        if self._fixed_table is None:
            sampled["patch_parameters"] = sample_patches(seeds, self.layout)
        if self.config.negatives is not None:
            noise = uniforms(seeds, FIRST_METHOD_NUMBER, self._noise_numbers())
            sampled["noise"] = torch.from_numpy(noise).float()
        return sampled

    @property
    def patch_grid(self) -> list[int]:
        """Return side and distance of the patches in pixels of the encoder's input."""
        return [side * self.config.enlargement for side in (self.config.patch, self.config.stride)]

    def _noise_numbers(self) -> int:
        """Return how many numbers select the negatives of an image: for each direction, step and position."""
        shape = (self.config.directions, self.config.prediction_steps, self.layout.num_patches)
        return math.prod(shape) * (self.config.negatives or 0)

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return predictions (B, T, K, G, P), targets (B, R, W, P) and, with `negatives`, the noise.

        Without `patch_parameters` or `noise`, they are sampled from torch's global generator.
        """
        images = inputs["pixel_values"][:, 0]
        embeddings = self.predict(self.encode_grid(images, inputs.get("patch_parameters")))
        if self.config.negatives is not None:
            noise = inputs.get("noise")
            if noise is None:
                noise = torch.rand(len(images), self._noise_numbers(), device=images.device)
            embeddings["noise"] = noise
        return embeddings

    def encode_grid(self, images: Tensor, patch_parameters: Tensor | None = None) -> Tensor:
        """Return the encodings (B, R, W, D) of the patches of images (B, C, H, W).

        Args:
            images: normalized views, enlarged by `config.enlargement`.
            patch_parameters: (B, G, columns), best on the CPU: see `hf_ssl.views.cut_patches`.
        """
        factor, preset = self.config.enlargement, self.config.preset
        if self._fixed_table is not None:
            patch_parameters = self._fixed_table.expand(len(images), -1, -1)
        elif patch_parameters is None:
            seeds = torch.randint(torch.iinfo(torch.int64).max, (len(images),))
            patch_parameters = sample_patches(seeds.numpy().astype(np.uint64), self.layout)
        # Patches are cut before they are enlarged. So no patch contains interpolated pixels of its neighbors,
        # and the augmentation changes fewer pixels.
        patches = cut_patches(
            reduced(images, factor), self.layout, patch_parameters, mean=preset.mean, std=preset.std
        )
        flat = patches.flatten(0, 2)
        at_once = len(flat)
        if flat.device.type == "cpu" and not self.has_batch_norm:
            at_once = max(_LEAST_PATCHES, _CPU_PIXELS // (self.layout.size * factor) ** 2)
        parts = flat.chunk(math.ceil(len(flat) / at_once))
        encodings = [encode(self.backbone, enlarged(part, factor)) for part in parts]
        return torch.cat(encodings).unflatten(0, patches.shape[:3])

    def predict(self, encodings: Tensor) -> dict[str, Tensor]:
        """Return predictions (B, T, K, G, P) and targets (B, R, W, P) of encodings (B, R, W, D).

        The positions of a direction are in the order of its turned grid, row by row.
        """
        predictions = []
        for direction, predictor in enumerate(self.predictors):
            context = self.context(turned(encodings, direction)).flatten(1, 2)
            steps = predictor(context) * self.config.prediction_scale
            predictions.append(steps.unflatten(2, (self.config.prediction_steps, -1)).transpose(1, 2))
        return {"predictions": torch.stack(predictions, dim=1), "targets": self.target(encodings)}

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the mean InfoNCE over directions and steps."""
        predictions, targets = embeddings["predictions"], embeddings["targets"]
        directions, steps, count = *predictions.shape[1:3], self.config.negatives
        noise = None
        if count is not None:
            noise = embeddings["noise"].unflatten(1, (directions, steps, -1, count))
        losses = torch.stack([
            step_losses(
                predictions[:, direction],
                turned(targets, direction),
                skip_step=self.config.skip_step,
                noise=None if noise is None else noise[:, direction],
            )
            for direction in range(directions)
        ])  # fmt: skip
        loss, candidates = losses.mean(), targets[..., 0].numel() if count is None else count + 1
        bounds = math.log(candidates) - losses.detach().mean(0)
        terms = {f"information_step_{step}": bound for step, bound in enumerate(bounds, start=1)}
        return SSLOutput(
            loss=loss, terms={"info_nce": loss.detach()} | terms, embeddings=targets.mean((1, 2))[:, None]
        )


def turned(grid: Tensor, direction: int) -> Tensor:
    """Return a grid (B, R, W, ...), turned clockwise by 90 degrees `direction` times."""
    return grid if direction == 0 else grid.rot90(-direction, (1, 2))


def step_losses(
    predictions: Tensor, targets: Tensor, *, skip_step: int, noise: Tensor | None = None
) -> Tensor:
    """Return the InfoNCE of each step (K,), in nats.

    The prediction of step k at row i belongs to the target in row i + k + `skip_step` of the same column and
    image. Each step is one matrix product of the predictions of all images and positions.

    Args:
        predictions: (B, K, G, P), positions row by row.
        targets: (B, R, W, P).
        skip_step: number of skipped rows.
        noise: (B, K, G, N) in [0, 1) selects N negatives of each prediction, with replacement, among the
            targets of the step: rows from k + `skip_step` on, as in Greedy InfoMax. A negative may be the
            positive. Without noise, all other targets of the batch are negatives.
    """
    shape = targets.shape[:3]
    rows, columns = shape[1:]
    flat = targets.flatten(0, 2)
    index = torch.arange(len(flat), device=targets.device).view(shape)
    losses = []
    for step in range(predictions.shape[1]):
        ahead = step + 1 + skip_step
        positions = (rows - ahead) * columns
        prediction = predictions[:, step, :positions].flatten(0, 1)
        if noise is None:
            losses.append(cpc_info_nce(prediction, flat, index[:, ahead:].flatten()))
            continue
        candidates = targets[:, ahead:].flatten(0, 2)
        # Rounding in float32 can make the product equal to the number of candidates.
        drawn = (noise[:, step, :positions].flatten(0, 1) * len(candidates)).long()
        drawn = drawn.clamp_(max=len(candidates) - 1)
        losses.append(cpc_info_nce(prediction, candidates, None, drawn))
    return torch.stack(losses)


class ContextNetwork(nn.Module):
    """Maps encodings (B, R, W, D) to contexts of the same shape.

    Each context depends on its own row and the rows above.
    """

    def forward(self, encodings: Tensor) -> Tensor:
        """Return the contexts (B, R, W, D)."""
        return self.contexts(encodings.movedim(3, 1)).movedim(1, 3)

    def contexts(self, z: Tensor) -> Tensor:
        """Return the contexts (B, D, R, W) of encodings (B, D, R, W)."""
        raise NotImplementedError(f"{type(self).__name__} defines no contexts")


class ResidualContext(ContextNetwork):
    """Residual blocks with a bottleneck, then a ReLU.

    Args:
        width: D.
        hidden_size: width of the bottleneck.
        layers: number of blocks.

    Source: `PixelCNN` of pytorch-lightning-bolts (hidden width 256, 5 blocks). Its code pads the row above
    with ones. It pads the columns after the 1 x 3 convolution, so the first and the last column receive no
    information. Here, zeros pad the input of each convolution.
    """

    def __init__(self, width: int, hidden_size: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ResidualBlock(width, hidden_size) for _ in range(layers))

    def contexts(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z)
        return z.relu()


class ResidualBlock(nn.Module):
    """A block of `ResidualContext`: 1 x 1, ReLU, 1 x 3, 2 x 1 (a row and the row above), ReLU, 1 x 1.

    Args:
        width: D.
        hidden_size: width of the bottleneck.
    """

    def __init__(self, width: int, hidden_size: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(width, hidden_size, 1)
        self.beside = nn.Conv2d(hidden_size, hidden_size, (1, 3), padding=(0, 1))
        self.above = nn.Conv2d(hidden_size, hidden_size, (2, 1))
        self.wide = nn.Conv2d(hidden_size, width, 1)

    def forward(self, z: Tensor) -> Tensor:
        """Return the sum of the input (B, D, R, W) and its update."""
        hidden = self.beside(self.narrow(z).relu())
        return z + self.wide(self.above(pad(hidden, (0, 0, 1, 0))).relu())


class GatedContext(ContextNetwork):
    """A gated PixelCNN with a vertical and a horizontal stream, equal to that of Greedy InfoMax.

    The horizontal stream uses patches on both sides, because a context may depend on its whole row.

    Args:
        width: D.
        layers: number of gated layers.

    Source: loeweX/Greedy_InfoMax, `PixelCNN_Autoregressor.py` (4 layers; the last row of each vertical 3 x 3
    kernel is masked, so it is omitted here).
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedLayer(width, first=number == 0) for number in range(layers))
        self.last = nn.Conv2d(width, width, 1)

    def contexts(self, z: Tensor) -> Tensor:
        vertical = horizontal = z
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal)
        return self.last(horizontal)


class GatedLayer(nn.Module):
    """A layer of `GatedContext`.

    Args:
        width: D.
        first: whether the layer has no residual connections.
    """

    def __init__(self, width: int, *, first: bool) -> None:
        super().__init__()
        self.vertical = nn.Conv2d(width, 2 * width, (2, 3))
        self.to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = nn.Conv2d(width, 2 * width, (1, 3), padding=(0, 1))
        self.residual = None if first else nn.Conv2d(width, 2 * width, 1)
        self.output = nn.Conv2d(width, width, 1)

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        """Return both streams (B, D, R, W)."""
        above = self.vertical(pad(vertical, (1, 1, 1, 0)))
        beside = self.horizontal(horizontal) + self.to_horizontal(above)
        if self.residual is None:
            return _gate(above), self.output(_gate(beside))
        return _gate(above + self.residual(vertical)), horizontal + self.output(_gate(beside))


def _gate(x: Tensor) -> Tensor:
    values, gates = x.chunk(2, dim=1)
    return values.tanh() * gates.sigmoid()


def _check_patches(backbone: Any, config: CPCConfig) -> None:
    """Raise `UserError` if the encoder cannot encode patches. The message names an enlargement that works."""
    channels, size, patch = len(config.preset.mean), config.preset.size, config.patch
    try:
        check_image_sizes(backbone, [patch * config.enlargement], channels)
    except UserError as error:
        for factor in range(config.enlargement + 1, _LARGEST_FACTOR + 1):
            try:
                check_image_sizes(backbone, [patch * factor], channels)
            except UserError:
                continue
            raise UserError(
                f"views.enlarge: expected at least {size * factor}, which enlarges patches of {patch} pixels "
                f"to {patch * factor} for {backbone.config.model_type}, got {config.preset.enlarge}; use "
                f"views.enlarge={size * factor}"
            ) from error
        raise


AutoModelForPreTraining.register(CPCConfig, CPCForPreTraining)
