# SPDX-License-Identifier: Apache-2.0
"""What stock vision transformers lack: encoding of some patches, fixed positions, prediction of patches.

This file also contains the conversion of images to patches, stochastic depth, and the base classes of methods
that use these (MAE, I-JEPA, MoCo v3).

Legend: N, B images, C channels, H, W sides, S special tokens, P patches of an image (row by row), K selected
patches, X values of a patch, D dims of the encoder, E dims of the predictor, M blocks of patches that are
predicted, T patches of a block.
"""

import copy
from functools import partial
from typing import Any, ClassVar

import torch
import transformers.initialization as init
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer, eager_attention_forward

from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import feature_size, layers
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.configuration import SSLConfig, as_pair, patch_grid, size_arguments
from hf_ssl.modeling.further_features import special_tokens
from hf_ssl.modeling.memory import PersistentBuffers

PATCH_SELECTION_TYPES = ("vit", "deit", "ijepa", "dinov2", "dinov2_with_registers")
"""Model types of the encoders that can encode some patches only.

Each adds positions before the first block, so the position of a token does not depend on the omitted tokens.
DINOv3's blocks compute rotary positions instead.
"""


def checked_special_tokens(backbone: PreTrainedModel) -> int:
    """Return the number of tokens before those of patches: class token, registers, distillation token.

    Raises:
        UserError: the model type is not in `PATCH_SELECTION_TYPES`.
    """
    config: Any = backbone.config
    if config.model_type not in PATCH_SELECTION_TYPES:
        raise UserError(
            f"backbone.model_type: expected one of {', '.join(PATCH_SELECTION_TYPES)}, which can encode some "
            f"patches only, got {config.model_type}"
        )
    return special_tokens(backbone)


def encode_patches(backbone: PreTrainedModel, images_NCHW: Tensor, kept_NK: Tensor | None = None) -> Tensor:
    """Return the last hidden state (N, S + K, D) of an encoder that receives some patches of each image.

    The encoder's own modules compute it. So attention implementation, gradient checkpointing, drop path and
    dtype are those of its own forward pass. Tokens of other patches pass through no block.

    Args:
        backbone: an encoder of `PATCH_SELECTION_TYPES`.
        images_NCHW: normalized. Positions are interpolated if the size is not the encoder's own.
        kept_NK: int64 indices of patches, row by row. Tokens are returned in this order. None keeps all
            patches, as the encoder's own forward pass does.

    Returns:
        Special tokens first, then patches, after the final layer norm.

    Raises:
        UserError: the model type is not in `PATCH_SELECTION_TYPES`.
    """
    num_special_tokens = checked_special_tokens(backbone)
    tokens = embed_patches(backbone, images_NCHW)
    if kept_NK is not None:
        patches = select_patches(tokens[:, num_special_tokens:], kept_NK)
        tokens = torch.cat([tokens[:, :num_special_tokens], patches], dim=1)
    for layer in layers(backbone):
        tokens = layer(tokens)
    module: Any = backbone
    return module.layernorm(tokens)


def select_patches(tokens_NPD: Tensor, index_NK: Tensor) -> Tensor:
    """Return the tokens (N, K, D) with the indices `index_NK` of each image."""
    return tokens_NPD.gather(1, index_NK.unsqueeze(-1).expand(-1, -1, tokens_NPD.shape[-1]))


def embed_patches(backbone: Any, images_NCHW: Tensor) -> Tensor:
    """Return all tokens (N, S + P, D) before the first block: projected, with positions."""
    projection = backbone.embeddings.patch_embeddings.projection
    images_NCHW = images_NCHW.to(projection.weight.dtype)
    return backbone.embeddings(images_NCHW, **size_arguments(backbone, images_NCHW))


