# SPDX-License-Identifier: Apache-2.0
"""The published encoder of a method with its projector, which gives z = g(h)."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.base import SSLPreTrainedModel


def projector_of(model: SSLPreTrainedModel, option: str, instead: str) -> nn.Module:
    """Return the projector of a method, or raise UserError.

    Args:
        model: the method.
        option, instead: what the error names, and what it advises.
    """
    projectors = dict(model.named_children()).get(model.exported_projector)
    if projectors is None:
        raise UserError(
            f"{option}: expected a method with a projector, got {model.method_name()} without one; use "
            f"{instead}"
        )
    return projectors


class ProjectedEncoder(PreTrainedModel):
    """The published encoder of a method and its projector. `pooler_output` is the projector's output (B, P).

    The output is not L2-normalized. k-NN normalizes it, as many losses do.

    Args:
        model: a method with a projector.
        option, instead: what the error names, and what it advises.

    Raises:
        UserError: the method has no projector.
    """

    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  (transformers' own form)
    _supports_sdpa = True

    def __init__(
        self,
        model: SSLPreTrainedModel,
        option: str = "--layer projector",
        instead: str = "--layer encoder",
    ) -> None:
        projectors = projector_of(model, option, instead)
        super().__init__(model.config)
        self.encoder: Any = model.get_submodule(model.exported)
        self.projectors = projectors if isinstance(projectors, nn.ModuleList) else nn.ModuleList([projectors])
        self.eval()

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        """Return `pooler_output` (B, P) of images (B, C, H, W).

        If each narrow encoder has its own projector (CMC), the result is the concatenation of their outputs.
        """
        return ModelOutput(pooler_output=self.project(encode(self.encoder, pixel_values)))

    def project(self, h_BD: Tensor) -> Tensor:
        """Return the projector's output (B, P) for features of the encoder."""
        sizes = self.encoder.feature_sizes if len(self.projectors) > 1 else [h_BD.shape[1]]
        # Projectors of views whose encoders are not published come last and are not used.
        parts = zip(self.projectors, h_BD.split(sizes, dim=1), strict=False)
        return torch.cat([projector(part) for projector, part in parts], dim=1)
