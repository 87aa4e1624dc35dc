# SPDX-License-Identifier: Apache-2.0
"""The whole protocol on real digits with a small encoder: numbers, words, and what is refused."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from messages import mentions, missing
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BitImageProcessor,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

from hf_ssl import SimCLRConfig, SimCLRForPreTraining
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    EvaluationConfig,
    evaluate_encoder,
    evaluate_features,
    evaluate_pixels,
    feature_cache,
    knn_accuracy,
    linear_probe,
)
from hf_ssl.evaluation.config import main_knn
from hf_ssl.evaluation.features import PatchGrid
from hf_ssl.precision import Precision


class Images:
    """Digits as a data set would give them; `broken` rows turn out to be unreadable when they are met."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, broken: tuple[int, ...] = ()) -> None:
        self.images, self.labels, self.broken = images, labels, broken

    def __len__(self) -> int:
        return len(self.images)

    def iter_batches(self, batch_size: int):
        kept = [row for row in range(len(self.images)) if row not in self.broken]
        self.images, self.labels, self.broken = self.images[kept], self.labels[kept], ()
        for first in range(0, len(self.images), batch_size):
            yield list(self.images[first : first + batch_size])


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(data.images * 255 / 16).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    processor = BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=2,
        image_mean=[0.3] * 3, image_std=[0.4] * 3,
    )  # fmt: skip
    return ResNetModel(config), processor


def small(**changes) -> EvaluationConfig:
    protocols = {
        "knn": {"neighbors": [1, 20]},
        "few_label_knn": {"labels_per_class": [1, 5, 500], "draws": 4},
        "linear": {"epochs": 3, "learning_rates": [0.1, 1.0], "standardize": True},
    }
    settings = {"protocols": list(protocols), "settings": protocols, "batch_size": 100, "raw_pixel_size": 8}
    return EvaluationConfig(**(settings | changes))


def only(neighbors: int, **changes) -> EvaluationConfig:
    """Settings that measure k-NN alone."""
    knn = {"knn": {"neighbors": [neighbors], "temperatures": [0.07]}}
    return small(protocols=["knn"], settings=knn, precision="float32", **changes)


def knn_of(result) -> float:
    return result["protocols"][0]["value"]


@pytest.mark.parametrize("fastest", ["float32", "bfloat16"])
def test_auto_is_the_fastest_precision_and_the_result_names_it(digits, encoder, monkeypatch, fastest):
    measured = Precision(fastest, "measured")
    monkeypatch.setattr("hf_ssl.evaluation.encoders.fastest_precision", lambda device: measured)
    seen = []
    hook = encoder[0].encoder.register_forward_hook(lambda module, given, out: seen.append(out[0].dtype))
    images, labels = digits
    split = Images(images[:20], labels[:20])
    config = EvaluationConfig(protocols=["knn"], settings={"knn": {"neighbors": [1]}})
    result = evaluate_encoder(encoder[0], split, split, config, encoder[1])
    hook.remove()
    assert result["precision"] == fastest and fastest in result["features"]
    assert seen[-1] == {"float32": torch.float32, "bfloat16": torch.bfloat16}[fastest]


def test_every_number_and_its_words(digits, encoder) -> None:
    images, labels = digits
    train = Images(images[:1000], labels[:1000], broken=(3, 700))
    test = Images(images[1000:1400], labels[1000:1400])
    result = evaluate_encoder(encoder[0], train, test, small(precision="float32"), encoder[1])
    assert json.loads(json.dumps(result)) == result
    assert result["images"] == {"train": 998, "test": 400}
    assert (result["classes"], result["feature_size"]) == (10, 32)
    assert (result["pooling"], result["image_size"]) == ("pooler", 32)
    numbers = {each["key"]: each for each in result["protocols"]}
    assert list(numbers) == ["knn_20", "knn_selected", "few_labels_1", "few_labels_5", "linear_probe"]
    knn, selected, one, five, linear = numbers.values()
    assert knn["value"] > 0.5, "an untrained network distinguishes digits"
    assert (knn["details"]["neighbors"], knn["details"]["temperature"]) == (20, 0.07)
    assert len(knn["details"]["grid"]) == 2 * 2
    assert knn["text"] == (
        "20-NN by cosine similarity. Each neighbor votes with the weight exp(cosine / 0.07). Bank: 998 "
        "images of split train. Tested on 400 images of split test"
    )
    assert selected["selected_on"] == "100 held-out images of split train"
    assert set(selected["selection"]) == {"neighbors", "temperature"}
    assert one["value"] < five["value"] < knn["value"]
    assert "4 draws" in one["text"] and "(seed 0)" in one["text"]
    assert result["skipped"][0].startswith("k-NN with few labels: ")
    assert not missing(result["skipped"][0], "few_label_knn.labels_per_class", 500)
    assert linear["value"] > 0.5
    assert set(linear["details"]["validation"]) == {"0.1", "1"}
    assert "3 epochs, batch size 256" in linear["text"]
    assert "features, standardized, without augmentation" in linear["text"]
    assert "(at the edge of the sweep) had the highest accuracy" in linear["text"]
    assert result["features"] == "pooler_output, 32 numbers, images of 32 pixels, float32"
    assert result["precision"] == "float32"
    assert 0 < result["statistics"]["embedding_std"] < 1 and result["statistics"]["images"] == 400
    assert set(result["seconds"]) == {"features", "knn", "few_label_knn", "linear"}