def patchify(images_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the patches (N, P, X) of images: pixels row by row, channels last, as in ViTMAE.

    Args:
        images_NCHW: images whose height and width are multiples of those of a patch.
        size: rows and columns of pixels in a patch.
    """
    rows, columns = size
    blocks = images_NCHW.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches_NPX: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return the images (N, C, H, W) of patches. This is the inverse of `patchify`.

    Args:
        patches_NPX: all patches of each image.
        size: rows and columns of pixels in a patch.
        grid: rows and columns of patches in an image.
    """
    blocks = patches_NPX.unflatten(2, (*size, -1)).unflatten(1, grid)
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sine_cosine_2d(height: int, width: int, dims: int, *, row_first: bool = False) -> Tensor:
    """Return the positions (P, D) of a grid of patches, float64.

    The first half of the dims encodes the column, the second half the row. Each half has sines at D / 4
    frequencies from 1 to about 1 / 10,000, then cosines.

    Args:
        height, width: size of the grid in patches.
        dims: D, a multiple of 4.
        row_first: whether the first half encodes the row and the second half the column (MoCo v3).

    Raises:
        UserError: dims is not a multiple of 4.

    Source: the authors' code of MAE (facebookresearch/mae, util/pos_embed.py), which I-JEPA shares. Its
    variable names suggest that the row comes first, but the column comes first in its values and in the
    published weights. The names in MoCo v3 (facebookresearch/moco-v3, vits.py) suggest that the column comes
    first, but the first output of `torch.meshgrid` varies with the row.
    """
    if dims % 4:
        raise UserError(f"hidden_size: expected a multiple of 4 for sine-cosine positions, got {dims}")
    frequencies = 10_000.0 ** -(torch.arange(dims // 4, dtype=torch.float64) / (dims // 4))
    row, column = torch.meshgrid(
        torch.arange(height, dtype=torch.float64), torch.arange(width, dtype=torch.float64), indexing="ij"
    )
    places = (row, column) if row_first else (column, row)
    angles = [place.flatten().outer(frequencies) for place in places]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def fill_positions(table: Tensor, grid: tuple[int, int], *, row_first: bool = False) -> None:
    """Write sine-cosine positions to a table (1, S + P, D), unless a checkpoint has filled it.

    The first S rows become zero. `row_first` is that of `sine_cosine_2d`.
    """
    patches = sine_cosine_2d(*grid, table.shape[-1], row_first=row_first)
    special = patches.new_zeros(table.shape[1] - len(patches), table.shape[-1])
    init.copy_(table, torch.cat([special, patches])[None].to(table))


class FixedPositions(SSLPreTrainedModel):
    """A method whose encoder has a fixed sine-cosine position table.

    Attributes:
        has_fixed_positions: whether the table is fixed; False keeps the learned table of transformers.
        row_first: see `sine_cosine_2d`.
    """

    has_fixed_positions: bool = True
    row_first: ClassVar[bool] = False

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        # This call is the last one, after the encoder's; a teacher is copied later.
        if module is self and self.has_fixed_positions:
            grid = patch_grid(self.backbone.config)
            fill_positions(self._position_table, grid, row_first=self.row_first)

    def freeze(self) -> None:
        """Also freeze the encoder's position table."""
        super().freeze()
        if self.has_fixed_positions:
            self._position_table.requires_grad_(False)

    @property
    def _position_table(self) -> nn.Parameter:
        return self.backbone.get_parameter("embeddings.position_embeddings")


class PatchSelectionModel(FixedPositions):
    """A method whose encoder receives some patches of one view. The encoder's positions are a fixed table.

    Attributes:
        num_special_tokens: S.
        grid: rows and columns of patches in an image.
    """

    backbone_types = PATCH_SELECTION_TYPES
    minimum_views = 1
    maximum_views = 1
    published_feature = "mean"  # no loss trains the class token, and I-JEPA's own encoder has none

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.num_special_tokens = checked_special_tokens(self.backbone)
        self.grid = patch_grid(self.backbone.config)

    def check_grid(self, images_NCHW: Tensor) -> None:
        """Raise `UserError` if images do not have the patches of the position tables."""
        sides = zip(images_NCHW.shape[-2:], as_pair(self.backbone.config.patch_size), strict=True)
        grid = tuple(side // patch for side, patch in sides)
        if grid != tuple(self.grid):
            raise UserError(
                f"pixel_values: expected images of {self.grid} patches, as the positions, got {grid}"
            )


class PositionTable(PersistentBuffers):
    """Fixed sine-cosine positions as a buffer: checkpoints contain it, optimizers do not update it.

    Args:
        num_special_tokens: S.
        height, width: size of the grid in patches.
        dims: D.

    Attributes:
        table: (1, S + P, D); the first S rows are zero.
    """

    table: Tensor

    def __init__(self, num_special_tokens: int, height: int, width: int, dims: int) -> None:
        super().__init__()
        self.grid = (height, width)
        self.register_buffer("table", torch.empty(1, num_special_tokens + height * width, dims))
        self.initialize()

    def initialize(self) -> None:
        """Write the positions."""
        fill_positions(self.table, self.grid)


def add_drop_path(backbone: Any, rate: float) -> None:
    """Add stochastic depth to the residual branches of a vision transformer, separately for each image.

    The rate increases over the blocks from 0 to `rate`, and the remaining branches are scaled up. Both
    branches of a block end in a module without weights (a dropout, or DINOv2's own drop path). A hook
    replaces the output of that module, so the names of weights and the encoder's code do not change. Other
    encoders are not changed: ConvNeXt V2 has `backbone.drop_path_rate`.

    Source: Huang et al., arXiv:1603.09382; the schedule is that of facebookresearch/dino.
    """
    if rate == 0 or backbone.config.model_type not in PATCH_SELECTION_TYPES:
        return
    blocks: list[Any] = layers(backbone)
    for number, layer in enumerate(blocks):
        own = rate * number / max(1, len(blocks) - 1)
        end = layer.drop_path if "drop_path" in dict(layer.named_children()) else layer.dropout
        end.register_forward_hook(partial(_drop_path, own))


def without_drop_path(config: Any) -> Any:
    """Return a copy of the encoder's config without stochastic depth, for a teacher."""
    config = copy.deepcopy(config)
    if "drop_path_rate" in config.to_dict():
        config.drop_path_rate = 0.0
    return config


def _drop_path(rate: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Drop the output of a module for some images. With `functools.partial`, this is a forward hook."""
    if not module.training or rate == 0:
        return output
    kept = torch.rand(output.shape[0], *[1] * (output.ndim - 1), device=output.device) >= rate
    return output * kept.to(output.dtype) / (1 - rate)


class PatchPredictor(nn.Module):
    """Stock ViT layers on the encoder's tokens and one mask token for each patch that is predicted.

    Each block of patches is predicted separately. Attention does not depend on the order of tokens, and every
    token has its position added. So mask tokens are simply at the end, and the last layer computes only them.

    Args:
        encoder: the vision transformer whose tokens are the input.
        config: configuration of the layers.
        depth: number of layers.
    """

    def __init__(self, encoder: PreTrainedModel, config: ViTConfig, depth: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.num_special_tokens = checked_special_tokens(encoder)
        self.embed = nn.Linear(feature_size(encoder), size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        self.positions = PositionTable(self.num_special_tokens, *patch_grid(encoder.config), size)
        self.layers = vit_layers(config, depth)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def hidden_states(self, tokens: Tensor, patches: Tensor, targets: Tensor) -> Tensor:
        """Return the normalized last hidden states (B * M, T, E) of the predicted patches.

        Args:
            tokens: (B, S + K, D), the encoder's last hidden state.
            patches: (B, K) int64 indices of the patches of these tokens.
            targets: (B, M, T) int64 indices of the patches to predict.
        """
        blocks, length = targets.shape[1:]
        context_tokens = self.embed(tokens)
        table = self.positions.table[0].to(context_tokens.dtype)
        special_positions = table[: self.num_special_tokens]
        patch_positions = table[self.num_special_tokens :]
        context_tokens = context_tokens + torch.cat(
            [special_positions.expand(len(context_tokens), -1, -1), patch_positions[patches]], dim=1
        )
        mask_tokens = self.mask_token + patch_positions[targets.flatten(0, 1)]
        if blocks > 1:
            context_tokens = context_tokens.repeat_interleave(blocks, dim=0)
        hidden = torch.cat([context_tokens, mask_tokens], dim=1)
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden)
        return self.norm(last(hidden, length))


def vit_layers(config: ViTConfig, depth: int) -> nn.ModuleList:
    """Return `depth` stock layers, at least one. The last one is a `LastViTLayer`."""
    return nn.ModuleList([*(ViTLayer(config) for _ in range(depth - 1)), LastViTLayer(config)])


class LastViTLayer(ViTLayer):
    """A last layer with the weights of a stock one. Its output is the same, but only for the last tokens.

    All tokens become keys and values. Queries, the projection after attention and the MLP are computed only
    for tokens that are used. These three are most of the computation of a layer. The attention's own forward
    is not called, so hooks on it are not called either.
    """

    def forward(self, hidden_states: Tensor, num_outputs: int) -> Tensor:  # type: ignore[override]
        """Return the output of `ViTLayer` for the last `num_outputs` tokens, (N, num_outputs, D).

        Args:
            hidden_states: (N, L, D), all tokens.
            num_outputs: number of tokens that are used, 1 to L.
        """
        attention, unused = self.attention, hidden_states.shape[1] - num_outputs
        residual = hidden_states[:, unused:]
        normalized = self.layernorm_before(hidden_states)
        query, key, value = (
            projection(inputs).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection, inputs in (
                (attention.q_proj, normalized[:, unused:]),
                (attention.k_proj, normalized),
                (attention.v_proj, normalized),
            )
        )
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        dropout = attention.attention_dropout if self.training else 0.0
        attended, _ = attention_interface(
            attention, query, key, value, None, dropout=dropout, scaling=attention.scaling
        )
        residual = residual + self.dropout(attention.o_proj(attended.flatten(2)))
        output: Tensor = residual + self.dropout(self.mlp(self.layernorm_after(residual)))
        return output
