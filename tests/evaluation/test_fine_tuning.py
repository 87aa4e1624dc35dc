# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning against a loop of torch, its classifiers for every kind of encoder, exact resumption, and two
processes."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from messages import mentions, missing
from tiers import in_tiers
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, AutoModel, BitImageProcessor, ViTConfig

from hf_ssl.data import DataConfig, label_data
from hf_ssl.errors import UserError
from hf_ssl.evaluation import evaluate_encoder
from hf_ssl.evaluation.augmented import AugmentedImages, crop_and_flip
from hf_ssl.evaluation.classifiers import FeatureClassifier, new_classifier
from hf_ssl.evaluation.fine_tuning import (
    Optimization,
    mixup_weight,
    neighbors,
    predict,
    train_classifier,
)
from hf_ssl.evaluation.label_trainer import training_folder
from hf_ssl.evaluation.protocols import fine_tune
from hf_ssl.modeling.backbones import set_identity_pooler
from hf_ssl.modeling.pooling import declare_feature, pool, pooling_rule

VIT = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32,
    "patch_size": 8, "image_size": 16,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
ENCODERS = {
    "resnet": RESNET,
    "convnextv2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "vit": VIT | {"pooler_act": "linear"},
    "ijepa": VIT,
    "dinov2": VIT,
    "dinov3_vit": VIT | {"num_register_tokens": 1},
}
PROCESSOR = BitImageProcessor(
    size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, resample=2,
    image_mean=[0.5] * 3, image_std=[0.3] * 3,
)  # fmt: skip
SETTINGS = Optimization(
    optimizer="sgd", learning_rate=0.05, weight_decay=0.01, layer_decay=1.0, mixup=0.0, label_smoothing=0.0,
    epochs=2, batch_size=8, warmup_epochs=0.0, frozen="none",
)  # fmt: skip
CPU = torch.device("cpu")


def new_encoder(kind: str, **changes):
    torch.manual_seed(0)
    encoder = AutoModel.from_config(CONFIG_MAPPING[kind](**(ENCODERS[kind] | changes)))
    set_identity_pooler(encoder)
    return encoder.eval()


def classifier(encoder, classes: int = 3, native: bool = True):
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rule = pooling_rule(encoder, encoder(pixel_values=pixels))
    return new_classifier(encoder, classes, pixels, rule, native=native)


