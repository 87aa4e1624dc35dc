# SPDX-License-Identifier: Apache-2.0
"""The modules of the `evaluate` library: they load without network and equal our functions."""

import doctest
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from messages import mentions
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

import hf_ssl
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    class_metrics,
    evaluate_features,
    knn_accuracy,
    lidar,
    linear_probe,
    mean_average_precision,
    rank_me,
)
from hf_ssl.metrics import METRICS, load_metric, metric_folder


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(360) % 3
    features = 1.5 * torch.eye(3, 12)[labels] + torch.randn(360, 12, generator=generator)
    return features[:240], labels[:240], features[240:], labels[240:]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "metrics"))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_documented_and_its_example_is_true(name: str) -> None:
    metric = load_metric(name)
    assert metric.name == name and metric.module_type == "metric"
    assert metric.description and "year" in metric.citation and metric.reference_urls[0].startswith("http")
    assert all(word in metric.inputs_description for word in ("Args:", "Returns:", "predictions"))
    example = doctest.DocTestParser().get_doctest(
        metric.inputs_description, {"hf_ssl": hf_ssl}, name, None, None
    )
    (last,) = [line for line in example.examples if line.want]
    names = {"hf_ssl": hf_ssl}
    for line in example.examples[:-1]:
        exec(line.source, names)
    expected = eval(last.want.partition("#")[0])
    assert eval(last.source, names) == pytest.approx(expected, abs=1e-3)


def test_the_folders_are_those_of_the_table() -> None:
    root = metric_folder("rank_me").parent
    assert {path.parent.name for path in root.glob("*/*.py")} == METRICS.keys()
    assert all((root / name / f"{name}.py").is_file() for name in METRICS)


def test_features_are_classified_as_by_the_command(data) -> None:
    """One definition: the numbers of the modules are those of `hf-ssl evaluate`."""
    train, train_labels, test, test_labels = data
    settings = {"linear": {"learning_rates": [0.1, 1.0], "epochs": 3}}
    protocols = evaluate_features({"settings": settings}, *data)["protocols"]
    by_key = {each["key"]: each for each in protocols}
    given = {"train_features": train, "train_labels": train_labels}
    knn = load_metric("knn_accuracy", **given).compute(predictions=test, references=test_labels)
    assert knn == {"knn_accuracy": by_key["knn_20"]["value"]}
    linear = load_metric("linear_probe", **settings["linear"], **given)
    found = linear.compute(predictions=test.numpy(), references=test_labels.tolist())
    assert found["linear_probe_accuracy"] == by_key["linear_probe"]["value"]
    assert found["learning_rate"] == by_key["linear_probe"]["selection"]["learning_rate"]
    expected = linear_probe(*data, learning_rates=[1.0], epochs=2, standardize=True).accuracy
    options = {"learning_rates": [1.0], "epochs": 2, "standardize": True}
    found = linear.compute(predictions=test, references=test_labels, **options)
    assert found == {"linear_probe_accuracy": expected, "learning_rate": 1.0}, "compute changes the options"


