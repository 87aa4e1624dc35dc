# SPDX-License-Identifier: Apache-2.0
"""Evaluation and inspection of a frozen encoder (layer 1).

The measurements are the protocols of `PROTOCOLS` (k-NN, linear probe and others), and feature statistics that
need no labels.
The inspection tools are attention maps and nearest neighbors in a gallery.

The functions take an encoder and arrays, and return plain numbers. This package does not import methods, the
trainer or the Hub. The names below load at their first use, because a recipe needs only `EvaluationConfig`
and must not import torch.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.data.photos import read_photo
    from hf_ssl.evaluation.attention import (
        AttentionMaps,
        attention_maps,
        attention_rollout,
        has_attention,
        threshold_attention,
    )
    from hf_ssl.evaluation.average_precision import average_precisions, mean_average_precision
    from hf_ssl.evaluation.config import EvaluationConfig
    from hf_ssl.evaluation.encoders import fastest_device, load_encoder
    from hf_ssl.evaluation.evaluate import evaluate_encoder, evaluate_features, evaluate_pixels
    from hf_ssl.evaluation.features import extract_features, raw_pixels
    from hf_ssl.evaluation.inputs import LabeledData
    from hf_ssl.evaluation.knn import knn_accuracy
    from hf_ssl.evaluation.overlays import (
        attention_pictures,
        darken_outside_mask,
        fade_outside,
        overlay,
        pca_colors,
        visible_part,
        write_attention_pictures,
    )
    from hf_ssl.evaluation.protocols import PROTOCOLS
    from hf_ssl.evaluation.protocols.few_label_knn import FewLabel, few_label_knn
    from hf_ssl.evaluation.protocols.linear import LinearProbe, linear_probe
    from hf_ssl.evaluation.results import EncoderResult, ProtocolResult, find_results
    from hf_ssl.evaluation.retrieval import (
        Gallery,
        Neighbor,
        Retriever,
        build_gallery,
        embed_gallery,
        thumbnail,
    )
    from hf_ssl.evaluation.scores import class_metrics
    from hf_ssl.evaluation.statistics import (
        alignment,
        alpha_req,
        embedding_std,
        lidar,
        rank_me,
        uniformity,
    )
    from hf_ssl.modeling.loading import load_config, load_weights
    from hf_ssl.modeling.pooling import pool, pooling_rule

_RENAMED = {
    "LabelledImages": "hf_ssl.evaluation.LabeledData",
    "Neighbour": "hf_ssl.evaluation.Neighbor",
    "attention_mask_of": "hf_ssl.evaluation.threshold_attention",
    "pca_colours": "hf_ssl.evaluation.pca_colors",
    "spotlight": "hf_ssl.evaluation.darken_outside_mask",
}

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__, renamed=_RENAMED)