@pytest.fixture(scope="module")
def data():
    """Forty images of three classes, which differ in color."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    noise = torch.randint(0, 120, (40, 3, 20, 20), generator=generator)
    images = (noise + 100 * torch.eye(3)[labels][:, :, None, None]).to(torch.uint8)
    pairs = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    return label_data(pairs, DataConfig(), "train"), labels


def augmented(data, seed: int = 0) -> AugmentedImages:
    return AugmentedImages(data[0], crop_and_flip(PROCESSOR, data[0], 0.5, 0.5), seed)


def fine_tuned(kind: str, data, folder: Path | None = None, encoder=None, kill_at: int = 0, **changes):
    """Return a trained model. After reading `kill_at` batches, the process ends as by `kill -9`."""
    found = classifier(encoder or new_encoder(kind))
    settings = Optimization(**(vars(SETTINGS) | changes))
    images, read = augmented(data), AugmentedImages.read
    if kill_at:
        batches = iter(range(kill_at))
        images.read = lambda rows: (  # type: ignore[method-assign]
            read(images, rows) if next(batches, None) is not None else os.kill(os.getpid(), signal.SIGKILL)
        )
    train_classifier(
        found, images, np.arange(len(data[1])), data[1], settings, where="fine_tune", seed=0, device=CPU,
        folder=folder,
    )  # fmt: skip
    return found.model


def same(first, second, **tolerance) -> None:
    torch.testing.assert_close(first.state_dict(), second.state_dict(), **tolerance)


def test_checkpoints_belong_to_the_images_and_the_feature() -> None:
    """Other images with the same labels do not resume a training, nor does a head on another feature."""
    config, labels = fine_tune.Config(folder="folder"), torch.tensor([0, 1])
    folders = []
    for value, pooling in ((1.0, "cls"), (1.0, "cls"), (2.0, "cls"), (1.0, "mean")):
        inputs: Any = SimpleNamespace(seed=0, dtype=None, pooling=pooling)
        pixels = torch.full((2, 3, 4, 4), value)
        images: Any = SimpleNamespace(preset=None, read=lambda rows, pixels=pixels: list(pixels[rows]))
        task = fine_tune.Task(inputs, config, images, torch.zeros(1), labels, labels)
        torch.manual_seed(0)
        folders.append(task._folder(torch.nn.Linear(2, 2), np.arange(2), SETTINGS))
    assert folders[0] == folders[1] and len(set(folders)) == 3


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("resnet", False), ("convnextv2", False), ("vit", False), ("ijepa", False),
        ("dinov2", True),  # the class of transformers also reads the mean of the patches
        ("dinov3_vit", True),  # transformers has no class
    ],
)  # fmt: skip
def test_the_head_reads_the_evaluated_feature(kind: str, own: bool) -> None:
    encoder = new_encoder(kind)
    found = classifier(encoder)
    assert isinstance(found.model, FeatureClassifier) == own
    assert {name.split(".")[0] for name in found.head} == {"classifier"}
    head = found.model.classifier[-1] if kind == "resnet" else found.model.classifier
    assert head.out_features == 3 and not head.weight.any() and not head.bias.any()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        head.weight.normal_()
        expected = head(pool(encoder(pixel_values=images), model=encoder))
        torch.testing.assert_close(found.model.eval()(pixel_values=images).logits, expected)
    assert found.blocks == {"resnet": 3, "convnextv2": 2}.get(kind, 3)


def test_a_vit_whose_feature_is_the_mean_gets_a_head_on_the_mean() -> None:
    encoder = new_encoder("vit")
    declare_feature(encoder, "mean")
    found = classifier(encoder)
    assert isinstance(found.model, FeatureClassifier)
    assert not found.model.encoder.pooler.dense.weight.requires_grad, "no loss depends on it"


@pytest.mark.parametrize("several", [False, True])
def test_training_equals_a_loop_of_torch(data, several: bool) -> None:
    """Soft labels, mixup, layer decay, warmup and the cosine, written again with torch alone."""
    changes = {"mixup": 0.8, "label_smoothing": 0.1, "layer_decay": 0.5, "warmup_epochs": 1.0}
    if several:  # each image has its class and the next one
        data = data[0], (F.one_hot(data[1], 3) + F.one_hot((data[1] + 1) % 3, 3))
    trained = fine_tuned("vit", data, **changes)
    found = classifier(new_encoder("vit"))
    model, images, labels = found.model.train(), augmented(data), data[1]
    depth = {"embeddings": 0, "layernorm": 4, "weight": 4, "bias": 4}
    groups = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        number = int(parts[2]) + 1 if parts[1] == "layers" else depth[parts[1]]
        decays = parameter.ndim > 1 and parts[-1] not in ("cls_token", "position_embeddings")
        weight_decay = 0.01 if decays else 0.0
        groups.append({"params": [parameter], "lr": 0.05 * 0.5 ** (4 - number), "weight_decay": weight_decay})
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    initial = [group["lr"] for group in groups]
    loader, step = images.loader(np.arange(40), 8, CPU, pairs=True), 0
    for epoch in range(2):
        loader.set_epoch(epoch)
        for batch in loader:
            scale = step / 5 if step < 5 else 0.5 * (1 + np.cos(np.pi * (step - 5) / 5))
            for group, rate in zip(optimizer.param_groups, initial, strict=True):
                group["lr"] = rate * scale
            pixels = batch.pixels(CPU)
            if several:
                target = labels[batch.rows].float()
            else:
                target = F.one_hot(labels[batch.rows], 3) * 0.9 + 0.1 / 3
            weight, order = mixup_weight(0.8, 0, step), [1, 0, 3, 2, 5, 4, 7, 6]
            pixels = weight * pixels + (1 - weight) * pixels[order]
            target = weight * target + (1 - weight) * target[order]
            logits = model(pixel_values=pixels).logits
            if several:
                loss = F.binary_cross_entropy_with_logits(logits, target)
            else:
                loss = -(target * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    same(model, trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("frozen", "last"), [("all", 4), ("1", 1), ("3", 3)])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_frozen_parts_keep_their_weights_and_statistics(kind: str, frozen: str, last: int, data) -> None:
    start = classifier(new_encoder(kind))
    trained = fine_tuned(kind, data, frozen=frozen)
    before, after, depths = start.model.state_dict(), trained.state_dict(), start.depths
    for name, depth in depths.items():
        changed = not torch.equal(before[name], after[name])
        if frozen == "all":
            assert changed == (name in start.head), name
        elif depth <= last:
            assert not changed, name
    assert any(not torch.equal(before[name], after[name]) for name in start.head)
    if kind == "resnet":
        statistics = {name for name in before if name.endswith("running_mean")}
        changed = {name for name in statistics if not torch.equal(before[name], after[name])}
        assert changed == (set() if frozen in ("all", "3") else statistics - _first_block(statistics))


def _first_block(names: set[str]) -> set[str]:
    return {name for name in names if "embedder" in name or "stages.0.layers.0" in name}


@pytest.mark.parametrize("kind", in_tiers([("vit",), ("dinov2",)], [("vit",)]))
def test_a_killed_training_resumes_exactly(kind: str, data, tmp_path: Path) -> None:
    """Dropout, whose random state must be resumed, and both kinds of classes."""
    encoder = new_encoder(kind, hidden_dropout_prob=0.3)
    whole = fine_tuned(kind, data, encoder=encoder, epochs=3)
    child = os.fork()
    if not child:
        fine_tuned(kind, data, tmp_path, encoder, epochs=3, kill_at=12)  # an epoch has 5 batches
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    (tmp_path / "checkpoint-15").mkdir()  # an incomplete one
    same(fine_tuned(kind, data, tmp_path, encoder, epochs=3), whole, atol=0, rtol=0)
    same(fine_tuned(kind, data, tmp_path, encoder, epochs=3), whole, atol=0, rtol=0)  # finished
    untouched = fine_tuned(kind, data, encoder=encoder, epochs=1)
    with pytest.raises(AssertionError):
        same(untouched, whole, atol=0, rtol=0)


def test_partners_of_mixup() -> None:
    assert neighbors(4, CPU).tolist() == [1, 0, 3, 2]
    assert neighbors(5, CPU).tolist() == [1, 0, 3, 2, 4]
    weights = [mixup_weight(0.8, 0, step) for step in range(4000)]
    assert np.mean(weights) == pytest.approx(0.5, abs=0.02)
    assert np.var(weights) == pytest.approx(1 / (4 * 2.6), abs=0.01)  # of Beta(0.8, 0.8)


def test_numbers_of_labels_that_are_too_large_leave_the_others(data) -> None:
    """As in `few_label_knn` and `few_label_linear`."""
    given = {"fractions": [0.01], "labels_per_class": [2, 14], "epochs": 1, "learning_rates": [0.1]}
    config = {"protocols": ["fine_tune"], "settings": {"fine_tune": given}}
    result = evaluate_encoder(new_encoder("vit"), data[0], data[0], config, PROCESSOR)
    assert [each["details"]["images"] for each in result["protocols"]] == [6]
    assert [each["details"]["labeled"] for each in result["protocols"]] == ["2 per class"]
    fraction, number = result["skipped"]
    assert not missing(fraction, "fine_tune.fractions", 0.01) and fraction.startswith("fine-tuning: ")
    assert not missing(number, "fine_tune.labels_per_class", 14, 13)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"freeze": "9"}, ["fine_tune.freeze", 9, "3 blocks"]),
        ({"freeze": "some"}, ["fine_tune.freeze", "some"]),
        ({"fractions": [0.01]}, ["fine_tune.fractions", 0.01, "3 classes", "40 images"]),
        ({"fractions": [2.0]}, ["fine_tune.fractions", 2.0]),
        ({"fractions": []}, ["fine_tune.fractions"]),
        ({"fractions": [], "labels_per_class": [14]}, ["fine_tune.labels_per_class", 14, 13]),
        ({"recipe": "sim"}, ["fine_tune.recipe", "simclr"]),
        ({"optimizer": "adam"}, ["fine_tune.optimizer", "adamw"]),
        ({"optimizer": "adamw"}, ["fine_tune.learning_rates", "adamw", "simclr", "sgd", "[1e-4]"]),
        ({"learning_rates": [1e30], "epochs": 2}, ["fine_tune.learning_rates", "1e+30", "converges"]),
        ({"layer_decay": 0.0}, ["fine_tune.layer_decay"]),
        ({"fractions": [0.5, 0.5]}, ["fine_tune.fractions", "different"]),
        ({"labels_per_class": [2, 2]}, ["fine_tune.labels_per_class", "different"]),
        ({"fractions": [0.15], "labels_per_class": [2]}, ["fine_tune.fractions and labels_per_class", 6]),
        ({"warmup_epochs": 1.0}, ["fine_tune.warmup_epochs", "1 epoch", 1.0]),
        ({"recipe": "mae"}, ["fine_tune.warmup_epochs", "1 epoch", 5.0]),
    ],
)
def test_bad_settings_end_in_one_sentence(settings: dict, parts: list, data) -> None:
    config = {"protocols": ["fine_tune"], "settings": {"fine_tune": {"epochs": 1} | settings}}
    with pytest.raises(UserError, match=mentions(*parts)):
        evaluate_encoder(new_encoder("vit"), data[0], data[0], config, PROCESSOR)


def test_a_folder_that_cannot_be_written_keeps_the_other_numbers(data, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = {"epochs": 1, "folder": str(tmp_path / "file" / "checkpoints")}
    config = {"protocols": ["knn", "fine_tune"], "settings": {"fine_tune": settings}}
    found = evaluate_encoder(new_encoder("resnet"), data[0], data[0], config, PROCESSOR)
    assert {each["protocol"] for each in found["protocols"]} == {"knn"}
    (reason,) = [text for text in found["skipped"] if text.startswith("fine-tuning")]
    assert "cannot write checkpoints" in reason


def test_a_training_that_fails_keeps_the_numbers_of_the_others(data, monkeypatch) -> None:
    train = fine_tune.train_and_test

    def fail(task: Any, fraction: float, rows: np.ndarray) -> Any:
        if fraction == 1.0:
            raise UserError("fine_tune: it diverged")
        return train(task, fraction, rows)

    monkeypatch.setattr(fine_tune, "train_and_test", fail)
    settings = {"epochs": 1, "fractions": [0.5, 1.0]}
    config: dict[str, Any] = {"protocols": ["fine_tune"], "settings": {"fine_tune": settings}}
    found = evaluate_encoder(new_encoder("resnet"), data[0], data[0], config, PROCESSOR)
    assert [each["details"]["images"] for each in found["protocols"]] == [20]
    assert found["skipped"] == ["fine-tuning: 40 labeled images: fine_tune: it diverged"]
    with pytest.raises(UserError, match=mentions("it diverged")):
        evaluate_encoder(
            new_encoder("resnet"),
            data[0],
            data[0],
            config | {"settings": {"fine_tune": {"epochs": 1}}},
            PROCESSOR,
        )


def test_two_labeled_images_cannot_select_a_learning_rate() -> None:
    pairs = [(torch.full((3, 16, 16), 80 * label, dtype=torch.uint8), label) for label in (0, 1)]
    images = label_data(pairs, DataConfig(), "train")
    config = {"protocols": ["fine_tune"], "settings": {"fine_tune": {"epochs": 1, "recipe": "byol"}}}
    with pytest.raises(UserError, match=mentions("at least 3 labeled images", 5, "one learning rate")):
        evaluate_encoder(new_encoder("resnet"), images, images, config, PROCESSOR)


@pytest.mark.parametrize("changes", [{"frozen": "1"}, {"layer_decay": 0.5}])
def test_an_encoder_without_blocks_has_none_to_freeze_or_to_scale(changes: dict, data) -> None:
    with pytest.raises(UserError, match=mentions("fine_tune.", "no numbered blocks")):
        fine_tuned("", data, encoder=_Flat(), **changes)


class _Flat(torch.nn.Module):
    """An encoder of one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG_MAPPING["dinov3_vit"](**ENCODERS["dinov3_vit"])
        self.projection = torch.nn.Conv2d(3, 4, 4)

    def forward(self, pixel_values):
        return {"pooler_output": self.projection(pixel_values).mean((2, 3))}


