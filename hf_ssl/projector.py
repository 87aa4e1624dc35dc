# SPDX-License-Identifier: Apache-2.0
"""Loads the encoder and the projector of a run, to evaluate the projector's output z = g(h) (layer 5)."""

from dataclasses import replace
from pathlib import Path
from typing import cast

from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.evaluation.protocols import PROTOCOLS
from hf_ssl.files import METHOD_MODEL
from hf_ssl.hub.export import load_method_model
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.projected_encoder import ProjectedEncoder

LAYERS = ("encoder", "projector")
"""Values of `--layer`."""


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