def test_raw_digits_are_a_strong_baseline(digits) -> None:
    images, labels = digits
    result = evaluate_pixels(
        small(), Images(images[:1400], labels[:1400]), Images(images[1400:], labels[1400:])
    )
    assert knn_of(result) > 0.95
    assert "linear" not in {each["protocol"] for each in result["protocols"]}
    assert result["features"] == "images resized to 8 x 8 pixels, minus the mean of each image"


def test_the_main_setting_follows_the_settings(digits) -> None:
    _, labels = digits
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    data = (features[:60], labels[:60], features[60:], labels[60:100])
    for neighbors, temperatures, main in (
        ([1, 5, 20, 50], [0.1, 0.07], (20, 0.07)),
        ([50, 10, 1], [0.1], (10, 0.1)),
        ([50, 30], [0.2, 0.1], (30, 0.2)),
    ):
        settings = {"knn": {"neighbors": neighbors, "temperatures": temperatures}}
        knn = evaluate_features({"protocols": ["knn"], "settings": settings}, *data)["protocols"][0]
        assert (knn["details"]["neighbors"], knn["details"]["temperature"]) == main
        expected = knn_accuracy(*data, neighbors=[main[0]], temperatures=[main[1]])
        assert knn["value"] == expected[main]


def test_the_main_k_of_few_images_is_a_usual_one_everywhere() -> None:
    config = EvaluationConfig()
    assert main_knn(config.of_protocol("knn"), 15) == (10, 0.07)
    given = EvaluationConfig(settings={"knn": {"neighbors": [3, 40], "temperatures": [0.2]}})
    assert main_knn(given.of_protocol("knn"), 50) == (3, 0.2)


def test_a_default_k_above_the_bank_is_left_out_and_a_given_one_is_an_error(digits) -> None:
    _, labels = digits
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    data = (features[:60], labels[:60], features[60:], labels[60:100])
    result = evaluate_features({"protocols": ["knn"]}, *data)
    assert result["skipped"] == ["k-NN with k 100, 200, 500, 1,000, 2,000, 5,000: the bank has 60 images"]
    assert {cell["neighbors"] for cell in result["protocols"][0]["details"]["grid"]} == {1, 5, 10, 20, 50}
    with pytest.raises(UserError, match=mentions("evaluation.settings.knn.neighbors", 60, 61)):
        evaluate_features({"protocols": ["knn"], "settings": {"knn": {"neighbors": [61]}}}, *data)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"test_split": "train"}, ["test_split", "train"]),
        ({"precision": "float8"}, ["evaluation.precision", "float32", "bfloat16", "float16", "float8"]),
        ({"pooling": "max"}, ["evaluation.pooling", "max"]),
        ({"seed": -1}, ["evaluation.seed", -1]),
        ({"protocols": ["kn"]}, ["evaluation.protocols", "kn", "knn"]),
        ({"protocols": []}, ["evaluation.protocols", "[]"]),
        ({"settings": {"kn": {}}}, ["evaluation.settings", "kn", "knn"]),
        ({"settings": {"knn": {"k": 3}}}, ["evaluation.settings.knn.k", "neighbors"]),
        ({"settings": {"knn": {"neighbors": []}}}, ["evaluation.settings.knn.neighbors", "[]"]),
        ({"settings": {"knn": {"temperatures": [-0.1]}}}, ["evaluation.settings.knn.temperatures", "-0.1"]),
        ({"settings": {"few_label_knn": {"labels_per_class": [0]}}}, ["few_label_knn.labels_per_class", 0]),
        ({"settings": {"few_label_knn": {"draws": 0}}}, ["evaluation.settings.few_label_knn.draws", 0]),
        ({"settings": {"linear": {"epochs": 0}}}, ["evaluation.settings.linear.epochs", 0]),
        ({"settings": {"linear": {"learning_rates": [float("nan")]}}}, ["linear.learning_rates", "nan"]),
    ],
)
def test_bad_settings_stop_before_an_image_is_read(encoder, change: dict, parts: list) -> None:
    class Untouched(Images):
        def iter_batches(self, batch_size: int):
            raise AssertionError("an image was read")

    nothing = Untouched(torch.zeros(2, 3, 8, 8), torch.zeros(2))
    with pytest.raises(UserError, match=mentions(*parts)):
        evaluate_encoder(encoder[0], nothing, nothing, small(**change), encoder[1])