def test_named_recipes_have_the_published_settings() -> None:
    from hf_ssl.evaluation.protocols.fine_tune import Config

    settings, rates = Config(recipe="mae").optimization(1.0, 10_000)
    assert (settings.optimizer, settings.layer_decay, settings.mixup) == ("adamw", 0.75, 0.8)
    assert (settings.label_smoothing, settings.weight_decay, rates) == (0.1, 0.05, [1e-3])
    assert Config(recipe="mae", batch_size=1024).optimization(1.0, 10_000)[1] == [4e-3]
    one, ten = (Config().optimization(fraction, 10_000)[0] for fraction in (0.01, 0.1))
    assert (one.epochs, ten.epochs, one.optimizer, one.weight_decay) == (60, 30, "sgd", 0.0)
    changed = Config(recipe="mae", mixup=0.0, epochs=3, learning_rates=[2.0]).optimization(1.0, 10_000)
    assert (changed[0].mixup, changed[0].epochs, changed[1]) == (0.0, 3, [2.0])


TWO = """
import os, sys, torch
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/evaluation"]
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": sys.argv[4]}
from hf_ssl.modeling.gather import joined_processes
from test_fine_tuning import measure
with joined_processes("cpu"):
    result = measure(sys.argv[5])
if sys.argv[1] == "0":
    torch.save(result, sys.argv[2])
"""


