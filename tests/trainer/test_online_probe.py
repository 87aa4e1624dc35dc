# SPDX-License-Identifier: Apache-2.0
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from forks import Forks
from messages import mentions
from tiers import in_tiers
from torch import nn

from hf_ssl.cards.text import monitor_table
from hf_ssl.data import DataConfig, as_source, open_source, train_loader
from hf_ssl.data.labeled_splits import label_data
from hf_ssl.data.training_labels import TrainingLabels, training_labels
from hf_ssl.errors import UserError
from hf_ssl.modeling.backbones import encode_without_columns
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_trainer
from hf_ssl.trainer.logs import select_panels
from hf_ssl.trainer.online_probe import FILE, OnlineProbe
from hf_ssl.views import ViewPreset

pytestmark = pytest.mark.usefixtures("no_curves")

SMALL = [
    "training.use_cpu=true", "training.disable_tqdm=true", "training.monitor_bank_images=64",
    "training.monitor_query_images=32", "training.batch_size=32", "data.max_images=128",
    "training.max_steps=6", "training.save_steps=3", "training.monitor_steps=3", "training.logging_steps=1",
    "training.precision=float32", "training.online_probe=true", "training.dataloader_num_workers=0",
]  # fmt: skip


def trainer(folder, *overrides, method="simclr"):
    recipe = load_recipe(f"smoke/{method}", [*SMALL, f"training.output_dir={folder}", *overrides])
    return build_trainer(recipe, recipe.training_arguments())


def measurements_of(record):
    return {key.removeprefix("eval_"): value for key, value in record.items()}


