# SPDX-License-Identifier: Apache-2.0
"""Loads the encoder and the projector of a run, to evaluate the projector's output z = g(h) (layer 5)."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.evaluation.protocols import PROTOCOLS
from hf_ssl.files import METHOD_MODEL
from hf_ssl.hub.export import load_method_model
from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.base import SSLPreTrainedModel

LAYERS = ("encoder", "projector")
"""Values of `--layer`."""


class ProjectedEncoder(PreTrainedModel):
    """The published encoder of a method and its projector. `pooler_output` is the projector's output (B, P).

    The output is not L2-normalized. k-NN normalizes it, as many losses do.

    Args:
        model: a method with a projector.

    Raises:
        UserError: the method has no projector.
    """

    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  (transformers' own form)
    _supports_sdpa = True

    def __init__(self, model: SSLPreTrainedModel) -> None:
        projectors = dict(model.named_children()).get(model.exported_projector)
        if projectors is None:
            raise UserError(
                f"--layer projector: expected a method with a projector, got {model.method_name()} "
                "without one; use --layer encoder"
            )
        super().__init__(model.config)
        self.encoder: Any = model.get_submodule(model.exported)
        self.projectors = projectors if isinstance(projectors, nn.ModuleList) else nn.ModuleList([projectors])
        self.eval()

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        """Return `pooler_output` (B, P) of images (B, C, H, W).

        If each narrow encoder has its own projector (CMC), the result is the concatenation of their outputs.
        """
        h_BD = encode(self.encoder, pixel_values)
        sizes = self.encoder.feature_sizes if len(self.projectors) > 1 else [h_BD.shape[1]]
        # Projectors of views whose encoders are not published come last and are not used.
        parts = zip(self.projectors, h_BD.split(sizes, dim=1), strict=False)
        return ModelOutput(pooler_output=torch.cat([projector(part) for projector, part in parts], dim=1))


def load_projected_encoder(folder: str) -> ProjectedEncoder:
    """Return the encoder and the projector in the output folder of a run.

    Raises:
        UserError: the folder contains no method model, or its method has no projector.
    """
    path = Path(folder).expanduser() / METHOD_MODEL
    if not path.is_dir():
        raise UserError(
            f"--layer projector: expected the output folder of a run, with {METHOD_MODEL}/, got {folder}; "
            "use hf-ssl export for a checkpoint"
        )
    return ProjectedEncoder(cast(SSLPreTrainedModel, load_method_model(path)))


def projector_settings(evaluation: EvaluationConfig) -> EvaluationConfig:
    """Return the settings for the projector's output, which has one vector per image and no tokens.

    Protocols that need the encoder itself are omitted.

    Raises:
        UserError: no protocol is left.
    """
    names = [name for name in evaluation.protocols if not PROTOCOLS[name].needs_encoder]
    if not names:
        raise UserError(
            "--layer projector: expected a protocol that needs only features, got "
            f"{', '.join(evaluation.protocols)}; use --protocols knn,linear"
        )
    return replace(evaluation, protocols=names, pooling="auto", compare_poolings=False, patch_grid=[])
