# SPDX-License-Identifier: Apache-2.0
"""Losses as pure functions of tensors (layer 0, torch only), without state and without process groups.

The names below are loaded when they are first used.

Legend of the suffixes: V views, A views with teacher outputs or assignments, B batch, D dimensions,
K classes, prototypes, negatives or rows of a queue, N patches or rows, P values in a patch.
"""

from typing import TYPE_CHECKING

from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.losses.contrastive import info_nce, nt_xent, triplet
    from hf_ssl.losses.decorrelation import barlow_twins, barlow_twins_terms, vicreg_terms
    from hf_ssl.losses.noise_contrastive import (
        cpc_info_nce,
        memory_nce,
        memory_nce_constant,
        memory_scores,
        memory_softmax,
    )
    from hf_ssl.losses.regression import (
        cosine_regression,
        latent_smooth_l1,
        latent_squared_l2,
        masked_patch_mse,
    )
    from hf_ssl.losses.soft_targets import (
        cluster_cross_entropy,
        dino_center,
        dino_cross_entropy,
        sinkhorn,
        swapped_prediction,
    )

__getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