def records(made, *keys):
    return [{key: record[key] for key in keys if key in record} for record in made.state.log_history]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    made = trainer(tmp_path_factory.mktemp("run"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_ssl.trainer.callbacks.draw_curves", lambda *_: None)
        made.train()
    return made


@pytest.mark.parametrize("more", in_tiers([("",), ("training.contrastive_chunk_size=16",)], [("",)]))
def test_the_encoder_is_the_same_without_the_probe(tmp_path, finished, more):
    with_probe, chosen = finished, [more] if more else []
    if more:
        with_probe = trainer(tmp_path / "with", more)
        with_probe.train()
    alone = trainer(tmp_path / "alone", "training.online_probe=false", *chosen)
    alone.train()
    assert alone.online_probe is None and with_probe.online_probe.classifier.weight.abs().sum() > 0
    for name, value in alone.method.state_dict().items():
        assert torch.equal(value, with_probe.method.state_dict()[name]), name
    assert records(alone, "loss", "eval_knn") == records(with_probe, "loss", "eval_knn")


def test_accuracies_are_logged_measured_and_drawn(finished):
    history = finished.state.log_history
    train = [record["online_probe_train"] for record in history if "loss" in record]
    test = [record["eval_online_probe"] for record in history if "eval_knn" in record]
    assert len(train) == 6 and all(0 <= value <= 1 for value in train)
    assert test[0] == 0.1 != test[-1]  # it guesses before the first step
    panels = dict(select_panels(history))
    assert panels["accuracy of the online probe"] == ("eval_online_probe", "online_probe_train")
    measured = [record for record in history if "eval_knn" in record]
    facts = {"monitor": {"history": [measurements_of(record) for record in measured]}}
    [row] = [row for row in monitor_table(facts)[1:] if "online" in row[0]]
    assert "not comparable" in row[0] and row[1] == "0.1"


def test_a_resumed_run_has_the_same_probe(finished, tmp_path):
    first = trainer(tmp_path, "training.max_steps=6")
    first.train(resume_from_checkpoint=str(Path(finished.args.output_dir) / "checkpoint-3"))
    assert torch.equal(first.online_probe.classifier.weight, finished.online_probe.classifier.weight)
    last = {"online_probe_train", "eval_online_probe", "step"}
    assert records(first, *last) == records(finished, *last)


def test_a_checkpoint_without_a_probe_starts_a_new_one(tmp_path, caplog):
    probe = OnlineProbe(TrainingLabels(["a", "b"]), 0.1, lambda: None)
    probe.load(tmp_path, torch.device("cpu"))
    assert probe.classifier is None and tmp_path.name in caplog.text
    probe.save(tmp_path)
    assert not (tmp_path / FILE).exists()


def test_steps_are_those_of_a_loop_with_autograd(finished):
    """Three steps with momentum and a cosine; one of them in two micro-batches, one without any label."""
    encoder = finished.method.exported_encoder
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 8, 3, *2 * (finished.preset.size,), generator=generator)
    labels = torch.randint(-1, 3, (3, 8), generator=generator)
    labels[1] = -1
    probe = OnlineProbe(TrainingLabels(["a", "b", "c"]), 0.5, lambda: None)
    linear = nn.Linear(len(encode_without_columns(encoder.eval(), images[0])[0]), 3).double()
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    velocity = [torch.zeros_like(parameter) for parameter in linear.parameters()]
    correct = known = 0
    for step in range(3):
        for part in range(0, 8, 4 if step == 0 else 8):
            chosen = slice(part, part + 4 if step == 0 else 8)
            probe.add(encoder, images[step, chosen], labels[step, chosen])
        probe.step(step / 4)
        with torch.no_grad():
            features = encode_without_columns(encoder.eval(), images[step]).double()
        rows = [row for row in range(8) if labels[step, row] >= 0]
        linear.zero_grad()
        loss = sum(-linear(features[row]).log_softmax(0)[labels[step, row]] for row in rows)
        gradients = [torch.zeros_like(parameter) for parameter in linear.parameters()]
        if rows:
            correct += sum(int(linear(features[row]).argmax() == labels[step, row]) for row in rows)
            known += len(rows)
            gradients = torch.autograd.grad(loss / len(rows), list(linear.parameters()))
        rate = 0.25 * (1 + math.cos(math.pi * step / 4))
        for number, (parameter, gradient) in enumerate(zip(linear.parameters(), gradients, strict=True)):
            velocity[number] = 0.9 * velocity[number] + gradient
            parameter.data -= rate * velocity[number]
    assert torch.allclose(probe.classifier.weight.double(), linear.weight, atol=1e-5)
    assert torch.allclose(probe.classifier.bias.double(), linear.bias, atol=1e-5)
    assert probe.take() == {"online_probe_train": correct / known} and probe.take() == {}


def image_table(labels, feature, size=8):
    pixels = [np.full((size, size), 7 * number % 256, np.uint8) for number in range(len(labels))]
    rows = {"image": [PIL.Image.fromarray(one) for one in pixels], "label": labels}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": feature}))


def test_every_image_of_a_stream_keeps_its_label(tmp_path):
    """The brightness of an image shows its row number. The loader must keep each label with its image."""
    labels = [None if row == 5 else row % 3 for row in range(36)]
    table = image_table(labels, ClassLabel(names=["a", "b", "c"]))
    table.to_parquet(tmp_path / "train-0.parquet", batch_size=6)
    config = DataConfig(path=str(tmp_path), streaming=True, shuffle_window=10)
    source = open_source(config)
    found = training_labels(source, config)
    assert found.class_names == ["a", "b", "c"] and found.stream_column == "label"
    preset = ViewPreset(size=8, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, gray=0.0, blur=0.0)
    batches = {}
    for column in ("label", None):
        options = {"config": config, "seed": 1, "batch_size": 6, "label_column": column}
        batches[column] = list(train_loader(source, preset, **options))
    assert len(batches["label"]) == 6
    for batch, without in zip(batches["label"], batches[None], strict=True):
        assert without.labels is None and torch.equal(without.images, batch.images)
        for part in batch.split(4):
            rows = [int(image.max()) // 7 for image in part.images]
            assert found.of(part).tolist() == [-1 if labels[row] is None else labels[row] for row in rows]


def test_a_stream_trains_the_probe(tmp_path):
    made = trainer(
        tmp_path / "run", "data.streaming=true", "data.max_images=null", "evaluation.path=digits",
        "training.max_steps=2",
    )  # fmt: skip
    made.train()
    assert made.online_probe.classifier.weight.abs().sum() > 0
    assert "online_probe_train" in made.state.log_history[1]


def test_labels_of_rows_are_found_by_row_number():
    table = image_table([2, 0, None, 1], ClassLabel(names=["a", "b", "c"]))
    config = DataConfig(path="unused")
    found = training_labels(as_source(table, config), config)
    assert found.by_row.tolist() == [2, 0, -1, 1]
    pairs = [(row["image"], "zebra" if row["label"] else "ant") for row in table]
    found = training_labels(as_source(pairs, config), config)
    assert (found.by_row.tolist(), found.class_names) == ([1, 0, 0, 1], ["ant", "zebra"])


@pytest.mark.parametrize("form", ["table", "items"])
def test_the_probe_and_the_evaluation_use_the_same_column(form):
    table = image_table([0, 1, 1, 0], ClassLabel(names=["a", "b"])).add_column("grade", [7, 7, 3, 5])
    data = table if form == "table" else list(table)
    config = DataConfig(path="unused", label_column="grade")
    found = training_labels(as_source(data, config), config)
    assert found.class_names == ["3", "5", "7"] == label_data(data, config, "test").class_names
    assert found.by_row.tolist() == [2, 2, 0, 1]
    with pytest.raises(UserError, match=mentions("data.label_column", "grade")):
        training_labels(as_source(table.remove_columns("grade"), config), config)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("unlabeled", ["training.online_probe", "data.label_column"]),
        ("images", ["training.online_probe", "data.label_column"]),
        ("empty", ["training.online_probe", "data.label_column"]),
        ("lists", ["training.online_probe", "lists"]),
        ("stream", ["training.online_probe", "ClassLabel", "data.streaming=false"]),
    ],
)
def test_data_without_labels_are_an_error(data, words):
    two = ClassLabel(names=["a", "b"])
    table = image_table([0, 1, 1], two)
    given = {
        "unlabeled": table.remove_columns("label"),
        "images": [row["image"] for row in table],
        "empty": image_table([None, None, None], two),
        "lists": image_table([[0], [0, 1], []], List(two)),
        "stream": image_table(["a", "b", "b"], Value("string")).to_iterable_dataset(),
    }[data]
    config = DataConfig(path="unused", label_column="label" if data == "lists" else None)
    with pytest.raises(UserError, match=mentions(*words)) as error:
        training_labels(as_source(given, config), config)
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


