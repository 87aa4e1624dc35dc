# SPDX-License-Identifier: Apache-2.0
"""Features are extracted once: what belongs to the key, damaged files, two processes, and the size limit."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch.utils.checkpoint import checkpoint
from transformers import BitImageProcessor, ResNetConfig, ResNetModel

from hf_ssl.data import DataConfig, label_data
from hf_ssl.evaluation import evaluate_encoder, feature_cache
from hf_ssl.evaluation.feature_cache import (
    Entry,
    FeatureCache,
    encoder_fingerprint,
    feature_key,
    read_or_extract,
)
from hf_ssl.modeling.activation_checkpoints import checkpoint_segments
from hf_ssl.recipe import load_recipe, read_sections
from hf_ssl.run import evaluate as evaluate_folder
from hf_ssl.run import pretrain

CPU = torch.device("cpu")


def make_dataset(seed: int = 0, rows: int = 40, broken: tuple[int, ...] = ()) -> Dataset:
    pixels = np.random.default_rng(seed).integers(0, 255, (rows, 16, 16, 3), np.uint8)
    images = [PIL.Image.fromarray(each) for each in pixels]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    dataset = Dataset.from_dict(
        {"image": images, "label": [row % 2 for row in range(rows)]}, features=features
    )
    if not broken:
        return dataset
    stored = dataset.cast_column("image", Image(decode=False))[:]
    for row in broken:
        stored["image"][row] = {"bytes": b"no image", "path": None}
    return Dataset.from_dict(stored, features=features)


def make_encoder(seed: int = 0, **changes) -> ResNetModel:
    torch.manual_seed(seed)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return ResNetModel(ResNetConfig(**sizes | changes)).eval()


def make_processor(**changes) -> BitImageProcessor:
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return BitImageProcessor(**size | changes)


@pytest.fixture
def extractions(monkeypatch) -> list[tuple[str, ...]]:
    """The names of the features of each extraction of a split."""
    seen = []
    original = feature_cache.extract_poolings

    def extract(*arguments, poolings, **options):
        seen.append(tuple(poolings))
        return original(*arguments, poolings=poolings, **options)

    monkeypatch.setattr(feature_cache, "extract_poolings", extract)
    return seen


def measure(folder: Path, train=None, test=None, protocol: str = "ridge", **changes):
    config = {"protocols": [protocol], "precision": "float32", "cache_dir": str(folder)}
    data = {"cache": "none", "max_broken_fraction": 0.5, "path": "unused"}
    return evaluate_encoder(
        changes.pop("encoder", None) or make_encoder(),
        make_dataset() if train is None else train,
        make_dataset(seed=1) if test is None else test,
        config | changes,
        make_processor(),
        data=data,
        description="an encoder",
    )


def test_another_protocol_does_not_extract_again(tmp_path, extractions, capsys) -> None:
    first = measure(tmp_path)
    assert extractions == [("pooler",)] * 2 and "cache" not in capsys.readouterr().err
    second = measure(tmp_path, protocol="logistic_regression")
    assert len(extractions) == 2, "nothing is extracted"
    lines = capsys.readouterr().err
    assert "an encoder, train features: 40 images from the cache" in lines and str(tmp_path) in lines
    assert second["statistics"] == first["statistics"]
    fresh = measure(tmp_path, protocol="logistic_regression", cache=False)
    assert len(extractions) == 4
    assert fresh["protocols"] == second["protocols"], "the numbers are the same"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".safetensors", ".safetensors"]


def test_the_default_folder_is_in_the_home_of_hugging_face(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    measure(tmp_path, cache_dir=None)
    assert len(list((tmp_path / "hf_ssl" / "features").glob("*-pooler.safetensors"))) == 2


def test_other_images_or_weights_are_extracted(tmp_path, extractions) -> None:
    measure(tmp_path)
    del extractions[:]
    measure(tmp_path, test=make_dataset(seed=2))
    assert len(extractions) == 1, "only the other split"
    measure(tmp_path, train=make_dataset().select(range(30)))
    assert len(extractions) == 2
    measure(tmp_path, max_train_images=20)
    assert len(extractions) == 3
    measure(tmp_path, encoder=make_encoder(seed=1))
    assert len(extractions) == 5
    measure(tmp_path, precision="bfloat16")
    assert len(extractions) == 7


def test_broken_images_are_remembered(tmp_path, extractions) -> None:
    broken = make_dataset(broken=(3, 8))
    first = measure(tmp_path, train=broken)
    second = measure(tmp_path, train=broken)
    assert len(extractions) == 2
    assert first["images"] == second["images"] == {"train": 38, "test": 40}
    assert first["protocols"] == second["protocols"]


def test_data_sets_and_modules_of_the_user_are_not_cached(tmp_path, extractions) -> None:
    items = [(image["image"], image["label"]) for image in make_dataset()]
    for _ in range(2):
        measure(tmp_path, train=items, test=items)
    assert len(extractions) == 4
    encoder = make_encoder()
    encoder.register_forward_hook(lambda module, given, outputs: None)
    for _ in range(2):
        measure(tmp_path, encoder=encoder)
    assert len(extractions) == 8 and list(tmp_path.iterdir()) == []
    replaced = make_encoder()
    block = replaced.encoder.stages[0]
    block.forward = lambda state: 2 * type(block).forward(block, state)
    assert encoder_fingerprint(replaced) is None
    segments = make_encoder()
    checkpoint_segments(segments, True, checkpoint)
    assert encoder_fingerprint(segments) == encoder_fingerprint(make_encoder()) is not None


def test_a_patch_grid_has_its_own_features(tmp_path, extractions) -> None:
    for _ in range(2):
        measure(tmp_path, patch_grid=[8, 8])
    assert len(extractions) == 4
    measure(tmp_path, patch_grid=[16, 16])
    assert len(extractions) == 6
    measure(tmp_path)
    assert len(extractions) == 6


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "other"])
def test_damaged_files_are_replaced(tmp_path, extractions, caplog, damage: str) -> None:
    before = measure(tmp_path)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    content = first.read_bytes()
    changed = bytearray(content)
    changed[-5] ^= 1
    new = {"truncated": content[:-9], "changed": bytes(changed), "empty": b"", "other": second.read_bytes()}
    first.write_bytes(new[damage])
    with caplog.at_level(logging.WARNING):
        after = measure(tmp_path)
    assert len(extractions) == 3 and first.name in caplog.text
    assert after["protocols"] == before["protocols"]
    assert first.read_bytes() == content


def test_missing_features_are_added(tmp_path) -> None:
    images = label_data(make_dataset(), DataConfig(path="unused", cache="none"), "train")
    cache = FeatureCache(tmp_path, 2**20)
    values = {"cls": torch.zeros(40, 2), "mean": torch.ones(40, 3)}
    asked = []

    def extract(names):
        asked.append(names)
        return {name: values[name] for name in names}

    assert read_or_extract(cache, "key", images, ["mean"], extract)[1] is False
    found, stored = read_or_extract(cache, "key", images, ["cls", "mean"], extract)
    assert asked == [["mean"], ["cls"]] and stored is False and list(found) == ["cls", "mean"]
    found, stored = read_or_extract(cache, "key", images, ["mean", "cls"], extract)
    assert stored is True and len(asked) == 2 and torch.equal(found["cls"], values["cls"])


@pytest.mark.parametrize("missing", [[], ["cls"]], ids=["both are stored", "one is stored"])
def test_stored_features_of_different_images_are_extracted_again(tmp_path, missing: list[str]) -> None:
    """Features that were stored while a file could not be read have no row for this image."""
    data = DataConfig(path="unused", cache="none", max_broken_fraction=0.5)
    images = label_data(make_dataset(broken=(5,)), data, "train")
    cache = FeatureCache(tmp_path, 2**20)
    cache.write("key", "mean", Entry(torch.zeros(39, 1), {3: "no such file"}))
    if not missing:
        cache.write("key", "cls", Entry(torch.ones(39, 1), {5: "no image"}))

    def extract(names):
        rows = sum(len(batch) for batch in images.iter_batches(8))
        return {name: torch.full((rows, 1), 2.0) for name in names}

    found, stored = read_or_extract(cache, "key", images, ["mean", "cls"], extract)
    assert not stored and images.broken_rows.keys() == {5}
    assert all(bool((features == 2).all()) for features in found.values())
    assert cache.read("key", "mean", 40).broken.keys() == {5}


def test_the_least_recently_used_features_are_deleted(tmp_path) -> None:
    entry = Entry(torch.zeros(100, 100), {})  # 40,000 bytes
    cache = FeatureCache(tmp_path, 100_000)
    for time, key in enumerate("ab"):
        cache.write(key, "mean", entry)
        os.utime(cache.path(key, "mean"), (time, time))
    assert cache.read("a", "mean", 100) is not None, "now it is the most recently used one"
    cache.write("c", "mean", entry)
    found = [key for key in "abc" if cache.path(key, "mean").exists()]
    assert found == ["a", "c"]


def test_too_large_features_and_unwritable_folders_are_only_warnings(tmp_path, caplog) -> None:
    FeatureCache(tmp_path, 1000).write("a", "mean", Entry(torch.zeros(100, 100), {}))
    assert "cache_size" in caplog.text and not list(tmp_path.glob("*.safetensors"))
    (tmp_path / "file").write_text("")
    FeatureCache(tmp_path / "file", 2**20).write("a", "mean", Entry(torch.zeros(2, 2), {}))
    assert "not cached" in caplog.text


def test_what_belongs_to_the_fingerprint_of_an_encoder() -> None:
    encoder = make_encoder()
    same = encoder_fingerprint(make_encoder())
    assert encoder_fingerprint(encoder) == same
    assert encoder_fingerprint(make_encoder(hidden_act="gelu")) != same
    assert encoder_fingerprint(encoder, 8, 8) != same
    encoder.embedder.embedder.normalization.running_mean[0] += 1e-7
    assert encoder_fingerprint(encoder) != same, "one bit of one buffer"
    assert encoder_fingerprint(make_encoder().bfloat16()) != same
    assert encoder_fingerprint(torch.nn.Linear(2, 2)) is None


def test_what_belongs_to_the_key(monkeypatch) -> None:
    settings = DataConfig(path="unused", cache="none")
    images = label_data(make_dataset(), settings, "train")
    key = feature_key("encoder", make_processor(), images, "float32", CPU)
    again = label_data(make_dataset(), settings, "train")
    assert feature_key("encoder", make_processor(), again, "float32", CPU) == key
    gray = label_data(make_dataset(), DataConfig(path="unused", cache="none", channels=1), "train")
    others = [
        feature_key("other", make_processor(), images, "float32", CPU),
        feature_key("encoder", make_processor(resample=0), images, "float32", CPU),
        feature_key("encoder", make_processor(), gray, "float32", CPU),
        feature_key("encoder", make_processor(), images, "bfloat16", CPU),
        feature_key("encoder", make_processor(), images, "float32", torch.device("cuda", 1)),
    ]
    monkeypatch.setattr("hf_ssl.evaluation.feature_cache.metadata.version", lambda name: "99")
    others.append(feature_key("encoder", make_processor(), images, "float32", CPU))
    assert len({key, *others}) == 7
    assert feature_key(None, make_processor(), images, "float32", CPU) is None
    assert feature_key("encoder", lambda images: images, images, "float32", CPU) is None


WRITE = """
import sys, torch
from pathlib import Path
from hf_ssl.evaluation.feature_cache import Entry, FeatureCache
cache = FeatureCache(Path(sys.argv[1]), 200_000)
for turn in range(20):
    for key in "abc":
        cache.write(key, "mean", Entry(torch.full((100, 100), float(turn)), {}))
        found = cache.read(key, "mean", 100)
        assert found is None or bool((found.features == found.features[0, 0]).all())
