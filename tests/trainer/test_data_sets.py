# SPDX-License-Identifier: Apache-2.0
"""`SSLTrainer` as users of transformers' Trainer call it: each argument works or is rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from hub_server import HubServer
from huggingface_hub import ModelCard
from messages import mentions
from tiers import in_tiers
from torch.utils.data import DataLoader
from transformers import (
    BitImageProcessor,
    ConvNextV2Config,
    EarlyStoppingCallback,
    ResNetConfig,
    ResNetModel,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

from hf_ssl import (
    BYOLForPreTraining,
    DINOConfig,
    DINOForPreTraining,
    MAEForPreTraining,
    SimCLRConfig,
    SimCLRForPreTraining,
    SSLTrainer,
    SSLTrainingArguments,
)
from hf_ssl.errors import UserError
from hf_ssl.evaluation import has_attention
from hf_ssl.modeling.outputs import RunProgress

ROWS = 32
TINY = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def picture(row: int) -> PIL.Image.Image:
    """Bright pictures are of class 1, dark ones of class 0."""
    noise = np.random.default_rng(row).integers(0, 100, (20, 20, 3))
    return PIL.Image.fromarray((noise + 150 * (row % 2)).astype(np.uint8))


@pytest.fixture(scope="module")
def table() -> Dataset:
    features = Features({"image": Image(), "label": ClassLabel(names=["dark", "bright"])})
    rows = {"image": [picture(row) for row in range(ROWS)], "label": [row % 2 for row in range(ROWS)]}
    return Dataset.from_dict(rows, features=features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for row in range(ROWS):
        place = root / ("test" if row % 8 > 5 else "train") / ("bright" if row % 2 else "dark")
        place.mkdir(parents=True, exist_ok=True)
        picture(row).save(place / f"{row}.png")
    return root


def model() -> SimCLRForPreTraining:
    torch.manual_seed(0)
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=ResNetConfig(**TINY), views={"size": 16}))


def arguments(output: Path, **changes: Any) -> SSLTrainingArguments:
    values = {
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, "monitor_steps": 0, "save_strategy": "no",
    }  # fmt: skip
    return SSLTrainingArguments(**values | changes)


class Pictures(torch.utils.data.Dataset):
    def __init__(self, label: bool = False) -> None:
        self.label = label

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> Any:
        return (picture(row), row % 2) if self.label else picture(row)


TRAINING: dict[str, Callable[[Dataset, Path], Any]] = {
    "Dataset": lambda table, folder: table,
    "mapped": lambda table, folder: table.map(lambda row: row),
    "IterableDataset": lambda table, folder: table.to_iterable_dataset(num_shards=2),
    "mapped stream": lambda table, folder: table.to_iterable_dataset().map(lambda row: row),
    "torch": lambda table, folder: Pictures(),
    "torch with labels": lambda table, folder: Pictures(label=True),
    "paths": lambda table, folder: sorted(folder.rglob("*.png")),
    "folder": lambda table, folder: str(folder),
    "imagefolder": lambda table, folder: load_dataset("imagefolder", data_dir=folder, split="train"),
}


@pytest.mark.parametrize("kind", in_tiers(zip(TRAINING), list(zip(TRAINING))[::4]))
def test_it_trains_on_every_kind_of_data(kind: str, table: Dataset, folder: Path, tmp_path: Path) -> None:
    trainer = SSLTrainer(model(), arguments(tmp_path), train_dataset=TRAINING[kind](table, folder))
    result = trainer.train()
    assert (result.global_step, trainer.args.batch_size) == (2, 8)
    assert np.isfinite(result.training_loss)


def test_a_dataset_and_the_same_source_give_the_same_weights(table: Dataset, tmp_path: Path) -> None:
    weights = []
    for data in (table, Pictures()):
        trainer = SSLTrainer(model(), arguments(tmp_path, max_steps=3), train_dataset=data)
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, tensor in weights[0].items():  # row numbers decide the order and the augmentation
        torch.testing.assert_close(tensor, weights[1][name])


def test_a_short_stream_has_a_monitor_and_resumes_exactly(table: Dataset, tmp_path: Path) -> None:
    """Nobody knows the length of a stream: the monitor takes as many images as there are."""

    def trainer(folder: str) -> SSLTrainer:
        args = arguments(
            tmp_path / folder,
            max_steps=6,
            monitor_steps=2,
            monitor_neighbors=3,
            save_strategy="steps",
            save_steps=2,
        )
        stream = table.to_iterable_dataset(num_shards=4).map(lambda row: {"image": row["image"]})
        return SSLTrainer(model(), args, train_dataset=stream, eval_dataset=table)

    whole, resumed = trainer("a"), trainer("b")
    whole.train()
    assert len(whole.monitor.images) == ROWS
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def halves(table: Dataset) -> tuple[Dataset, Dataset]:
    return table.select(range(16)), table.select(range(16, 32))


def evaluation(table: Dataset) -> dict[str, tuple[Any, set[str]]]:
    """Forms of `eval_dataset` with the names of their k-NN accuracies."""
    first, second = halves(table)
    return {
        "labeled": (table, {"eval_knn"}),
        "torch": (Pictures(label=True), {"eval_knn"}),
        "train and test": (DatasetDict(train=first, test=second), {"eval_knn"}),
        "bank and query": ({"bank": first, "query": second}, {"eval_knn"}),
        "several": ({"easy": first, "hard": second}, {"eval_easy_knn", "eval_hard_knn"}),
    }


FORMS = ["labeled", "torch", "train and test", "bank and query", "several"]


@pytest.mark.parametrize("form", in_tiers(zip(FORMS), [("torch",), ("several",)]))
def test_it_measures_every_form_of_eval_dataset(form: str, table: Dataset, tmp_path: Path) -> None:
    data, names = evaluation(table)[form]
    args = arguments(tmp_path, monitor_steps=1, monitor_neighbors=3)
    trainer = SSLTrainer(model(), args, train_dataset=table, eval_dataset=data)
    trainer.train()
    metrics = trainer.evaluate()
    assert {name for name in metrics if name.endswith("knn")} == names
    assert min(metrics[name] for name in names) > 0.9  # brightness separates the classes
    assert {"eval_loss", "eval_rank_me", "eval_embedding_std"} <= metrics.keys()
    logged = [record for record in trainer.state.log_history if names <= record.keys()]
    assert [record["step"] for record in logged] == [0, 1, 2, 2]


def test_evaluate_measures_other_data(table: Dataset, tmp_path: Path) -> None:
    wrong = table.map(lambda row, number: {"label": number // 16}, with_indices=True)
    args = arguments(tmp_path, monitor_neighbors=3)
    trainer = SSLTrainer(model(), args, train_dataset=table, eval_dataset={"a": table, "b": wrong})
    assert set(trainer.evaluate(table, metric_key_prefix="test")) == {"test_knn", "epoch"}
    assert trainer.evaluate(table)["eval_knn"] > 0.9 > trainer.evaluate(wrong)["eval_knn"]
    assert set(trainer.evaluate("b")) == {"eval_b_knn", "epoch"}
    with pytest.raises(UserError, match=mentions("label_column", "image")):
        trainer.evaluate(table.remove_columns("label"))


def test_names_of_eval_dataset(table: Dataset, tmp_path: Path) -> None:
    first, second = halves(table)
    pair = {"bank": first, "query": second}

    def trainer(data: Any) -> SSLTrainer:
        args = arguments(tmp_path, monitor_neighbors=3)
        return SSLTrainer(model(), args, train_dataset=table, eval_dataset=data)

    for data, names in (
        ({1: table, 2: table}, {"eval_1_knn", "eval_2_knn"}),
        ({"a": pair, "b": {"train": first, "test": second}}, {"eval_a_knn", "eval_b_knn"}),
        (DatasetDict(train=first, validation=second), {"eval_knn"}),
        (DatasetDict(train=first), {"eval_train_knn"}),
    ):
        assert {name for name in trainer(data).evaluate() if name.endswith("knn")} == names
    assert set(trainer({1: table}).evaluate(1)) == {"eval_1_knn", "epoch"}
    with pytest.raises(UserError, match=mentions("eval_dataset", "flower", "flowers")):
        trainer({"flowers": table}).evaluate("flower")
    for data, names in (
        ({}, ["eval_dataset", "empty"]),
        ({"bank": table}, ["eval_dataset", "bank and query"]),
        (pair | {"other": table}, ["eval_dataset", "other"]),
        ({"a": {"query": table}}, ["eval_dataset['a']", "query"]),
        ({"a": {"b": table}}, ["eval_dataset['a']['b']"]),
        ({"a": None}, ["eval_dataset['a']", "NoneType"]),
    ):
        with pytest.raises(UserError, match=mentions(*names)):
            trainer(data)


@pytest.mark.parametrize("rows", [[0], [0, 2, 4]])
def test_images_of_one_class_measure_nothing(rows: list[int], table: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("labels", "2 classes", len(rows))):
        SSLTrainer(model(), arguments(tmp_path), train_dataset=table, eval_dataset=table.select(rows))


RESULTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prefix": ({"eval_mine": 0.5}, {"eval_mine": 0.5}),
    "nested": ({"mine": {"a": 1, "b": {"c": 2}}}, {"eval_mine_a": 1, "eval_mine_b_c": 2}),
    "number": ({1: 0.5}, {"eval_1": 0.5}),
    "tensor": ({"mine": torch.tensor(0.5)}, {"eval_mine": 0.5}),
    "tensor with a dimension": ({"mine": torch.tensor([0.5])}, {"eval_mine": 0.5}),
    "array": ({"mine": np.float32(0.5)}, {"eval_mine": 0.5}),
    "arrays": ({"mine": np.array(0.5), "all": np.ones(2)}, {"eval_mine": 0.5, "eval_all": [1.0, 1.0]}),
    "empty": ({}, {}),
}


@pytest.mark.parametrize("kind", RESULTS)
def test_results_of_compute_metrics_become_plain_data(kind: str, table: Dataset, tmp_path: Path) -> None:
    returned, expected = RESULTS[kind]
    trainer = SSLTrainer(
        model(), arguments(tmp_path), train_dataset=table, eval_dataset=table,
        compute_metrics=lambda prediction: returned,
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert expected.items() <= metrics.items()
    assert json.loads(json.dumps(trainer.state.log_history[-1])) == trainer.state.log_history[-1]
    assert len(trainer.evaluate(table, metric_key_prefix="test")) == len(expected) + 2  # knn and epoch


def test_compute_metrics_that_fail_end_in_one_sentence(table: Dataset, tmp_path: Path) -> None:
    for function, names in (
        (lambda prediction: None, ["None"]),
        (lambda prediction: 0.5, [0.5]),
        (lambda prediction: 1 / 0, ["ZeroDivisionError"]),
        (lambda prediction, other: {}, ["TypeError", "other"]),
        (lambda prediction: {"mine": object()}, ["object", "JSON"]),
        (lambda prediction: {"knn": 1.0}, ["knn", "my_knn"]),
        (lambda prediction: {"eval_loss": 1.0}, ["eval_loss", "my_loss"]),
    ):
        trainer = SSLTrainer(
            model(), arguments(tmp_path), train_dataset=table, eval_dataset=table, compute_metrics=function
        )
        with pytest.raises(UserError, match=mentions("compute_metrics", *names)):
            trainer.evaluate()


def test_compute_metrics_without_labeled_images_are_reported(
    table: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = SSLTrainer(model(), arguments(tmp_path), train_dataset=table, compute_metrics=len)
    trainer.evaluate()
    assert "compute_metrics" in caplog.text and "eval_dataset" in caplog.text


def test_settings_of_the_data_can_be_a_dict(table: Dataset, tmp_path: Path) -> None:
    two = table.rename_column("image", "a").add_column("b", [0] * ROWS).map(lambda row: {"b": row["a"]})
    trainer = SSLTrainer(
        model(), arguments(tmp_path), train_dataset=two, data={"image_column": "a", "max_images": 20}
    )
    assert (trainer.source.image_column, trainer.source.num_rows) == ("a", 20)
    with pytest.raises(UserError, match=mentions("data.chanels", "data.channels")):
        SSLTrainer(model(), arguments(tmp_path), train_dataset=table, data={"chanels": 1})


def test_compute_metrics_gets_features_and_labels(table: Dataset, tmp_path: Path) -> None:
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.tolist()))
        return {"mine": 0.25}

    args = arguments(tmp_path, monitor_neighbors=3)
    trainer = SSLTrainer(
        model(), args, train_dataset=table, eval_dataset=table, compute_metrics=compute_metrics
    )
    assert trainer.evaluate()["eval_mine"] == 0.25
    assert seen == [((ROWS, 16), [0, 1] * 16)]


def test_early_stopping_and_the_best_model(table: Dataset, tmp_path: Path) -> None:
    args = arguments(
        tmp_path, max_steps=30, monitor_steps=1, save_strategy="steps", save_steps=1, learning_rate=0.0,
        load_best_model_at_end=True, metric_for_best_model="eval_knn", greater_is_better=True,
    )  # fmt: skip
    trainer = SSLTrainer(
        model(), args, train_dataset=table, eval_dataset=table, callbacks=[EarlyStoppingCallback(2)]
    )
    assert trainer.train().global_step < 30
    assert trainer.state.best_model_checkpoint is not None


def test_views_that_are_too_small_for_the_encoder_are_reported(table: Dataset, tmp_path: Path) -> None:
    encoder = ConvNextV2Config(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
    small = SimCLRForPreTraining(SimCLRConfig(backbone_config=encoder, views={"size": 16}))
    with pytest.raises(UserError, match=mentions("backbone", 16, "convnextv2")):
        SSLTrainer(small, arguments(tmp_path), train_dataset=table)
    assert small.training and {p.device.type for p in small.parameters()} == {"cpu"}


def test_predict_returns_the_features_in_order(table: Dataset, tmp_path: Path) -> None:
    trainer = SSLTrainer(model(), arguments(tmp_path), train_dataset=table)
    assert trainer.train_dataset is table
    everything = trainer.predict(Pictures()).predictions
    assert everything.shape == (ROWS, 16)
    np.testing.assert_allclose(
        trainer.predict(table.select([3, 7])).predictions, everything[[3, 7]], rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match=mentions("test_dataset", "stream")):
        trainer.predict(table.to_iterable_dataset())
    with pytest.raises(UserError, match=mentions("test_dataset['a']")):
        trainer.predict({"a": table})
    for name in ("prediction_step", "evaluation_loop", "get_eval_dataloader", "get_test_dataloader"):
        with pytest.raises(UserError, match=mentions(name)):
            getattr(trainer, name)(trainer.model, {}, False)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("evaluation_loop", "evaluate"),
        ("_get_train_sampler", "get_train_dataloader"),
        ("get_decay_parameter_names", "create_optimizer"),
    ],
)
def test_a_method_that_is_not_called_cannot_be_overridden(name: str, advice: str) -> None:
    with pytest.raises(UserError, match=mentions(f"Mine.{name}", advice)):
        type("Mine", (SSLTrainer,), {name: lambda self: None})
    if not name.startswith("eval"):
        type("Mine", (SSLTrainer,), {name: lambda self: None, advice: lambda self: None})


def test_plain_arguments_of_transformers_get_our_defaults(table: Dataset, tmp_path: Path) -> None:
    plain = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=16, weight_decay=0.5, use_cpu=True,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = SSLTrainer(model(), plain, train_dataset=table)
    args = trainer.args
    assert isinstance(args, SSLTrainingArguments)
    assert (args.max_steps, args.batch_size, args.weight_decay) == (1, 16, 0.5)
    assert args.output_dir == str(tmp_path)
    assert args.lr_scheduler_type == "cosine_with_min_lr" and args.learning_rate == 1e-3
    assert trainer.train().global_step == 1


def test_batch_sizes_agree(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    assert (args.batch_size, args.per_device_train_batch_size) == (16, 8)
    args = arguments(tmp_path, per_device_train_batch_size=0, batch_size=64, gradient_accumulation_steps=2)
    assert (args.batch_size, args.per_device_train_batch_size) == (64, 32)
    assert arguments(tmp_path, per_device_train_batch_size=0).batch_size == 256
    with pytest.raises(
        UserError, match=mentions("training.batch_size", "per_device_train_batch_size", 64, 8)
    ):
        arguments(tmp_path, batch_size=64)


def test_own_optimizers_work(table: Dataset, tmp_path: Path) -> None:
    def trainer(**options: Any) -> SSLTrainer:
        return SSLTrainer(model(), arguments(tmp_path), train_dataset=table, **options)

    class Own(SSLTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    cls = trainer(
        optimizer_cls_and_kwargs=(torch.optim.RMSprop, {"lr": 0.02, "weight_decay": 0.3, "alpha": 0.5})
    )
    groups = cls.create_optimizer().param_groups
    assert type(cls.optimizer) is torch.optim.RMSprop and groups[0]["alpha"] == 0.5
    assert {(group["lr"], group["weight_decay"]) for group in groups} == {(0.02, 0.3), (0.02, 0.0)}
    first = model()
    given = torch.optim.SGD(first.parameters(), lr=0.1)
    own = SSLTrainer(first, arguments(tmp_path), train_dataset=table, optimizers=(given, None))
    assigned = trainer()
    assigned.optimizer = torch.optim.SGD(assigned.model.parameters(), lr=0.1)
    early = trainer()
    early.create_optimizer_and_scheduler(2)
    overridden = Own(model(), arguments(tmp_path), train_dataset=table)
    for one in (cls, own, assigned, early, overridden):
        before = {name: value.clone() for name, value in one.model.state_dict().items()}
        assert one.train().global_step == 2
        assert any(not torch.equal(value, before[name]) for name, value in one.model.state_dict().items())


def test_own_loader_and_loss_work(table: Dataset, tmp_path: Path) -> None:
    class Own(SSLTrainer):
        def get_train_dataloader(self):
            return DataLoader([{"pixel_values": torch.randn(2, 3, 16, 16)} for _ in range(16)], batch_size=8)

    losses = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        losses.append(outputs.loss)
        return 2 * outputs.loss

    options = {"train_dataset": table, "compute_loss_func": loss_func}
    trainer = Own(model(), arguments(tmp_path, logging_steps=1, warmup_epochs=1), **options)
    trainer.train()
    assert len(losses) == 2
    # The epoch of this loader counts, not that of the table.
    assert trainer.steps_per_epoch == 2 != len(table) // 8
    assert trainer.state.log_history[0]["learning_rate"] == 0
    assert trainer.state.log_history[1]["learning_rate"] == pytest.approx(trainer.args.learning_rate / 2)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2 * losses[0].item(), rel=1e-5)
    with pytest.raises(UserError, match=mentions("training.contrastive_chunk_size", "objective")):
        SSLTrainer(model(), arguments(tmp_path, contrastive_chunk_size=4), **options)


@pytest.mark.parametrize(("bank", "query"), [("bank", "query"), ("train", "test")])
def test_the_monitor_compares_classes_by_name(table: Dataset, tmp_path: Path, bank: str, query: str) -> None:
    features = table.features.copy()
    features["label"] = ClassLabel(names=["bright", "dark"])
    rows = {"image": table["image"][:], "label": [1 - label for label in table["label"]]}
    turned = Dataset.from_dict(rows, features=features)  # the same classes with other numbers
    trainer = SSLTrainer(
        model(), arguments(tmp_path), train_dataset=table, eval_dataset={bank: table, query: turned}
    )
    assert trainer.classifiers[""].queries.labels.tolist() == table["label"][:]


def test_a_run_from_a_trained_encoder_is_guarded(table: Dataset, tmp_path: Path) -> None:
    settings = {"train_dataset": table, "eval_dataset": table}
    started = SimCLRForPreTraining.from_backbone(ResNetModel(ResNetConfig(**TINY)), views={"size": 16})
    assert len(SSLTrainer(started, arguments(tmp_path), **settings).alarms) == 2
    assert len(SSLTrainer(model(), arguments(tmp_path), **settings).alarms) == 1
    settings["eval_dataset"] = {"easy": table, "hard": table}
    guards = SSLTrainer(started, arguments(tmp_path), **settings).alarms[1:]
    records = [{"step": step, "eval_easy_knn": 1.0, "eval_hard_knn": 1 - step} for step in (0.0, 0.5, 1.0)]
    assert [guard.find_problem(records) is not None for guard in guards] == [False, True]


class Measuring(SimCLRForPreTraining):
    """A method outside of hf_ssl with a measurement of its own."""

    class Config(SimCLRConfig):
        model_type = "ssl_measuring"

    config_class = Config

    def measurements(self, embeddings: dict[str, Any]) -> dict[str, float]:
        return {"mine": 0.5}


def test_the_measurement_of_an_own_method_can_select_the_best_model(table: Dataset, tmp_path: Path) -> None:
    own = Measuring(Measuring.Config(backbone_config=ResNetConfig(**TINY), views={"size": 16}))
    args = arguments(tmp_path, metric_for_best_model="mine", greater_is_better=True, monitor_steps=1)
    trainer = SSLTrainer(own, args, train_dataset=table)
    trainer.train()
    assert trainer.state.best_metric == 0.5
    with pytest.raises(UserError, match=mentions("metric_for_best_model", "eval_mine")):
        SSLTrainer(model(), args, train_dataset=table)


def test_a_second_run_in_one_folder_is_rejected_or_resumed(table: Dataset, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    SSLTrainer(model(), arguments(tmp_path, **saving), train_dataset=table).train()
    again = SSLTrainer(model(), arguments(tmp_path, max_steps=3, **saving), train_dataset=table)
    with pytest.raises(
        UserError, match=mentions("training.output_dir", "checkpoint-2", "resume_from_checkpoint")
    ):
        again.train()
    assert again.train(resume_from_checkpoint=True).global_step == 3
    SSLTrainer(model(), arguments(tmp_path), train_dataset=table).train()  # saves no checkpoints


def test_model_init_is_called_once_with_the_seed(table: Dataset, tmp_path: Path) -> None:
    def build() -> SimCLRForPreTraining:
        return SimCLRForPreTraining(SimCLRConfig(backbone_config=ResNetConfig(**TINY), views={"size": 16}))

    first, second = (
        SSLTrainer(args=arguments(tmp_path, seed=3), train_dataset=table, model_init=build) for _ in range(2)
    )
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert first.train().global_step == 2


REJECTED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "data_collator": ({"data_collator": list}, ["data_collator", "model.config.views"]),
    "processing_class": ({"processing_class": object()}, ["processing_class", "views"]),
    "logits": ({"preprocess_logits_for_metrics": max}, ["preprocess_logits_for_metrics", "compute_metrics"]),
    "no data": ({"train_dataset": None}, ["train_dataset"]),
    "several splits": (
        {"train_dataset": DatasetDict(train=Dataset.from_dict({}))},
        ["train_dataset['train']"],
    ),
    "no model": ({"model": None}, ["model", "model_init"]),
    "an encoder": ({"model": ResNetModel(ResNetConfig(**TINY))}, ["ResNetModel", "from_backbone"]),
    "eval stream": ({"eval_dataset": "stream"}, ["eval_dataset", "stream"]),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_has_no_meaning_is_rejected_with_advice(case: str, table: Dataset, tmp_path: Path) -> None:
    changes, names = REJECTED[case]
    options = {"model": model(), "args": arguments(tmp_path), "train_dataset": table} | changes
    if options.get("eval_dataset") == "stream":
        options["eval_dataset"] = table.to_iterable_dataset()
    with pytest.raises(UserError, match=mentions(*names)):
        SSLTrainer(**options)


@pytest.mark.parametrize("method", [SimCLRForPreTraining, BYOLForPreTraining, MAEForPreTraining])
@pytest.mark.parametrize("how", ["from_backbone", "from_pretrained"])
def test_a_method_starts_from_an_encoder(method: Any, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = ViTModel(ViTConfig(**VIT))
    encoder.save_pretrained(tmp_path)
    started = getattr(method, how)(tmp_path)
    assert type(started.backbone) is ViTModel and started.config.backbone_config.hidden_size == 32
    for part in (started.backbone, started.exported_encoder):
        weights = part.state_dict()
        for name, tensor in encoder.state_dict().items():
            assert "pooler" in name or torch.equal(weights[name], tensor), name


def test_a_method_rejects_an_encoder_that_it_cannot_train(tmp_path: Path) -> None:
    encoder = ResNetModel(ResNetConfig(**TINY))
    encoder.save_pretrained(tmp_path)
    for start in (MAEForPreTraining.from_backbone, MAEForPreTraining.from_pretrained):
        with pytest.raises(UserError, match=mentions("backbone", "mae", "resnet", "vit")):
            start(tmp_path)


def test_a_start_that_is_no_encoder_gets_a_sentence(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "method")
    (tmp_path / "empty").mkdir()
    for place, parts in (
        (tmp_path / "method", ["method model", "export"]),
        (tmp_path / "empty", [str(tmp_path / "empty")]),
        ("./missing", ["./missing", "folder", "Hub"]),
    ):
        with pytest.raises(UserError, match=mentions("encoder", *parts)):
            SimCLRForPreTraining.from_backbone(place)


def test_too_few_images_get_the_sentence_of_the_command_line(table: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions("at least 2 images", 1)):
        SSLTrainer(model(), arguments(tmp_path), train_dataset=table.select([0]))
    with pytest.raises(UserError, match=mentions("training.batch_size", "simclr", 2, 1)):
        SSLTrainer(model(), arguments(tmp_path, per_device_train_batch_size=1), train_dataset=table)


def test_views_must_fit_the_patches_of_the_encoder(table: Dataset, tmp_path: Path) -> None:
    vit = SimCLRForPreTraining.from_backbone(ViTModel(ViTConfig(**VIT)), views={"size": 18})
    with pytest.raises(UserError, match=mentions("views.size", "backbone.patch_size", 18)):
        SSLTrainer(vit, arguments(tmp_path), train_dataset=table)


def test_views_have_the_size_of_an_encoder_with_positions(table: Dataset, tmp_path: Path) -> None:
    """Users of the published encoder would otherwise have to pass `interpolate_pos_encoding`."""
    config = SimCLRConfig(backbone_config=ViTConfig(**VIT), views={"size": 24})
    with pytest.raises(UserError, match=mentions("views.size", 24, f"views.enlarge={VIT['image_size']}")):
        SSLTrainer(SimCLRForPreTraining(config), arguments(tmp_path), train_dataset=table)


def test_patch_sizes_can_be_pairs(table: Dataset, tmp_path: Path) -> None:
    encoder = ViTModel(ViTConfig(**{**VIT, "patch_size": [8, 8]}))
    assert has_attention(encoder)
    started = SimCLRForPreTraining.from_backbone(encoder, views={"size": 30})
    with pytest.raises(UserError, match=mentions("views.size", "backbone.patch_size=8", 30)):
        SSLTrainer(started, arguments(tmp_path), train_dataset=table)


def test_the_views_of_a_start_follow_a_processor_without_normalization(tmp_path: Path) -> None:
    encoder = ResNetModel(ResNetConfig(**TINY))
    encoder.save_pretrained(tmp_path)
    processor = BitImageProcessor(do_normalize=False, crop_size={"height": 24, "width": 24})
    processor.save_pretrained(tmp_path)
    views = SimCLRForPreTraining.from_backbone(tmp_path).config.views
    assert (views["size"], list(views["mean"]), list(views["std"])) == (24, [0.0] * 3, [1.0] * 3)


def test_scheduled_values_follow_a_loaded_checkpoint(tmp_path: Path) -> None:
    model = DINOForPreTraining(DINOConfig(backbone_config=ResNetConfig(**TINY), output_size=8))
    model.before_step(RunProgress(step=5, total_steps=10, steps_per_epoch=1))
    model.save_pretrained(tmp_path)
    loaded = DINOForPreTraining.from_pretrained(tmp_path)
    assert loaded._momentum.value == pytest.approx(model._momentum.value)
    assert loaded._teacher_temperature.value == pytest.approx(model._teacher_temperature.value)


def test_the_names_of_k_nn_measurements_are_known_before_training(table: Dataset, tmp_path: Path) -> None:
    """The keys `train` and `test` form one measurement, `eval_knn`."""
    pair = {"train": table, "test": table}
    args = arguments(tmp_path, metric_for_best_model="test_knn")
    with pytest.raises(UserError, match=mentions("metric_for_best_model", "eval_test_knn", "eval_knn")):
        SSLTrainer(model(), args, train_dataset=table, eval_dataset=pair)


def test_images_without_views_are_explained() -> None:
    with pytest.raises(UserError, match=mentions("pixel_values", (4, 3, 16, 16), "pixel_values[:, None]")):
        model()(torch.zeros(4, 3, 16, 16))


def test_a_card_has_the_given_metadata(table: Dataset, tmp_path: Path) -> None:
    trainer = SSLTrainer(model(), arguments(tmp_path), train_dataset=table)
    trainer.create_model_card(license="mit", tags="flowers", finetuned_from="a/b", dataset_tags="c/d")
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.base_model, data.datasets) == ("mit", "a/b", "c/d")
    assert {"flowers", "hf_ssl", "simclr"} <= set(data.tags) and data.library_name == "transformers"
    before = (tmp_path / "README.md").read_text()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == before
    with pytest.raises(UserError, match=mentions("tasks", "evaluate_encoder")):
        trainer.create_model_card(tasks="image-classification")
    (tmp_path / "facts.json").write_text("{}")
    with pytest.raises(UserError, match=mentions("create_model_card", "README.md")):
        trainer.create_model_card(license="mit")


def test_a_script_publishes_its_encoder(online: HubServer, table: Dataset, tmp_path: Path) -> None:
    """`push_to_hub()` needs no argument: the repository has the name of the output folder."""
    trainer = SSLTrainer(model(), arguments(tmp_path / "flowers"), train_dataset=table)
    trainer.train()
    trainer.push_to_hub()
    files = online.store.model(trainer.hub_model_id).head.files
    assert trainer.hub_model_id.endswith("/flowers")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= files.keys()