def test_nan_scores_are_wrong():
    probe = OnlineProbe(TrainingLabels(["a", "b"]), 0.1, lambda: None)
    probe.classifier = nn.Linear(2, 2)
    images = SimpleNamespace(labels=torch.tensor([0, 0, 1]), class_names=["a", "b"], description="test")
    nn.init.eye_(probe.classifier.weight), nn.init.zeros_(probe.classifier.bias)
    features = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, 1.0]])
    assert probe.accuracy(features, images) == pytest.approx(2 / 3)


def test_test_images_have_the_classes_of_the_training_images(finished):
    probe = finished.online_probe
    queries = finished.monitor.knn.queries
    features = torch.randn(len(queries), probe.classifier.in_features)
    expected = (probe.classifier(features).argmax(1) == queries.labels).double().mean().item()
    assert probe.accuracy(features, queries) == pytest.approx(expected)
    other = OnlineProbe(TrainingLabels(probe.labels.class_names[::-1]), 0.1, lambda: None)
    other.classifier = nn.Linear(probe.classifier.in_features, 10)
    with torch.no_grad():
        other.classifier.weight.copy_(probe.classifier.weight.flip(0))
        other.classifier.bias.copy_(probe.classifier.bias.flip(0))
    assert other.accuracy(features, queries) == pytest.approx(expected)
    with pytest.raises(UserError, match=mentions("training.online_probe", "9")):
        OnlineProbe(TrainingLabels(["0", "1"]), 0.1, lambda: None).accuracy(
            features,
            type("Images", (), {"labels": torch.tensor([0]), "class_names": ["9"], "description": ""}),
        )


def test_two_processes_equal_one(forks: Forks, tmp_path):
    def job(name, *more):
        return {
            "recipe": "smoke/simclr", "overrides": [*SMALL, *more, f"training.output_dir={tmp_path / name}"],
            "kill_at": None, "weights": str(tmp_path / f"{name}.pt"),
        }  # fmt: skip

    settings = ("training.optimizer=sgd", "training.max_steps=3", "training.monitor_steps=0")
    both = job("two", *settings)
    rank = {**both, "weights": str(tmp_path / "rank.pt")}
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([[job("one", *settings)], [both, rank]]))
    code = "import sys, forked_runs; sys.exit(forked_runs.main(forked_runs.Path(sys.argv[1])))"
    done = forks.run("hf_ssl", code, str(jobs), timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    one, two, other = (torch.load(tmp_path / f"{name}.pt")["probe"] for name in ("one", "two", "rank"))
    assert one["weight"].abs().max() > 1e-3
    for name, value in one.items():
        assert torch.equal(two[name], other[name])
        assert torch.allclose(value, two[name], atol=1e-5), name
