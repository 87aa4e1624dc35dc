# SPDX-License-Identifier: Apache-2.0
import random
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset
from messages import mentions
from tiers import in_tiers

from hf_ssl.data import DataConfig, label_data
from hf_ssl.errors import UserError
from hf_ssl.evaluation import evaluate_encoder, extract_features, knn_accuracy
from hf_ssl.hub import image_processor
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.outputs import SSLOutput
from hf_ssl.modeling.projected_encoder import ProjectedEncoder
from hf_ssl.recipe import Recipe, load_recipe
from hf_ssl.run import build_trainer
from hf_ssl.trainer.alarms import CollapseAlarm
from hf_ssl.trainer.knn import KNNClassifier
from hf_ssl.views import ViewPreset

pytestmark = pytest.mark.usefixtures("no_curves")

SMALL = [
    "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_bank_images=100",
    "training.monitor_query_images=50", "training.batch_size=64", "data.max_images=256",
]  # fmt: skip


def trainer(tmp_path, *overrides):
    recipe = load_recipe("smoke/simclr", [*SMALL, f"training.output_dir={tmp_path}", *overrides])
    return build_trainer(recipe, recipe.training_arguments())


def test_measurements_change_neither_the_model_nor_any_random_state(tmp_path):
    made = trainer(tmp_path)
    made.method.train()
    weights = {name: value.clone() for name, value in made.method.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, second = made.monitor.measure(made.method), made.monitor.measure(made.method)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert made.method.training
    for name, value in made.method.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert first == second
    assert {
        "eval_knn",
        "eval_rank_me",
        "eval_embedding_std",
        "eval_alignment",
        "eval_uniformity",
    } <= first.keys()
    assert 0 < first["eval_knn"] <= 1


def test_the_output_of_the_projector_is_measured_on_request(tmp_path):
    made = trainer(tmp_path, "training.monitor_projector=true")
    measured = made.monitor.measure(made.method)
    knn = made.monitor.knn
    encoder = ProjectedEncoder(made.method.eval())
    bank, queries = (
        extract_features(encoder, knn.processor, images.iter_batches(32))
        for images in (knn.bank, knn.queries)
    )
    labels = knn.bank.labels, knn.queries.labels
    [expected] = knn_accuracy(
        bank, labels[0], queries, labels[1], neighbors=[20], temperatures=[0.07]
    ).values()
    assert measured["eval_knn_projector"] == expected != measured["eval_knn"]
    assert "eval_knn_projector" not in trainer(tmp_path / "other").monitor.measure(made.method)
    recipe = load_recipe("smoke/mae", [*SMALL, "training.monitor_projector=true"])
    with pytest.raises(UserError, match=mentions("training.monitor_projector=true", "mae", "=false")):
        build_trainer(recipe, recipe.training_arguments())


def labeled_table(labels: list[str]) -> Dataset:
    image = PIL.Image.fromarray(np.zeros((8, 8), np.uint8))
    return Dataset.from_dict({"image": [image] * len(labels), "label": labels})


def test_classes_of_both_splits_have_the_same_numbers(tmp_path, caplog):
    folder = tmp_path / "images"
    given = {"train": labeled_table(["ant", "bee", "cat"] * 9), "test": labeled_table(["cat", "bee"] * 5)}
    folder.mkdir()
    for split, table in given.items():
        table.to_parquet(folder / f"{split}-0.parquet")
    monitor = trainer(tmp_path / "run", f"evaluation.path={folder}").monitor
    assert monitor.knn.queries.labels.tolist() == [2, 1] * 5
    labeled_table(["dog", "bee"]).to_parquet(folder / "test-0.parquet")
    assert trainer(tmp_path / "run", f"evaluation.path={folder}").monitor.knn is None
    assert "dog" in caplog.text


@pytest.mark.parametrize("count", [8, 15, 40])
def test_the_k_of_few_images_is_that_of_the_evaluation(count):
    generator = np.random.default_rng(count)
    pictures = [PIL.Image.fromarray(generator.integers(0, 256, (8, 8), np.uint8)) for _ in range(count)]
    table = Dataset.from_dict({"image": pictures, "label": [number % 3 for number in range(count)]})
    config = DataConfig(path="unused")
    train, test = (label_data(part, config, "") for part in (table, table.select(range(count // 2, count))))
    model = SimCLRForPreTraining(load_recipe("smoke/simclr").config())
    processor = image_processor(ViewPreset(size=16), 3)
    settings = {"protocols": ["knn"], "precision": "float32"}
    knn = evaluate_encoder(model, train, test, settings, processor)["protocols"][0]
    assert knn["details"]["neighbors"] == {8: 5, 15: 10, 40: 20}[count]
    assert KNNClassifier(train, test, processor).measure(model, None)["knn"] == knn["value"]


@pytest.mark.parametrize("seed", in_tiers([(0,), (1,)], [(0,)]))
def test_weights_with_and_without_a_monitor_are_equal(tmp_path, seed):
    steps = ["training.max_steps=4", "training.save_steps=100", f"training.seed={seed}"]
    watched = trainer(tmp_path / "watched", *steps, "training.monitor_steps=1")
    alone = trainer(tmp_path / "alone", *steps, "training.monitor_steps=0")
    watched.train()
    alone.train()
    assert len([r for r in watched.state.log_history if "eval_knn" in r]) == 5
    for name, value in alone.method.state_dict().items():
        assert torch.equal(value, watched.method.state_dict()[name]), name


def problem_of(*measurements, first_step=0):
    """Return the alarm's message for (standard deviation, rank) of measurements after every 10 steps."""
    history = [
        {"step": first_step + 10 * number, "eval_embedding_std": std, "eval_embedding_rank": rank}
        for number, (std, rank) in enumerate(measurements)
    ]
    return CollapseAlarm(SSLPreTrainedModel.collapsed_below).find_problem(history)


def test_alarm_needs_two_low_measurements_that_do_not_recover():
    assert problem_of((0.001, 1.0)) is None
    assert problem_of((0.001, 1.0), (0.001, 9.0)) is None  # an untrained network may start there
    assert problem_of((0.001, 1.0), (0.001, 9.0), (0.010, 9.0)) is None  # recovering
    assert problem_of((0.001, 9.0), (0.500, 9.0), (0.010, 9.0)) is None
    assert "embedding_std is 0.009" in problem_of((0.5, 9.0), (0.010, 9.0), (0.009, 9.0))
    assert "at step 20" in problem_of((0.010, 9.0), (0.009, 9.0), first_step=10)  # none at step 0


def test_alarm_for_a_lost_dimension_and_for_nan():
    assert "embedding_rank is 1.1" in problem_of((0.9, 1.1), (0.9, 1.1), first_step=10)
    assert "nan" in problem_of((float("nan"), 5.0))


def test_measurements_of_other_images_are_not_checked():
    alarm = CollapseAlarm(SSLPreTrainedModel.collapsed_below)
    collapsed = {"step": 10, "eval_embedding_std": float("nan"), "eval_embedding_rank": 5.0}
    state, args = SimpleNamespace(log_history=[collapsed]), SimpleNamespace(device="cpu", on_collapse="warn")
    alarm.on_evaluate(args, state, None, metrics={"eval_knn": 0.5})
    assert alarm.message is None
    alarm.on_evaluate(args, state, None, metrics=collapsed)
    assert "nan" in alarm.message


class Attracting(SimCLRForPreTraining):
    """SimCLR without what keeps it from collapsing: views attract, nothing repels."""

    def objective(self, embeddings):
        z = embeddings["projections"]
        unit = torch.nn.functional.normalize(z, dim=-1)
        loss = 1 - (unit[:, 0] * unit[:, 1]).sum(-1).mean()
        return SSLOutput(loss=loss, terms={"attraction": loss.detach()}, embeddings=z)


@pytest.mark.parametrize(("model", "collapses"), [(Attracting, True), (SimCLRForPreTraining, False)])
def test_without_negatives_the_alarm_is_raised_and_with_them_it_is_silent(
    tmp_path, monkeypatch, model, collapses
):
    recipe = load_recipe(
        "smoke/simclr",
        [
            *SMALL, f"training.output_dir={tmp_path}", "training.max_steps=60", "training.monitor_steps=10",
            "training.optimizer=sgd", "training.learning_rate=0.3", "training.on_collapse=stop",
        ],
    )  # fmt: skip
    monkeypatch.setattr(Recipe, "model_class", model)
    made = build_trainer(recipe, recipe.training_arguments())
    made.train()
    assert isinstance(made.method, model)
    assert (made.collapse_alarm.message is not None) is collapses
    assert (made.state.global_step < 60) is collapses


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    made = trainer(tmp_path, "training.max_steps=4", "training.logging_steps=1", "training.monitor_steps=0")
    with torch.no_grad():
        made.method.projector[0].weight.fill_(torch.nan)
    with pytest.raises(UserError, match=mentions("loss", "nan", 1, "training.learning_rate")):
        made.train()


def test_terms_throughput_and_memory_are_logged(tmp_path):
    made = trainer(tmp_path, "training.max_steps=4", "training.logging_steps=2", "training.monitor_steps=0")
    made.train()
    record = next(r for r in made.state.log_history if "loss" in r)
    assert record["term_nt_xent"] == pytest.approx(record["loss"], rel=1e-5)
    assert record["images_per_second"] > 0 and record["memory_gib"] > 0


def test_a_resumed_run_knows_the_alarm_of_its_earlier_part():
    """The card states it."""
    history = [{"step": step, "eval_embedding_std": std} for step, std in ((0, 0.3), (5, 0.01), (9, 0.01))]
    recovered = [*history, {"step": 12, "eval_embedding_std": 0.4}, {"step": 13, "loss": 1.0}]
    for records in (history, recovered):
        assert "step 9" in CollapseAlarm({"embedding_std": 0.05}).last_message(records)
    assert CollapseAlarm({"embedding_std": 0.05}).last_message(history[:2]) is None
