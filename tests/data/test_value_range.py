# SPDX-License-Identifier: Apache-2.0
"""`data.value_range`: all ways to read the same numbers give the same pixels. Dark images are reported."""

import io
import logging
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
from image_files import png, tiff
from messages import mentions

from hf_ssl.building import open_labeled_splits
from hf_ssl.data import DataConfig, open_source, stream_loader
from hf_ssl.data.adapters import as_source
from hf_ssl.data.decoded import decoded_rows
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.inspection import FOUND_VALUES, common_size
from hf_ssl.data.labeled_splits import label_data, unlabeled_images
from hf_ssl.data.loader import holds_small_images
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig

COUNT = 3
NUMBERS = [
    np.rint(np.arange(64).reshape(8, 8) * (4000 + 10 * row) / 63).astype(np.uint16) for row in range(COUNT)
]


def pixels(low, high):
    inside = [np.clip(numbers.astype(float), low, high) for numbers in NUMBERS]
    return np.stack([np.rint((numbers - low) * 255 / (high - low)) for numbers in inside])


def folder(path, numbers=NUMBERS, encode=png):
    path.mkdir(parents=True)
    for row, each in enumerate(numbers):
        (path / f"{row}.{'png' if encode is png else 'tif'}").write_bytes(encode(each))
    return str(path)


def parquet(path, numbers):
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict({"image": list(numbers)}, features=features).to_parquet(path / "train.parquet")
    return str(path)


def tar(path):
    with tarfile.open(path / "train.tar", "w") as file:
        for row, numbers in enumerate(NUMBERS):
            content = tiff(numbers)
            info = tarfile.TarInfo(f"{row}.tif")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


def array_column(numbers):
    features = datasets.Features(image=datasets.Array2D((8, 8), str(numbers[0].dtype)))
    return datasets.Dataset.from_dict({"image": [each.tolist() for each in numbers]}, features=features)


WAYS = {
    "files": lambda path: folder(path / "photos"),
    "big-endian files": lambda path: folder(path / "photos", encode=lambda each: tiff(each, order=">")),
    "int64 images of datasets": lambda path: parquet(path, [each.astype(np.int64) for each in NUMBERS]),
    "uint16 images of datasets": lambda path: parquet(path, NUMBERS),
    "floating-point images of datasets": lambda path: parquet(path, [each.astype(float) for each in NUMBERS]),
    "tar": tar,
    "arrays of datasets": lambda path: array_column([each.astype(np.int32) for each in NUMBERS]),
    "arrays": lambda path: [each.astype(np.int64) for each in NUMBERS],
    "images of Pillow": lambda path: [PIL.Image.fromarray(each) for each in NUMBERS],
    "32-bit images of Pillow": lambda path: [PIL.Image.fromarray(each.astype(np.int32)) for each in NUMBERS],
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_numbers_give_the_same_pixels(way, streaming, tmp_path, preset):
    data = WAYS[way](tmp_path)
    if streaming and not isinstance(data, str):
        pytest.skip("not a stream")
    for value_range, (low, high) in (([0, 4095], (0, 4095)), ("auto", (0, 4020))):
        config = DataConfig(value_range=value_range, channels=1, streaming=streaming)
        source = as_source(data, config)
        assert source.value_range == (low, high)
        if not streaming:
            images, broken = EncodedRows(source, 1).read(np.arange(COUNT))
            assert not broken and np.array_equal(np.stack([image[0] for image in images]), pixels(low, high))
        assert holds_small_images(source, config)
        assert source.cache[FOUND_VALUES] == ((0, 4020), (low, high))


def test_a_stream_is_decoded_with_the_range(tmp_path, make_loader, monkeypatch):
    path = folder(tmp_path / "photos")
    read = []
    monkeypatch.setattr(stream_loader, "make_batch", lambda images, *_, **__: read.extend(images) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(make_loader(DataConfig(path=path, value_range=[0, 4095], streaming=True), batch_size=3)))
    shown = sorted([image[0].numpy() for image in read], key=np.sum)
    assert np.array_equal(np.stack(shown), pixels(0, 4095))


def test_images_that_would_be_dark_are_reported_once(tmp_path, caplog):
    config = DataConfig(path=folder(tmp_path / "photos"))
    for _ in range(2):
        source = open_source(config)
        common_size(source, 3)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert all(word in message for word in ("data.value_range", "0 to 4020", "65535", "[0, 4020]", "auto"))
    assert source.cache[FOUND_VALUES] == ((0, 4020), (0, 65535))


@pytest.mark.parametrize("bright", [np.uint8, np.uint16])
def test_bright_images_are_not_reported(bright, tmp_path, caplog):
    white = np.iinfo(bright).max
    numbers = [(each / 4020 * white).astype(bright) for each in NUMBERS]
    common_size(open_source(DataConfig(path=folder(tmp_path / "photos", numbers))), 3)
    assert not caplog.records


def test_images_of_8_bits_need_no_range(tmp_path):
    path = folder(tmp_path / "photos", pixels(0, 4095).astype(np.uint8))
    assert open_source(DataConfig(path=path, value_range="auto")).value_range is None
    source = open_source(DataConfig(path=path, value_range=[0, 4095]))
    images, _ = EncodedRows(source, 1).read(np.arange(COUNT))
    assert np.array_equal(np.stack([image[0] for image in images]), pixels(0, 4095))


@pytest.mark.parametrize("cache", ["memory", "memmap"])
def test_cached_images_of_another_range_are_not_reused(cache, tmp_path):
    path = folder(tmp_path / "photos")
    for high in (4095, 2000, 4095):
        source = open_source(DataConfig(path=path, value_range=[0, high]))
        assert np.array_equal(decoded_rows(source, 1, cache).pixels[:, 0], pixels(0, high))


def test_features_of_another_range_are_not_reused(tmp_path):
    path = folder(tmp_path / "photos")
    given = [
        unlabeled_images(DataConfig(path=path, value_range=each), "train") for each in (None, [0, 9], [0, 8])
    ]
    assert len({images.fingerprint for images in given}) == 3


def test_the_test_images_use_the_range_of_the_training_images(tmp_path):
    for split, factor in (("train", 1), ("test", 0.5)):
        for label in ("ant", "bee"):
            folder(tmp_path / split / label, [(each * factor).astype(np.uint16) for each in NUMBERS])
    data = DataConfig(path=str(tmp_path), value_range="auto", channels=1)
    train, test = open_labeled_splits(data, EvaluationConfig())
    assert train.value_range == test.value_range == (0, 4020)
    assert (int(train[2].max()), int(test[2].max())) == (255, 128)
    assert label_data(str(tmp_path / "train"), data, "train").value_range == (0, 4020)


@pytest.mark.parametrize("wrong", [[4095], [5, 5], [1, 2, 3], "wide", ["a", "b"], 4095, [0, True]])
def test_a_wrong_range_is_an_error(wrong):
    with pytest.raises(
        UserError, match=mentions("data.value_range", wrong if isinstance(wrong, str) else "LOW")
    ):
        DataConfig.of({"value_range": wrong})


def test_auto_needs_several_values(tmp_path):
    path = folder(tmp_path / "photos", [np.full((8, 8), 7, np.uint16)])
    with pytest.raises(UserError, match=mentions("data.value_range", 7)):
        open_source(DataConfig(path=path, value_range="auto"))