"""


def test_two_processes_may_write_at_the_same_time(tmp_path, forks) -> None:
    for done in forks.together("hf_ssl", WRITE, [[str(tmp_path)]] * 2):
        assert done.returncode == 0 and "damaged" not in done.stderr, done.stderr
    assert not list(tmp_path.glob("_writing-*"))


def test_a_run_stores_the_features_of_its_trained_encoder_only(tmp_path, extractions, no_curves) -> None:
    """`hf-ssl evaluate` then reads them. The encoder before training is evaluated once."""
    settings = [f"training.output_dir={tmp_path / 'run'}", "training.monitor_steps=0", "training.max_steps=1"]
    cache = [f"evaluation.cache_dir={tmp_path / 'cache'}", "evaluation.precision=float32"]
    pretrain(load_recipe("smoke/simclr", [*settings, *cache]))
    assert len(extractions) == 4 and len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    data, evaluation = read_sections(["data.path=digits", *cache, "evaluation.baselines=false"])
    evaluate_folder(str(tmp_path / "run"), data, replace(evaluation, protocols=["ridge"]))
    assert len(extractions) == 4


def test_a_replaced_file_of_a_row_is_extracted_again(tmp_path, extractions) -> None:
    """The fingerprint of `Dataset` covers only the name of the file, and `rsync -t` keeps its time."""
    files = [tmp_path / f"{row}.bmp" for row in range(8)]

    def write(seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 255, (8, 16, 16, 3), np.uint8)
        for file, image in zip(files, pixels, strict=True):
            PIL.Image.fromarray(image).save(file)
            os.utime(file, (1e9, 1e9))

    def named() -> Dataset:
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        rows = {"image": list(map(str, files)), "label": [row % 2 for row in range(8)]}
        return Dataset.from_dict(rows, features=features)

    cache = tmp_path / "cache"
    write(0)
    first = measure(cache, train=named())
    del extractions[:]
    assert measure(cache, train=named())["protocols"] == first["protocols"] and not extractions
    write(1)
    again = measure(cache, train=named())
    assert len(extractions) == 1
    assert again["protocols"] == measure(cache, train=named(), cache=False)["protocols"]