def test_class_token_and_mean_side_by_side(digits, encoder) -> None:
    """In one pass over the images, each as if it had been asked for alone."""
    images, labels = digits
    splits = (
        (lambda: Images(images[:1000], labels[:1000], (3,))),
        (lambda: Images(images[1000:], labels[1000:])),
    )
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    vit, processor = ViTModel(config, add_pooling_layer=False), encoder[1]

    def measured(model, **changes):
        return evaluate_encoder(model, *(each() for each in splits), only(20, **changes), processor)

    both = measured(vit, compare_poolings=True)
    alone = {name: knn_of(measured(vit, pooling=name)) for name in ("cls", "mean")}
    assert both["poolings"] == alone
    assert alone["cls"] != alone["mean"]
    assert both["pooling"] == "cls"
    assert knn_of(both) == alone["cls"]
    assert knn_of(measured(vit, compare_poolings=True, pooling="mean")) == alone["mean"]
    assert "poolings" not in measured(encoder[0], compare_poolings=True)


def test_a_vision_transformer_has_further_features_for_the_probes(digits, encoder) -> None:
    """And a ResNet has none for the grid, but positions for the attentive probe."""
    images, labels = digits
    torch.manual_seed(1)
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    vit = ViTModel(config, add_pooling_layer=False)
    attentive = {"epochs": 12, "learning_rates": [0.01, 0.1], "batch_size": 30}
    probes = {"linear": {"epochs": 40}, "attentive": attentive}
    settings = small(protocols=["linear", "attentive"], settings=probes, precision="float32")
    for model, keys, patches in (
        (vit, ["linear_probe", "linear_grid", "attentive_probe"], 16),
        (encoder[0], ["linear_probe", "attentive_probe"], 16),
    ):
        splits = Images(images[:300], labels[:300], (3,)), Images(images[300:500], labels[300:500])
        result = evaluate_encoder(model, *splits, settings, encoder[1])
        assert [each["key"] for each in result["protocols"]] == keys
        assert result["skipped"] == [] and result["images"]["train"] == 299
        assert f"{patches} frozen patch tokens (1 head)" in result["protocols"][-1]["text"]
        values = [each["value"] for each in result["protocols"]]
        assert all(0.05 < value < 1 for value in values), values
        alone = evaluate_encoder(
            model, *splits, small(protocols=["linear"], settings={"linear": {"epochs": 40, "features": []}},
            precision="float32"), encoder[1],
        )  # fmt: skip
        assert alone["protocols"] == result["protocols"][:1]
    only_features = torch.randn(60, 8), labels[:60], torch.randn(60, 8), labels[:60]
    result = evaluate_features({"protocols": ["attentive"]}, *only_features)
    assert result["protocols"] == []
    assert result["skipped"] == ["attentive probe: it needs an encoder, and only features were given"]


def test_diverged_encoder_is_told_apart(digits, encoder) -> None:
    images, labels = digits
    model, processor = encoder
    broken = ResNetModel(model.config)
    torch.nn.init.constant_(broken.embedder.embedder.convolution.weight, float("nan"))
    data = Images(images[:50], labels[:50])
    with pytest.raises(UserError, match=mentions("50 of 50", "NaN")):
        evaluate_encoder(broken, data, data, small(), processor)