def measure(kind: str) -> dict:
    """Return the results of both protocols, and the logits after a training with mixup."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(45) % 3
    noise = torch.randint(0, 120, (45, 3, 20, 20), generator=generator)
    images = (noise + 60 * torch.eye(3)[labels][:, :, None, None]).to(torch.uint8)
    pairs = [(image, int(label)) for image, label in zip(images, labels, strict=True)]
    train, test = (label_data(part, DataConfig(), "train") for part in (pairs[:30], pairs[30:]))
    settings = {
        "linear_augmented": {"epochs": 2, "batch_size": 7, "learning_rates": [0.1, 1.0]},
        "fine_tune": {
            "epochs": 2, "batch_size": 7, "learning_rates": [0.01, 0.05], "mixup": 0.8, "freeze": "1",
            "fractions": [0.5, 1.0],
        },
    }  # fmt: skip
    config = {"protocols": list(settings), "settings": settings, "precision": "float32", "batch_size": 4}
    result = evaluate_encoder(new_encoder(kind), train, test, config, PROCESSOR)["protocols"]
    model = fine_tuned(kind, (train, labels[:30]), mixup=0.8, batch_size=7)
    logits = predict(model, PROCESSOR, test.iter_batches(4), 15, 3, CPU)
    several = fine_tuned(kind, (train, torch.eye(3).long()[labels[:30]]), mixup=0.8, batch_size=7)
    return {
        "result": result, "logits": logits, "weights": model.state_dict(), "several": several.state_dict(),
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_two_processes_compute_what_one_computes(kind: str, forks, tmp_path: Path) -> None:
    port, file = str(29700 + os.getpid() % 2000), tmp_path / "two.pt"
    each = [[rank, str(file), str(Path(__file__).parent.parent), port, kind] for rank in "01"]
    for process in forks.together("hf_ssl", TWO, each):
        assert process.returncode == 0, process.stderr[-2000:]
    two, one = torch.load(file, weights_only=False), measure(kind)
    assert two["result"] == one["result"]
    torch.testing.assert_close(two["logits"], one["logits"], atol=1e-4, rtol=1e-3)
    for weights in ("weights", "several"):
        torch.testing.assert_close(two[weights], one[weights], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["resnet", "dinov2"])
def test_the_same_training_has_the_same_folder(kind: str, data) -> None:
    """Otherwise, it would not resume. Classifiers of transformers are loaded from temporary folders."""
    encoder, labels = new_encoder(kind), [np.arange(40), data[1].numpy()]
    models = [classifier(encoder).model for _ in range(2)]
    folders = [
        training_folder("folder", "fine_tune", SETTINGS, model, augmented(data), labels) for model in models
    ]
    assert folders[0] == folders[1]


def test_checkpoints_belong_to_all_images_and_to_the_configuration_of_the_encoder() -> None:
    """At most 16 images are hashed, and two configurations can have equal weights."""
    folders = set()
    for fingerprint, heads in (("one", 2), ("one", 2), ("two", 2), ("one", 4)):
        pixels = torch.zeros(2, 3, 4, 4)
        read = lambda rows, pixels=pixels: list(pixels[rows])  # noqa: E731
        images: Any = SimpleNamespace(fingerprint=fingerprint, read=read)
        torch.manual_seed(0)
        model: Any = torch.nn.Linear(2, 2)
        model.config = ViTConfig(hidden_size=16, num_attention_heads=heads)
        folders.add(training_folder("folder", "fine_tune", SETTINGS, model, images, [np.arange(2)]))
    assert len(folders) == 3