def test_statistics_equal_the_functions(data) -> None:
    rows = data[2]
    assert load_metric("rank_me").compute(predictions=rows)["rank_me"] == pytest.approx(rank_me(rows))
    views = rows.view(30, 4, 12)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    images = (torch.arange(120) // 4 * 7)[order]
    found = load_metric("lidar", delta=0.1).compute(predictions=rows[order], references=images)
    assert found["lidar"] == pytest.approx(lidar(views, delta=0.1))


def test_class_numbers_and_scores_give_the_accuracy_of_classes(data) -> None:
    scores, labels = data[2], data[3]
    metric = load_metric("mean_per_class_accuracy")
    expected = class_metrics(scores, labels)
    found = metric.compute(predictions=scores, references=labels)
    assert found == {
        "mean_per_class_accuracy": expected["mean_per_class"],
        "top_1": expected["top_1"],
        "top_5": expected["top_5"],
    }
    found = metric.compute(predictions=scores.argmax(1), references=labels)
    assert found == {"mean_per_class_accuracy": expected["mean_per_class"]}


def test_several_labels() -> None:
    random = np.random.default_rng(0)
    labels = (random.random((50, 4)) < 0.3).astype(int)
    scores = (labels + random.normal(size=labels.shape)).astype(np.float32)
    metric = load_metric("mean_average_precision")
    for start in range(0, 50, 20):
        metric.add_batch(predictions=scores[start : start + 20], references=labels[start : start + 20])
    assert metric.compute() == {"mean_average_precision": mean_average_precision(scores, labels)}
    area = metric.compute(predictions=scores, references=labels, points=None)
    assert area == {"mean_average_precision": mean_average_precision(scores, labels, None)}


def test_metrics_are_combined(data) -> None:
    train, train_labels, test, test_labels = data
    knn = load_metric("knn_accuracy", train_features=train, train_labels=train_labels, neighbors=5)
    both = evaluate.combine([knn, load_metric("rank_me"), load_metric("mean_per_class_accuracy")])
    for rows, labels in zip(test.split(50), test_labels.split(50), strict=True):
        both.add_batch(predictions=rows, references=labels)
    found = both.compute()
    expected = knn_accuracy(*data, neighbors=[5], temperatures=[0.07])[5, 0.07]
    assert found["knn_accuracy"] == expected
    assert found["rank_me"] == pytest.approx(rank_me(test))
    assert found["mean_per_class_accuracy"] == class_metrics(test, test_labels)["mean_per_class"]


WORKER = """
import sys, torch, hf_ssl
number, cache = int(sys.argv[1]), sys.argv[2]
rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
metric = hf_ssl.load_metric("rank_me", num_process=2, process_id=number, experiment_id="two", cache_dir=cache)
metric.add_batch(predictions=rows[number::2])
print("found", metric.compute())
"""


@pytest.mark.slow
def test_two_processes_collect_one_set_of_rows(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WORKER]
    started = [
        subprocess.Popen(
            [*command, str(number), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    first, second = (process.communicate(timeout=300)[0] for process in started)
    assert second.strip() == "found None"
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert eval(first.strip().removeprefix("found "))["rank_me"] == pytest.approx(rank_me(rows))


class Classifier(nn.Module):
    """A linear classifier with logits and features as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 3)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        logits = self.linear(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "features": pixel_values}


def test_a_trainer_computes_a_metric(data, tmp_path: Path) -> None:
    train, train_labels, test, test_labels = data
    rows = [{"pixel_values": row, "labels": label} for row, label in zip(test, test_labels, strict=True)]
    model = Classifier()
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, per_device_eval_batch_size=50)
    trainer = Trainer(
        model, arguments, eval_dataset=rows, compute_metrics=load_metric("mean_per_class_accuracy")
    )
    found = trainer.evaluate()
    with torch.no_grad():
        expected = class_metrics(model.linear(test), test_labels)
    assert found["eval_mean_per_class_accuracy"] == pytest.approx(expected["mean_per_class"])
    assert found["eval_top_1"] == pytest.approx(expected["top_1"])
    features = load_metric("knn_accuracy", train_features=train, train_labels=train_labels)
    trainer.compute_metrics = features
    found = trainer.evaluate(ignore_keys=["loss", "logits"])
    expected = knn_accuracy(*data, neighbors=[20], temperatures=[0.07])
    assert found["eval_knn_accuracy"] == expected[20, 0.07]


def test_a_trainer_without_labels_is_reported(data) -> None:
    with pytest.raises(UserError, match=mentions("MeanPerClassAccuracy", "label_names")):
        load_metric("mean_per_class_accuracy")(EvalPrediction(data[2].numpy(), None))
    assert load_metric("rank_me")(EvalPrediction(data[2].numpy(), None))["rank_me"] > 1


def test_mistakes_end_in_one_sentence(data) -> None:
    with pytest.raises(UserError, match=mentions("knn_acuracy", "knn_accuracy")):
        load_metric("knn_acuracy")
    with pytest.raises(UserError, match=mentions("neighbours", "neighbors")):
        load_metric("knn_accuracy", neighbours=5)
    with pytest.raises(UserError, match=mentions("train_features")):
        load_metric("linear_probe").compute(predictions=data[2], references=data[3])
    with pytest.raises(UserError, match=mentions("views", 3)):
        load_metric("lidar").compute(predictions=data[2][:5], references=[0, 0, 1, 1, 1])


WRONG = {
    "nothing": ("rank_me", {}, ["predictions", "add_batch"]),
    "no references": ("knn_accuracy", {"predictions": [[1.0]]}, ["references"]),
    "no predictions": ("knn_accuracy", {"references": [1]}, ["predictions"]),
    "no rows": ("rank_me", {"predictions": []}, ["predictions", "none"]),
    "a number": ("rank_me", {"predictions": 3.0}, ["predictions", 3.0]),
    "a flat list": ("rank_me", {"predictions": [1.0, 2.0]}, ["predictions", 1, "(N, D)"]),
    "a cube": ("rank_me", {"predictions": np.zeros((2, 3, 4))}, ["predictions", 3, "(N, D)"]),
    "NaN": ("rank_me", {"predictions": [[1.0, math.nan]]}, ["predictions", "finite"]),
    "other lengths": ("lidar", {"predictions": [[1.0]] * 3, "references": [0]}, [3, 1]),
    "a matrix of labels": ("lidar", {"predictions": [[1.0]], "references": [[0]]}, ["references", "(N,)"]),
    "ragged rows": ("rank_me", {"predictions": [[1.0], [1.0, 2.0]]}, ["predictions", "(N, D)"]),
    "no views": ("lidar", {"predictions": [[1.0]], "references": [0]}, ["1 image"]),
    "no delta": ("lidar", {"predictions": [[1.0]], "references": [0], "delta": 0}, ["delta", 0]),
    "half a bank": (
        "knn_accuracy", {"predictions": [[1.0]], "references": [0], "train_labels": [1]},
        ["train_features", "train_labels"],
    ),
    "half of the images": (
        "linear_probe", {"predictions": [[1.0]], "references": [0], "train_features": [[1.0]]},
        ["train_labels"],
    ),
    "flat labels": (
        "mean_average_precision", {"predictions": [[0.5]], "references": [1]}, ["references", "(N, D)"],
    ),
    "negative classes": (
        "mean_per_class_accuracy", {"predictions": [-1, 0], "references": [0, 0]}, ["predictions", -1],
    ),
    "fractions as classes": (
        "mean_per_class_accuracy", {"predictions": [0.5, 1], "references": [0, 1]},
        ["predictions", "class numbers"],
    ),
    "texts as classes": (
        "knn_accuracy", {"predictions": [[1.0]] * 2, "references": ["a", "b"]},
        ["references", "class numbers"],
    ),
    "probabilities as labels": (
        "mean_average_precision", {"predictions": [[0.5], [0.1]], "references": [[0.99], [1]]},
        ["references", "1, 0 or -1"],
    ),
    "probabilities of a Trainer as labels": (
        "mean_average_precision",
        {"predictions": np.array([[0.5], [0.1]]), "references": np.array([[0.99], [1]], np.float32)},
        ["references", "1, 0 or -1"],
    ),
    "half a neighbor": (
        "knn_accuracy", {"predictions": [[1.0]], "references": [0], "neighbors": 2.5}, ["neighbors", 2.5],
    ),
    "no temperature": (
        "knn_accuracy", {"predictions": [[1.0]], "references": [0], "temperature": None}, ["temperature"],
    ),
    "one rate": (
        "linear_probe", {"predictions": [[1.0]], "references": [0], "learning_rates": 0.1},
        ["learning_rates"],
    ),
    "a tiny delta": ("lidar", {"predictions": [[1.0]], "references": [0], "delta": 1e-30}, ["delta", 1e-30]),
    "half a point": (
        "mean_average_precision", {"predictions": [[0.5]], "references": [[1]], "points": 2.5},
        ["points", 2.5],
    ),
}  # fmt: skip
"""Name of a mistake -> metric, arguments of `compute`, and parts of the message."""


@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_arguments_say_what_to_pass(mistake: str) -> None:
    name, arguments, parts = WRONG[mistake]
    with pytest.raises(UserError, match=mentions(*parts)) as raised:
        load_metric(name).compute(**arguments)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


class OnGpu:
    """Class numbers on a GPU, which NumPy cannot read."""

    ndim = 1

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, *_: object) -> np.ndarray:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def detach(self) -> "OnGpu":
        return self

    def cpu(self) -> np.ndarray:
        return np.array(self.values)


def test_class_numbers_on_a_gpu_are_checked() -> None:
    metric = load_metric("knn_accuracy")
    metric._check_rows({"predictions": [[1.0], [2.0]], "references": OnGpu([0, 1])})
    with pytest.raises(UserError, match=mentions("references", "class numbers")):
        metric._check_rows({"predictions": [[1.0], [2.0]], "references": OnGpu([0, 0.5])})


def test_rows_that_are_added_are_checked() -> None:
    metric = load_metric("knn_accuracy")
    with pytest.raises(UserError, match=mentions("knn_accuracy", 2, 1)):
        metric.add_batch(predictions=[[1.0], [2.0]], references=[0])


def test_the_command_does_not_import_the_library() -> None:
    """The import of the library takes a second, so only the modules and `load_metric` import it."""
    root = Path(hf_ssl.__file__).parent
    lines = {
        path.relative_to(root).as_posix(): found
        for path in root.rglob("*.py")
        if (found := re.findall(r"^( *)(?:import|from) evaluate\b", path.read_text(), re.MULTILINE))
    }
    modules = {f"metrics/{name}/{name}.py" for name in METRICS}
    assert lines.keys() == modules | {"metrics/__init__.py", "metrics/options.py"}
    assert lines["metrics/__init__.py"] == ["    "], "deferred"
    importing = {path for path in root.rglob("*.py") if "hf_ssl.metrics.options" in path.read_text()}
    assert {path.relative_to(root).as_posix() for path in importing} == modules