def test_the_config_is_a_recipe_section() -> None:
    from omegaconf import OmegaConf

    section = OmegaConf.merge(
        OmegaConf.structured(EvaluationConfig),
        {"protocols": ["knn"], "max_test_images": 100, "path": "a/b"},
    )
    config = OmegaConf.to_object(section)
    assert isinstance(config, EvaluationConfig)
    assert (config.protocols, config.max_test_images, config.path) == (["knn"], 100, "a/b")
    config.check()


def test_data_sets_folders_and_paths_are_accepted(digits, encoder, tmp_path) -> None:
    images, labels = digits
    pictures = [PIL.Image.fromarray(images[row].permute(1, 2, 0).contiguous().numpy()) for row in range(60)]
    table = Dataset.from_dict({"image": pictures, "label": [int(label) for label in labels[:60]]})
    for row, picture in enumerate(pictures):
        place = tmp_path / "photos" / str(int(labels[row]))
        place.mkdir(parents=True, exist_ok=True)
        picture.save(place / f"{row:03}.png")
    encoder[0].save_pretrained(tmp_path / "encoder")
    encoder[1].save_pretrained(tmp_path / "encoder")
    config = only(5)
    pairs = list(zip(pictures, map(int, labels[:60]), strict=True))
    loaded = AutoModel.from_pretrained(tmp_path / "encoder")
    path, folder = str(tmp_path / "encoder"), tmp_path / "photos"
    accuracies = [
        knn_of(evaluate_encoder(model, data, data, config, device="cpu"))
        for model, data in ((path, table), (loaded, pairs), (loaded, folder))
    ]
    assert accuracies[0] == accuracies[1] == accuracies[2] > 0.1
    with pytest.raises(UserError, match=mentions("processor", "ResNetModel")):
        evaluate_encoder(encoder[0], table, table, config)
    with pytest.raises(UserError, match=mentions("train", "int")):
        evaluate_encoder(loaded, 3, table, config)


