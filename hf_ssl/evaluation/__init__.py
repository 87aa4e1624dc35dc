# SPDX-License-Identifier: Apache-2.0
"""Measuring a frozen encoder: features, k-NN, few labels, linear probe, and statistics that need no labels;
and looking at one: nearest neighbours in a gallery, attention maps.

Layer 1: an encoder and arrays come in, plain numbers go out; nothing here knows methods, the trainer or the
Hub. The names below are loaded when first used: a recipe needs `EvaluationConfig` alone and must not pay for
torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ssl.evaluation.attention import (
        AttentionMaps,
        attention_maps,
        attention_mask_of,
        attention_rollout,
        has_attention,
        pca_colours,
    )
    from hf_ssl.evaluation.config import EvaluationConfig
    from hf_ssl.evaluation.features import extract_features, pool, pooling_rule, raw_pixels
    from hf_ssl.evaluation.knn import FewLabel, few_label_knn, knn_accuracy
    from hf_ssl.evaluation.linear import LinearProbe, linear_probe
    from hf_ssl.evaluation.loading import fastest_device, load_config, load_encoder, load_weights
    from hf_ssl.evaluation.overlays import (
        attention_pictures,
        overlay,
        spotlight,
        write_attention_pictures,
    )
    from hf_ssl.evaluation.photo import read_photo
    from hf_ssl.evaluation.protocol import (
        EncoderResult,
        LabelledImages,
        evaluate_encoder,
        evaluate_features,
        evaluate_pixels,
    )
    from hf_ssl.evaluation.retrieval import (
        Gallery,
        Neighbour,
        Retriever,
        build_gallery,
        embed_gallery,
        thumbnail,
    )
    from hf_ssl.evaluation.statistics import alignment, embedding_std, rank_me, uniformity

_HOMES = {
    "AttentionMaps": "attention",
    "EncoderResult": "protocol",
    "EvaluationConfig": "config",
    "FewLabel": "knn",
    "Gallery": "retrieval",
    "LabelledImages": "protocol",
    "LinearProbe": "linear",
    "Neighbour": "retrieval",
    "Retriever": "retrieval",
    "alignment": "statistics",
    "attention_maps": "attention",
    "attention_mask_of": "attention",
    "attention_pictures": "overlays",
    "attention_rollout": "attention",
    "build_gallery": "retrieval",
    "embed_gallery": "retrieval",
    "embedding_std": "statistics",
    "evaluate_encoder": "protocol",
    "evaluate_features": "protocol",
    "evaluate_pixels": "protocol",
    "extract_features": "features",
    "fastest_device": "loading",
    "few_label_knn": "knn",
    "has_attention": "attention",
    "knn_accuracy": "knn",
    "linear_probe": "linear",
    "load_config": "loading",
    "load_encoder": "loading",
    "load_weights": "loading",
    "overlay": "overlays",
    "pca_colours": "attention",
    "pool": "features",
    "pooling_rule": "features",
    "rank_me": "statistics",
    "raw_pixels": "features",
    "read_photo": "photo",
    "spotlight": "overlays",
    "thumbnail": "retrieval",
    "uniformity": "statistics",
    "write_attention_pictures": "overlays",
}

__all__ = [
    "AttentionMaps",
    "EncoderResult",
    "EvaluationConfig",
    "FewLabel",
    "Gallery",
    "LabelledImages",
    "LinearProbe",
    "Neighbour",
    "Retriever",
    "alignment",
    "attention_maps",
    "attention_mask_of",
    "attention_pictures",
    "attention_rollout",
    "build_gallery",
    "embed_gallery",
    "embedding_std",
    "evaluate_encoder",
    "evaluate_features",
    "evaluate_pixels",
    "extract_features",
    "fastest_device",
    "few_label_knn",
    "has_attention",
    "knn_accuracy",
    "linear_probe",
    "load_config",
    "load_encoder",
    "load_weights",
    "overlay",
    "pca_colours",
    "pool",
    "pooling_rule",
    "rank_me",
    "raw_pixels",
    "read_photo",
    "spotlight",
    "thumbnail",
    "uniformity",
    "write_attention_pictures",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
