# SPDX-License-Identifier: Apache-2.0
"""Without what prevents collapse the alarm is raised, with it it stays silent: short runs on digits."""

import pytest
import torch
from tiers import in_tiers
from torch.nn.functional import cosine_similarity

from hf_ssl.methods.swav import modeling_swav
from hf_ssl.modeling.outputs import SSLOutput
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


def without_stop_gradient(model, monkeypatch):
    def objective(embeddings):
        predictions, targets = embeddings["predictions"], embeddings["projections"]
        loss = -sum(cosine_similarity(predictions[:, i], targets[:, 1 - i]).mean() for i in range(2)) / 2
        return SSLOutput(loss=loss, terms={}, embeddings=targets)

    monkeypatch.setattr(model, "objective", objective)


def without_predictor(model, monkeypatch):
    model.predictor = torch.nn.Identity()


def without_variance_term(model, monkeypatch):
    model.config.variance_weight = 0.0


def without_sinkhorn(model, monkeypatch):
    monkeypatch.setattr(
        modeling_swav, "sinkhorn", lambda scores, epsilon, iterations: (scores / epsilon).softmax(1)
    )


def without_centring(model, monkeypatch):
    model.config.center_momentum = 1.0  # it stays where it began, at zero


CASES = {
    "byol": (without_predictor, ["training.learning_rate=0.05", "method.momentum=0.95"]),
    "simsiam": (without_stop_gradient, ["training.learning_rate=0.05"]),
    "vicreg": (without_variance_term, ["training.learning_rate=0.02"]),
    "swav": (without_sinkhorn, ["training.learning_rate=0.1", "method.queue_size=0"]),
    "dino": (
        without_centring,
        [
            "training.optimizer=adamw", "training.learning_rate=3e-3", "method.momentum=0.9",
            "method.projection_batch_norm=true", "method.projection_layers=2", "method.output_size=32",
            "method.bottleneck_size=16", "method.freeze_last_layer_epochs=0",
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", in_tiers(zip(CASES), [("simsiam",)]))
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "without"])
def test_the_alarm(method, whole, tmp_path, monkeypatch):
    remove, overrides = CASES[method]
    recipe = load_recipe(f"smoke/{method}", [*COMMON, *overrides, f"training.output_dir={tmp_path}"])
    trainer = build_trainer(recipe, recipe.training_arguments())
    if not whole:
        remove(trainer.method, monkeypatch)
    trainer.train()
    assert (trainer.collapse_alarm.message is None) == whole, trainer.collapse_alarm.message