class Returns(torch.nn.Module):
    """A module of a user, with any output."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, pixel_values):
        return self.output(pixel_values.flatten(1))


def test_wrong_arguments_end_in_one_sentence(digits, encoder, tmp_path) -> None:
    images, labels = digits
    right = {"train": Images(images[:40], labels[:40]), "test": Images(images[40:80], labels[40:80])}
    encoder[0].save_pretrained(tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
    right |= {"model": encoder[0], "processor": encoder[1], "config": only(20)}
    text = BertModel(
        BertConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
        )
    )
    for name, value, parts in (
        ("model", None, ["NoneType"]),
        ("model", ResNetModel, ["class ResNetModel"]),
        ("model", text, ["BertModel", (1, 3, 32, 32)]),
        ("model", torch.nn.Linear(3, 3), ["Linear"]),
        ("model", torch.nn.Module(), ["Module"]),
        ("model", Returns(lambda pixels: pixels), ["pooler_output", "Tensor"]),
        ("model", Returns(lambda pixels: {"logits": pixels}), ["pooler_output", "logits"]),
        ("model", Returns(lambda pixels: {"pooler_output": pixels.mean()}), ["(B, D)"]),
        ("model", Returns(lambda pixels: {"pooler_output": pixels.numpy()}), ["tensors"]),
        ("model", ResNetModel(encoder[0].config).to("meta"), ["meta"]),
        ("model", tmp_path / "none", ["none"]),
        ("model", tmp_path / "damaged", ["damaged", "header"]),
        ("processor", 3, ["processor", "int"]),
        ("processor", BitImageProcessor, ["class BitImageProcessor"]),
        ("processor", str(tmp_path), ["processor", tmp_path]),
        ("processor", str.upper, ["processor", "upper"]),
        ("config", {"neighbour": [1]}, ["evaluation.neighbour", "evaluation.neighbors"]),
        ("config", {"batch_size": "many"}, ["evaluation.batch_size", "many"]),
        ("config", {"protocols": 5}, ["evaluation.protocols", 5]),
        ("config", {"max_train_images": 0}, ["evaluation.max_train_images", 0, 2]),
        ("config", {"max_test_images": -1}, ["evaluation.max_test_images", -1]),
        ("config", right["train"], ["EvaluationConfig", "Images"]),
        ("data", {"channel": 3}, ["data.channel", "data.channels"]),
        ("device", "gpu", ["device", "gpu"]),
        ("train", Images(images[:40], torch.zeros(40)), ["classes", 40]),
        ("train", Images(images[:40], np.array(["a"] * 40)), ["train", "class numbers"]),
        ("train", Images(images[:40], torch.full((40,), 0.5)), ["train", "fractions"]),
        ("train", Images(images[:40].float(), labels[:40]), ["uint8", "float32"]),
        ("test", Images(images[:0], labels[:0]), ["test", "none"]),
    ):  # fmt: skip
        with pytest.raises(UserError, match=mentions(*parts)):
            evaluate_encoder(**(right | {name: value}))


def test_settings_as_a_dict_and_a_processor_as_a_folder(digits, encoder, tmp_path) -> None:
    images, labels = digits
    data = Images(images[:60], labels[:60])
    encoder[0].save_pretrained(tmp_path / "encoder")
    encoder[1].save_pretrained(tmp_path / "processor")
    settings = {"protocols": ("knn",), "settings": {"knn": {"neighbors": (5,)}}, "precision": "float32"}
    expected = evaluate_encoder(encoder[0], data, data, EvaluationConfig(**settings), encoder[1])["protocols"]
    folder = tmp_path / "processor"
    assert evaluate_encoder(encoder[0], data, data, settings, folder)["protocols"] == expected
    # The folder of the encoder contains no processor.
    path = tmp_path / "encoder"
    assert evaluate_encoder(path, data, data, settings, encoder[1], device="cpu")["protocols"] == expected


def test_encoders_of_any_type_of_weights_and_modules_of_users(digits, encoder) -> None:
    images, labels = digits
    data = Images(images[:60], labels[:60])
    settings = {"protocols": ["knn"], "settings": {"knn": {"neighbors": [5]}}}
    for dtype in ("bfloat16", "float16", "float64"):
        torch.manual_seed(0)
        model = ResNetModel(encoder[0].config).to(getattr(torch, dtype)).train()
        state = torch.get_rng_state()
        result = evaluate_encoder(model, data, data, settings, encoder[1])
        assert result["precision"] == dtype and knn_of(result) > 0.3
        with pytest.raises(UserError, match=mentions("evaluation.precision", dtype, "float32", "auto")):
            evaluate_encoder(model, data, data, settings | {"precision": "float32"}, encoder[1])
        assert model.training and model.dtype == getattr(torch, dtype)
        assert torch.equal(torch.get_rng_state(), state)
    half = ResNetModel(encoder[0].config).half()
    with pytest.raises(UserError, match=mentions("evaluation.precision", "float16", "bfloat16")):
        evaluate_encoder(half, data, data, settings | {"precision": "bfloat16"}, encoder[1])
    pixels = Returns(lambda pixels: {"pooler_output": pixels})  # without weights
    assert knn_of(evaluate_encoder(pixels, data, data, settings, encoder[1])) > 0.5


def test_the_model_of_a_method_is_evaluated_by_its_encoder(digits, encoder) -> None:
    images, labels = digits
    data = Images(images[:60], labels[:60])
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=encoder[0].config, views={"size": 32}))
    settings = only(5)
    whole, part = (
        evaluate_encoder(one, data, data, settings, encoder[1]) for one in (model, model.exported_encoder)
    )
    assert whole["protocols"] == part["protocols"]


def test_features_can_be_arrays_of_one_width(digits) -> None:
    _, labels = digits
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    config = {"settings": {"linear": {"epochs": 1, "learning_rates": [0.1]}, "knn": {"neighbors": [5]}}}
    expected = evaluate_features(config, features[:60], labels[:60], features[60:], labels[60:100])
    array, numbers = features.numpy(), labels.numpy()
    given = evaluate_features(config, array[:60], numbers[:60], array[60:], numbers[60:100])
    assert given | {"seconds": 0} == expected | {"seconds": 0}
    for measure in (knn_accuracy, linear_probe):
        with pytest.raises(UserError, match=mentions(8, 7)):
            measure(features[:60], labels[:60], features[60:, :7], labels[60:100])
        with pytest.raises(UserError, match=mentions("NoneType")):
            measure(None, labels[:60], features[60:], labels[60:100])


def test_a_split_with_one_image_is_named_by_its_setting(digits) -> None:
    _, labels = digits
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    for train, test, key in ((60, 1, "test_split"), (1, 60, "train_split")):
        data = (features[:train], labels[:train], features[:test], labels[:test])
        with pytest.raises(UserError, match=mentions(f"evaluation.{key}", "at least 2 images", 1)):
            evaluate_features({"protocols": ["knn"]}, *data)


def test_data_sets_give_the_baseline_of_pixels(digits) -> None:
    images, labels = digits
    pairs = [(images[row].permute(1, 2, 0).contiguous().numpy(), int(labels[row])) for row in range(200)]
    config = only(5)
    given = evaluate_pixels(config, pairs[:100], pairs[100:])
    expected = evaluate_pixels(
        config, Images(images[:100], labels[:100]), Images(images[100:200], labels[100:200])
    )
    assert given["protocols"] == expected["protocols"]


def test_the_label_column_of_the_settings_is_used(digits, encoder) -> None:
    images, labels = digits
    items = [{"image": images[row], "label": 0, "digit": int(labels[row])} for row in range(40)]
    settings = only(5, label_column="digit", path="elsewhere")  # the path has no effect on given images
    assert evaluate_encoder(encoder[0], items, items, settings, encoder[1])["classes"] == 10


def test_deprecated_settings_still_work(digits) -> None:
    _, labels = digits
    features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    data = (features[:60], labels[:60], features[60:], labels[60:100])
    old = {
        "neighbors": [5], "temperatures": [0.1], "few_labels": [1], "draws": 2, "linear_epochs": 1,
        "linear_batch_size": 30, "linear_standardize": True, "learning_rates": [0.5],
    }  # fmt: skip
    with pytest.warns(
        FutureWarning, match=mentions("evaluation.linear_epochs", "evaluation.settings.linear.epochs")
    ):
        found = evaluate_features(old, *data)
    new = {
        "knn": {"neighbors": [5], "temperatures": [0.1]},
        "few_label_knn": {"labels_per_class": [1], "draws": 2},
        "linear": {"epochs": 1, "batch_size": 30, "standardize": True, "learning_rates": [0.5]},
    }
    expected = evaluate_features({"protocols": list(new), "settings": new}, *data)
    assert found | {"seconds": 0} == expected | {"seconds": 0}
    with pytest.warns(FutureWarning, match="evaluation.protocols"):
        assert EvaluationConfig(linear=False).protocols == ["knn"]


def test_the_old_order_of_arguments_still_works(digits, encoder) -> None:
    images, labels = digits
    data = Images(images[:50], labels[:50])
    config = only(20)
    with pytest.warns(FutureWarning, match="model, train, test"):
        old = evaluate_encoder(*encoder, config, data, data)
    assert old["protocols"] == evaluate_encoder(encoder[0], data, data, config, encoder[1])["protocols"]


def test_classes_are_compared_by_name(digits, encoder) -> None:
    """The second data set has other numbers for the same classes, as a folder without the first class."""
    images, labels = digits
    rows = [row for row in range(200) if labels[row] in (3, 5)][:20]
    pictures = [PIL.Image.fromarray(images[row].permute(1, 2, 0).contiguous().numpy()) for row in rows]

    def table(names: list[str]) -> Dataset:
        values = [names.index(str(int(labels[row]))) for row in rows]
        features = Features({"image": Image(), "label": ClassLabel(names=names)})
        return Dataset.from_dict({"image": pictures, "label": values}, features=features)

    config = only(1)
    accuracies = [
        knn_of(evaluate_encoder(encoder[0], table(["3", "5"]), table(names), config, encoder[1]))
        for names in (["3", "5"], ["5", "3"])
    ]
    accuracies += [
        knn_of(evaluate_pixels(config, table(["3", "5"]), table(names)))
        for names in (["5", "3"], ["3", "8", "5"])  # no image has the class 8
    ]
    assert accuracies == [1.0] * 4
    other = table(["3", "5"]).cast_column("label", ClassLabel(names=["3", "8"]))
    with pytest.raises(UserError, match=mentions("labels", "8")):
        evaluate_encoder(encoder[0], table(["3", "5"]), other, config, encoder[1])


@pytest.mark.parametrize("pooling", ["cls", "mean", "auto"])
def test_patches_have_the_pooling_of_images(digits, encoder, pooling) -> None:
    """The only patch of this grid is the whole image."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    vit, pixels = ViTModel(config).eval(), torch.randn(2, 3, 32, 32)
    config.published_feature = "mean"
    with torch.no_grad():
        tokens = vit(pixel_values=pixels).last_hidden_state
        found = PatchGrid(vit, 32, 1, pooling)(pixels)["pooler_output"]
    torch.testing.assert_close(found, tokens[:, 0] if pooling == "cls" else tokens.mean(1))
    split = Images(digits[0][:60], digits[1][:60])
    settings = small(linear=False, patch_grid=[32, 1], pooling=pooling, neighbors=[5], few_labels=[])
    compared = evaluate_encoder(vit, split, split, settings, encoder[1])["poolings"]
    assert compared["grid"] == compared["image"]


