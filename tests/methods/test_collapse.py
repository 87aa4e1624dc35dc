# SPDX-License-Identifier: Apache-2.0
"""Without what prevents collapse the alarm is raised, with it it stays silent: short runs on digits."""

from itertools import product

import pytest
import torch
from tiers import in_tiers
from torch.nn.functional import cosine_similarity

from hf_ssl.methods.cmc import modeling_cmc
from hf_ssl.methods.cpc import modeling_cpc
from hf_ssl.methods.pirl import modeling_pirl
from hf_ssl.methods.swav import modeling_swav
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_trainer

pytestmark = pytest.mark.usefixtures("no_curves")

COMMON = [
    "backbone={model_type: resnet, layer_type: basic, embedding_size: 16, depths: [1, 1], "
    "hidden_sizes: [16, 32]}",
    "training.max_steps=120", "training.batch_size=128", "training.monitor_steps=30",
    "training.logging_steps=30", "training.optimizer=sgd",
    "training.save_strategy='no'", "training.disable_tqdm=true",
]  # fmt: skip


def without_sinkhorn(model, monkeypatch):
    monkeypatch.setattr(
        modeling_swav, "sinkhorn", lambda scores, epsilon, iterations: (scores / epsilon).softmax(1)
    )


def without_centring(model, monkeypatch):
    model.config.center_momentum = 1.0  # it stays where it began, at zero


def without_bank_negatives(model, monkeypatch):
    monkeypatch.setattr(
        modeling_pirl,
        "memory_softmax",
        lambda positive, negative, temperature: -positive.mean() / temperature,
    )


def without_patch_negatives(model, monkeypatch):
    def losses(predictions, targets, *, skip_step, noise=None):
        ahead = 1 + skip_step
        grid = predictions[:, 0].unflatten(1, targets.shape[1:3])
        return (1 - cosine_similarity(grid[:, :-ahead], targets[:, ahead:], dim=-1)).mean()[None]

    monkeypatch.setattr(modeling_cpc, "step_losses", losses)


def without_view_negatives(model, monkeypatch):
    monkeypatch.setattr(
        modeling_cmc, "info_nce", lambda first, second, temperature: (1 - (first * second).sum(-1)).mean()
    )


CASES = {
    "cpc": (without_patch_negatives, ["training.learning_rate=0.05", "method.prediction_steps=1"]),
    "byol": ("method.predictor_layers=0", ["training.learning_rate=0.05", "method.momentum=0.95"]),
    "simsiam": ("method.stop_gradient=false", ["training.learning_rate=0.05"]),
    "vicreg": ("method.variance_weight=0", ["training.learning_rate=0.02"]),
    "cmc": (without_view_negatives, ["training.learning_rate=0.2"]),
    "swav": (without_sinkhorn, ["training.learning_rate=0.1", "method.queue_size=0"]),
    "dino": (
        without_centring,
        [
            "training.optimizer=adamw", "training.learning_rate=3e-3", "method.momentum=0.9",
            "method.projection_batch_norm=true", "method.projection_layers=2", "method.output_size=32",
            "method.bottleneck_size=16", "method.freeze_last_layer_epochs=0",
        ],
    ),
    "pirl": (
        without_bank_negatives,
        ["training.learning_rate=0.03", "method.loss=pycontrast", "method.temperature=0.2"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "whole"), in_tiers(product(CASES, [True, False]), [("simsiam", False)]))
def test_the_alarm(method, whole, tmp_path, monkeypatch):
    without, overrides = CASES[method]  # a setting, or a function that changes the model
    if not whole and isinstance(without, str):
        overrides = [*overrides, without]
    recipe = load_recipe(f"smoke/{method}", [*COMMON, *overrides, f"training.output_dir={tmp_path}"])
    trainer = build_trainer(recipe, recipe.training_arguments())
    if not whole and callable(without):
        without(trainer.method, monkeypatch)
    trainer.train()
    assert (trainer.collapse_alarm.message is None) == whole, trainer.collapse_alarm.message


@pytest.mark.parametrize("method", ["byol", "simsiam"])
def test_a_model_without_predictor_trains(method, tmp_path):
    more = ["method.predictor_layers=0", "training.max_steps=1", "training.monitor_steps=0"]
    recipe = load_recipe(f"smoke/{method}", [*COMMON, *more, f"training.output_dir={tmp_path}"])
    trainer = build_trainer(recipe, recipe.training_arguments())
    trainer.train()
    assert isinstance(trainer.method.predictor, torch.nn.Identity)
    rows = torch.rand(4, 2, 3)
    embedded = {"projections": rows, "predictions": rows, "targets": rows}
    lowest = 0 if method == "byol" else -1
    equal, opposite = (embedded | {"predictions": sign * rows.flip(1)} for sign in (1, -1))
    assert trainer.method.objective(equal).loss == pytest.approx(lowest, abs=1e-6)
    assert trainer.method.objective(opposite).loss > lowest + 0.5
