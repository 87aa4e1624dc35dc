# SPDX-License-Identifier: Apache-2.0
"""SwAV with soft and hard codes, by hand, with queues and local views."""

import math

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from hf_ssl.losses import sinkhorn
from hf_ssl.methods.swav.configuration_swav import SwAVConfig
from hf_ssl.methods.swav.modeling_swav import SwAVForPreTraining
from hf_ssl.modeling.outputs import RunProgress

RESNET = {
    "model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1], "hidden_sizes": [6]
}  # fmt: skip


def build(**values):
    torch.manual_seed(0)
    sizes = {"projection_size": 2, "projection_hidden_size": 8} | values
    return SwAVForPreTraining(SwAVConfig(backbone_config=RESNET, **sizes)).double()


def on_circle(*degrees):
    """Return unit vectors (N, 2)."""
    angle = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack((angle.cos(), angle.sin()), dim=1)


def test_the_loss_of_hard_codes_by_hand():
    """Two images, two prototypes (1, 0) and (0, 1), and the scores 1 and 0.

    The assignments of both views are soft: 1 / (1 + exp(-1 / epsilon)) and the rest. Rounded, each view
    predicts the prototype of its image. The other view of an image has the same scores.
    """
    embeddings = {"projections": on_circle(0, 90)[:, None].expand(2, 2, 2)}
    losses = {}
    for hard in (False, True):
        model = build(prototypes=2, epsilon=0.5, temperature=0.2, hard_codes=hard)
        model.prototypes.weight.data = on_circle(0, 90)
        losses[hard] = model.objective(embeddings).loss.item()
    log_right, log_wrong = -math.log(1 + math.exp(-5)), -math.log(1 + math.exp(5))
    share = 1 / (1 + math.exp(-2))
    assert losses[True] == pytest.approx(-log_right, rel=1e-6)
    assert losses[False] == pytest.approx(-share * log_right - (1 - share) * log_wrong, rel=1e-6)


def test_rounding_comes_after_sinkhorn():
    """All samples are nearest to the first prototype, but Sinkhorn-Knopp divides them among both."""
    scores = torch.tensor([[[1.0, 0.2], [0.9, 0.3], [0.8, 0.7], [0.7, 0.6]]], dtype=torch.float64)
    codes = build(prototypes=2, hard_codes=True)._assign(scores)
    assert codes.dtype == torch.float64 and codes.tolist() == [[[1, 0], [1, 0], [0, 1], [0, 1]]]


@pytest.mark.parametrize("local", [0, 3])
@pytest.mark.parametrize("hard", [False, True])
def test_codes_with_queues_and_local_views(hard, local):
    model = build(prototypes=4, hard_codes=hard, queue_size=6, queue_start_epoch=1.0)
    generator = torch.Generator().manual_seed(1)
    size = (5, 2 + local, 2)
    views = normalize(torch.randn(size, generator=generator, dtype=torch.float64), dim=-1)
    embeddings = {"projections": views[:, :2]} | ({"local_projections": views[:, 2:]} if local else {})
    for queue in model.queues:
        queue.enqueue(normalize(torch.randn(6, 2, generator=generator, dtype=torch.float64), dim=-1))
    model.before_step(RunProgress(step=2, total_steps=4, steps_per_epoch=1))
    weight = model.prototypes.weight.detach()
    total, pairs = 0.0, 0
    for view, queue in enumerate(model.queues):
        rows = torch.cat((views[:, view], queue.rows))
        codes = sinkhorn(rows @ weight.T, epsilon=0.05, iterations=3)[:5]
        if hard:
            codes = one_hot(codes.argmax(1), 4)
        for other in set(range(2 + local)) - {view}:
            total -= (codes * (views[:, other] @ weight.T / 0.1).log_softmax(1)).sum(1).mean().item()
            pairs += 1
    assert model.objective(embeddings).loss.item() == pytest.approx(total / pairs, rel=1e-6)


def test_a_config_of_a_version_without_hard_codes_has_soft_ones(tmp_path):
    values = SwAVConfig(backbone_config=RESNET).to_dict()
    assert values.pop("hard_codes") is False
    assert not SwAVConfig.from_dict(values).hard_codes
    build(prototypes=3, hard_codes=True).save_pretrained(tmp_path)
    assert SwAVForPreTraining.from_pretrained(tmp_path).config.hard_codes
