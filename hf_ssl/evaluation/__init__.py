# SPDX-License-Identifier: Apache-2.0
"""Measuring a frozen encoder: features, k-NN, few labels, linear probe, and statistics that need no labels.

Layer 1: an encoder and arrays come in, plain numbers go out; nothing here knows methods, the trainer or the
Hub. The names below are loaded when first used: a recipe needs `EvaluationConfig` alone and must not pay for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.evaluation.config import EvaluationConfig
    from hf_ssl.evaluation.features import extract_features, pool, pooling_rule, raw_pixels
    from hf_ssl.evaluation.knn import FewLabel, few_label_knn, knn_accuracy
    from hf_ssl.evaluation.linear import LinearProbe, linear_probe
    from hf_ssl.evaluation.protocol import (
        EncoderResult,
        LabelledImages,
        evaluate_encoder,
        evaluate_features,
        evaluate_pixels,
    )
    from hf_ssl.evaluation.statistics import alignment, embedding_std, rank_me, uniformity

_HOMES = {
    "EncoderResult": "protocol",
    "EvaluationConfig": "config",
    "FewLabel": "knn",
    "LabelledImages": "protocol",
    "LinearProbe": "linear",
    "alignment": "statistics",
    "embedding_std": "statistics",
    "evaluate_encoder": "protocol",
    "evaluate_features": "protocol",
    "evaluate_pixels": "protocol",
    "extract_features": "features",
    "few_label_knn": "knn",
    "knn_accuracy": "knn",
    "linear_probe": "linear",
    "pool": "features",
    "pooling_rule": "features",
    "rank_me": "statistics",
    "raw_pixels": "features",
    "uniformity": "statistics",
}

__all__ = [
    "EncoderResult",
    "EvaluationConfig",
    "FewLabel",
    "LabelledImages",
    "LinearProbe",
    "alignment",
    "embedding_std",
    "evaluate_encoder",
    "evaluate_features",
    "evaluate_pixels",
    "extract_features",
    "few_label_knn",
    "knn_accuracy",
    "linear_probe",
    "pool",
    "pooling_rule",
    "rank_me",
    "raw_pixels",
    "uniformity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