def test_the_mean_over_a_grid_of_patches_is_compared(digits, encoder, monkeypatch) -> None:
    """Written with slices: the mean of the features of patches that are encoded one at a time."""
    model, processor = encoder
    train, test = (Images(digits[0][rows], digits[1][rows]) for rows in (slice(0, 60), slice(60, 100)))
    config = only(5, patch_grid=[16, 8])
    found = evaluate_encoder(model, train, test, config, processor)
    assert found["poolings"]["image"] == knn_of(found)

    def feature(image):
        pixels = processor(image, return_tensors="pt", input_data_format="channels_first")["pixel_values"]
        starts = range(0, 17, 8)
        patches = [pixels[:, :, top : top + 16, left : left + 16] for top in starts for left in starts]
        with torch.no_grad():
            return sum(model.eval()(patch).pooler_output.flatten() for patch in patches) / len(patches)

    bank, queries = (torch.stack([feature(image) for image in images.images]) for images in (train, test))
    pixels = torch.stack(processor(list(test.images), input_data_format="channels_first")["pixel_values"])
    with torch.no_grad():
        grid = PatchGrid(model.eval(), 16, 8)(pixels)["pooler_output"]
    torch.testing.assert_close(grid, queries, rtol=1e-4, atol=1e-5)
    expected = knn_accuracy(bank, train.labels, queries, test.labels, neighbors=[5], temperatures=[0.07])
    assert found["poolings"]["grid"] == pytest.approx(expected[5, 0.07], abs=0.03)  # rounding can move a vote
    assert found["poolings"]["grid"] != found["poolings"]["image"]
    extracted = []
    monkeypatch.setattr(feature_cache, "extract_poolings", lambda *args, **kwargs: extracted.append(args))
    with pytest.raises(UserError, match=mentions("evaluation.patch_grid", 16, 5)):
        evaluate_encoder(model, train, test, only(5, patch_grid=[16, 5]), processor)
    assert extracted == []  # the error comes first
    with pytest.raises(UserError, match=mentions("evaluation.patch_grid", "[16]")):
        small(patch_grid=[16]).check()


