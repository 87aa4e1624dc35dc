# SPDX-License-Identifier: Apache-2.0
"""CMC: contrastive multiview coding (arXiv:1906.05849)."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForPreTraining

from hf_ssl.data.config import COLUMN_KINDS
from hf_ssl.errors import UserError
from hf_ssl.losses import info_nce, memory_nce, memory_scores, memory_softmax
from hf_ssl.losses.upcasting import upcast
from hf_ssl.methods.cmc.configuration_cmc import CMCConfig
from hf_ssl.modeling.activation_checkpoints import checkpoint_segments
from hf_ssl.modeling.backbones import encode, freeze_unused
from hf_ssl.modeling.heads import MLPHead, projector_sizes
from hf_ssl.modeling.memory_bank import MemoryBank, MemoryBankModel, NCEConstants
from hf_ssl.modeling.narrow_encoders import DIVISIBLE_TYPES, feature_width, further_config
from hf_ssl.modeling.outputs import SSLOutput
from hf_ssl.modeling.parallel_encoders import ParallelEncoders, find_parts, new_parallel_encoders
from hf_ssl.views.color_spaces import gradient_magnitude

# The mean gradient is 0.048 per pixel in Imagenette (160 pixels) and 0.074 in CIFAR-10, so the values are
# near 1. No public code has this view.
_GRADIENT_SCALE = 0.05


class CMCForPreTraining(MemoryBankModel):
    """The loss contrasts color views of one crop: the luminance of an image with its colors.

    Each view has its own narrow encoder and its own head. The loss is the sum over pairs of views and both
    directions, as in the authors' code. The negatives are the other images of the batch of all processes, or
    random rows of memory banks. Each view has its own bank, and all views of an image share the random rows.

    `backbone` joins the narrow encoders of the color views. Narrow ResNets of a linear color space fold
    exactly into one encoder for RGB images, which is published (`ParallelResNets.fold`). Other narrow
    encoders are published in subfolders (`ParallelEncoders.save_pretrained`). The encoders of the gradient
    view and of further image columns, such as depth, are not published, because other images have only
    colors.
    """

    config_class = CMCConfig
    couples_samples = True  # without memory banks
    needs_sample_index = False  # only with memory banks
    streaming_advice = (
        "method.loss=info_nce, whose negatives are the other images of the batch (in-batch negatives)"
    )
    minimum_views = maximum_views = 1
    takes_image_columns = True
    backbone_types = DIVISIBLE_TYPES
    exported_projector = "heads"

    def __init__(self, config: CMCConfig) -> None:
        super().__init__(config)
        self.views = config.color_views
        self.backbone: ParallelEncoders = new_parallel_encoders(config.backbone_config, self.views)
        self.view_names, widths = self.views.names, list(self.backbone.feature_sizes)
        self.column_channels = [COLUMN_KINDS[kind] for kind in config.columns.values()]
        self.column_backbones = nn.ModuleList()
        for channels, name in zip(self.column_channels, config.column_names, strict=True):
            column: Any = further_config(config.backbone_config, config.groups, channels)
            self.column_backbones.append(AutoModel.from_config(column, trust_remote_code=False))
            self.view_names, widths = [*self.view_names, name], [*widths, feature_width(column)]
        self.gradient_backbone: PreTrainedModel | None = None
        if config.gradient_view:
            gradient: Any = further_config(config.backbone_config, config.groups, channels=1)
            self.gradient_backbone = AutoModel.from_config(gradient, trust_remote_code=False)
            self.view_names, widths = [*self.view_names, "gradient"], [*widths, feature_width(gradient)]
        self.heads = nn.ModuleList(
            MLPHead(projector_sizes(width, config), norm=False, last_bias=True) for width in widths
        )
        self.has_banks = self.stores_images(config)
        if self.has_banks:
            size, views = config.projection_size, range(len(widths))
            self.banks = nn.ModuleList(self.make_bank(size, number) for number in views)
            self.constants = NCEConstants(2 * len(self.pairs), config.temperature)
            self.couples_samples, self.memory_inputs = False, ("projections", "sample_index", "draw_seeds")
        else:
            self.hooks_are_called = True  # they have no effect
        self.post_init()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, every_n_layers)
        for backbone in self._unpublished_backbones:
            checkpoint_segments(backbone, enable, gradient_checkpointing_func, every_n_layers)

    @property
    def _unpublished_backbones(self) -> list[PreTrainedModel]:
        """Return the encoders that are not published."""
        gradient = [] if self.gradient_backbone is None else [self.gradient_backbone]
        return [*cast("list[PreTrainedModel]", list(self.column_backbones)), *gradient]

    @classmethod
    def stores_images(cls, config: CMCConfig) -> bool:
        """Return whether the model has memory banks."""
        return config.loss != "info_nce"

    @classmethod
    def compares_images(cls, config: CMCConfig) -> bool:
        """Return whether the other images of the batch are the negatives."""
        return not cls.stores_images(config)

    def sample_masks(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return the seeds (B,) int64 of random negatives, if there are memory banks."""
        return super().sample_masks(seeds) if self.has_banks else {}

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of views that the loss contrasts."""
        pairs = list(combinations(range(len(self.view_names)), 2))
        return [pair for pair in pairs if pair[0] == 0] if self.config.graph == "core" else pairs

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the unit projections (B, M, P) of the M views of one crop.

        With memory banks, the result also has the row numbers and the seeds of the images (B,).

        Raises:
            ValueError: there are memory banks, and the inputs lack row numbers or seeds.
            UserError: the inputs have another number of channels.
        """
        keys = self.image_keys(inputs) if self.has_banks else {}
        images, *columns = self._split_columns(inputs["pixel_values"][:, 0])
        features = list(encode(self.backbone, images).split(self.backbone.feature_sizes, dim=1))
        if self.gradient_backbone is not None:
            columns.append(gradient_magnitude(self.views.restore(images)) / _GRADIENT_SCALE)
        further = zip(self._unpublished_backbones, columns, strict=True)
        features += [encode(backbone, column) for backbone, column in further]
        projections = [upcast(head(view)) for head, view in zip(self.heads, features, strict=True)]
        return keys | {"projections": normalize(torch.stack(projections, dim=1), dim=-1)}

    def _split_columns(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return the RGB images (B, 3, H, W), then the images of each further column."""
        channels = [3, *self.column_channels]
        if images_BCHW.shape[1] != sum(channels):
            raise UserError(
                f"pixel_values: expected {sum(channels)} channels (red, green, blue, then those of "
                f"config.further_image_columns), got {images_BCHW.shape[1]}"
            )
        return images_BCHW.split(channels, dim=1)

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the sum of the losses of all pairs of views.

        The terms are the loss of each pair (the mean of both directions), and its lower bound of the mutual
        information of the two views, in nats: log(number of negatives) - cross entropy.
        """
        projections = embeddings["projections"]
        losses, entropies = (
            self._memory_losses(embeddings) if self.has_banks else self._batch_losses(projections)
        )
        negatives = self.config.negatives if self.has_banks else len(projections) - 1
        terms: dict[str, Tensor] = {}
        for number, (first, second) in enumerate(self.pairs):
            name, both = (
                f"{self.view_names[first]}_{self.view_names[second]}",
                slice(2 * number, 2 * number + 2),
            )
            terms[f"{self.config.loss}_{name}"] = torch.stack(losses[both]).mean().detach()
            terms[f"information_{name}"] = math.log(negatives) - torch.stack(entropies[both]).mean().detach()
        return SSLOutput(loss=torch.stack(losses).sum(), terms=terms, embeddings=projections)

    @property
    def _directions(self) -> list[tuple[int, int]]:
        """Return the anchor and the other view of each loss: both directions of each pair."""
        return [direction for first, second in self.pairs for direction in ((first, second), (second, first))]

    def _batch_losses(self, projections_BMP: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the loss and the cross entropy of each direction, which are equal."""
        views, temperature = projections_BMP.unbind(dim=1), self.config.temperature
        losses = [
            info_nce(views[anchor], views[other], temperature=temperature)
            for anchor, other in self._directions
        ]
        return losses, losses

    def _memory_losses(self, embeddings: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the loss and the cross entropy of each direction."""
        scores, temperature = self._memory_scores(embeddings), self.config.temperature
        with torch.set_grad_enabled(self.config.loss == "softmax" and torch.is_grad_enabled()):
            entropies = [memory_softmax(*pair, temperature=temperature) for pair in scores]
        if self.config.loss == "softmax":
            return entropies, entropies
        rows = self.config.num_samples
        losses = [
            memory_nce(
                *pair,
                num_rows=rows,
                z=self.constants.get(number, *pair, num_rows=rows),
                temperature=temperature,
            )
            for number, pair in enumerate(scores)
        ]
        return losses, entropies

    def _memory_scores(self, embeddings: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the cosines (B,) and (B, K) of each direction's anchors and rows of the other bank."""
        views, banks = embeddings["projections"].unbind(dim=1), cast("list[MemoryBank]", list(self.banks))
        negatives_BK = banks[0].draw(embeddings["draw_seeds"], self.config.negatives)
        indices = torch.cat((embeddings["sample_index"][:, None], negatives_BK), dim=1)
        scores = [
            memory_scores(views[anchor], banks[other].rows, indices) for anchor, other in self._directions
        ]
        return [(each[:, 0], each[:, 1:]) for each in scores]

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Keep the projections for the memory banks, and the constants of the first batch."""
        if self.config.loss == "nce" and not self.constants.are_set:
            self.constants.update(*self._memory_scores(embeddings), num_rows=self.config.num_samples)
        super().update_memory(embeddings)

    def update_banks(self, embeddings: dict[str, Tensor]) -> None:
        """Keep the projections for the memory banks."""
        for bank, projections in zip(self.banks, embeddings["projections"].unbind(dim=1), strict=True):
            cast(MemoryBank, bank).update(embeddings["sample_index"], projections)

    # The published encoder.

    @property
    def exported_encoder(self) -> PreTrainedModel:
        """Return the narrow encoders of the color views: a new encoder if they fold into one."""
        return self.backbone.exported()

    def freeze(self) -> None:
        """Also freeze the parameters of the encoders of further views that no loss depends on."""
        super().freeze()
        for backbone in self._unpublished_backbones:
            freeze_unused(backbone)

    def start_from(self, encoder: PreTrainedModel) -> None:
        """Copy the weights of an encoder that CMC exported to the narrow encoders. Heads do not change.

        Raises:
            UserError: the encoder is another one.
        """
        self.backbone.load_exported(encoder)
        self.continues = True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model of this class as in transformers.

        Raises:
            UserError: the folder contains an exported encoder, for which `from_backbone` is right.
        """
        name = cls.__name__
        wrong = UserError(
            f"{name}.from_pretrained: expected a model of this class, got an encoder; use "
            f"{name}.from_backbone"
        )
        try:
            loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except OSError as error:
            place = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
            if "subfolder" not in kwargs and find_parts(str(args[0]), **place) is not None:
                raise wrong from error
            raise
        model, info = loaded
        if any(key.startswith("backbone.parts.") for key in info["missing_keys"]):
            raise wrong
        return (model, info) if output_loading_info else model


AutoModelForPreTraining.register(CMCConfig, CMCForPreTraining)