def test_test_images_with_a_class_without_training_images_are_reported(capsys) -> None:
    """For example `train[:80%]` and `train[80%:]` of a folder that is sorted by class."""
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) // 10
    settings = {"protocols": ["knn"]}
    with pytest.raises(UserError, match=mentions("'test'", "all 10 images", "sorted by class")):
        evaluate_features(settings, features[:30], labels[:30], features[30:], labels[30:])
    found = evaluate_features(settings, features[:30], labels[:30], features[20:], labels[20:])
    assert "10 images of 20 in split 'test' have a class without images" in capsys.readouterr().err
    evaluate_features(settings, features[:30], labels[:30], features[20:31], labels[20:31])
    assert "1 image of 11 in split 'test' has a class without images" in capsys.readouterr().err
    assert found["protocols"][0]["value"] <= 0.5


@pytest.mark.parametrize("stored", ["files", "bytes"])
def test_images_of_both_splits_are_reported(stored: str, encoder, tmp_path, capsys) -> None:
    """Each is its own nearest neighbor, so the accuracy of k-NN is too high."""
    random = np.random.default_rng(0)
    files = [str(tmp_path / f"{number}.png") for number in range(12)]
    for file in files:
        PIL.Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(file)
    images: list = files
    if stored == "bytes":
        images = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
    columns = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    whole = Dataset.from_dict({"image": images, "label": [0, 1] * 6}, features=columns)
    model, processor = encoder
    settings = {"protocols": ["ridge"], "cache": False, "precision": "float32"}
    evaluate_encoder(model, whole, whole.select(range(6)), settings, processor)
    assert "6 images of 6" in capsys.readouterr().err
    evaluate_encoder(model, whole.select(range(6)), whole.select(range(4, 12)), settings, processor)
    assert "2 images of 8" in capsys.readouterr().err
    evaluate_encoder(model, whole.select(range(6)), whole.select(range(6, 12)), settings, processor)
    assert "are also in" not in capsys.readouterr().err
