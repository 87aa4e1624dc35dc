# SPDX-License-Identifier: Apache-2.0
"""WebDataset tars whose images have different endings."""

import gzip
import io
import json
import tarfile
from dataclasses import replace
from types import MappingProxyType

import datasets
import numpy as np
import pytest
from messages import mentions

from hf_ssl.data import DataConfig, open_source
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.stream import StreamShards
from hf_ssl.errors import UserError


@pytest.fixture
def write_tar(encode, picture):
    """Return a function that writes a tar of files, each with the image of its number."""

    def write(path, names, records=MappingProxyType({})):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for number, name in enumerate(names):
                content = b"1" if name.endswith(".cls") else encode(picture(number))
                content = records.get(name, content)
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write


MIXED = {
    "after the first samples": ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.png", "6.jpeg"],
    "in the first samples": ["0.jpg", "1.png", "2.JPG"],
    "with classes": ["0.cls", "0.jpg", "1.cls", "1.png"],
}


@pytest.mark.parametrize("case", MIXED)
def test_images_with_different_endings_are_in_one_column(case, tmp_path, write_tar, encode, picture):
    names = MIXED[case]
    config = DataConfig(path=str(write_tar(tmp_path / "a.tar", names).parent))
    expected = [encode(picture(number)) for number, name in enumerate(names) if not name.endswith(".cls")]
    source = open_source(config)
    assert source.image_column == "jpg" and source.num_rows == len(expected)
    assert [row["bytes"] for row in source.dataset["jpg"]] == expected
    assert EncodedRows(source, 3).read(np.arange(len(expected)))[1] == {}
    streamed = StreamShards(open_source(config, streaming=True), 4).first_images
    assert [bytes(image.data) for image in streamed] == expected


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_inside_of_a_tar_are_reported(streaming, tmp_path, write_tar, caplog):
    """`datasets` puts all images into the split "train", so a training would use the test images."""
    path = write_tar(tmp_path / "a.tar", ["photos/train/0.jpg", "photos/train/1.jpg", "photos/test/2.jpg"])
    assert open_source(DataConfig(path=str(path)), streaming=streaming).num_rows == 3
    assert "test, train" in caplog.text
    caplog.clear()
    path = write_tar(tmp_path / "b.tar", ["photos/train/0.jpg", "photos/train/1.jpg"])
    assert open_source(DataConfig(path=str(path)), streaming=streaming).num_rows == 2
    assert "unpack" not in caplog.text


def test_tars_with_different_endings(tmp_path, write_tar):
    for file, ending in (("a", "jpg"), ("b", "png")):
        write_tar(tmp_path / f"{file}.tar", [f"0.{ending}", f"1.{ending}"])
    source = open_source(DataConfig(path=str(tmp_path)))
    assert all(row["bytes"] for row in source.dataset[source.image_column]) and source.num_rows == 4


README = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/*.tar}
---
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_names_of_classes_in_members(streaming, tmp_path, write_tar):
    """`datasets` 5.2 accepts only numbers in `KEY.cls`."""
    names = [f"{number}.{ending}" for number in range(3) for ending in ("cls", "jpg")]
    write_tar(tmp_path / "a.tar", names, {"0.cls": b"cat", "1.cls": b"dog\n", "2.cls": b"cat"})
    source = open_source(DataConfig(path=str(tmp_path), streaming=streaming), labels=True)
    rows = source.dataset if streaming else source.dataset.select_columns(["cls"])
    assert [row["cls"] for row in rows] == ["cat", "dog", "cat"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", ["cls", "json"])
def test_numbers_and_names_of_classes_in_one_tar(ending, streaming, tmp_path, write_tar):
    """The first samples determine the type. Arrow raises an error for a column of both types."""

    def labels(name, values):
        encode = json.dumps if ending == "json" else str
        records = {
            f"{number}.{ending}": encode({"label": value} if ending == "json" else value).encode()
            for number, value in enumerate(values)
        }
        names = [f"{number}.{each}" for number in range(len(values)) for each in (ending, "jpg")]
        write_tar(tmp_path / name / "a.tar", names, records)
        source = open_source(DataConfig(path=str(tmp_path / name), streaming=streaming), labels=True)
        rows = source.dataset if streaming else source.dataset.select_columns([source.label_column])
        return [row[source.label_column] for row in rows]

    mixed = [3, "cat", 3, 4, 5, 6, 7]
    if ending == "cls":
        assert labels("names", mixed) == list(map(str, mixed))
    else:
        with pytest.raises(UserError, match=mentions("data.path", "label", "int64", "string")):
            labels("names", mixed)
    assert labels("numbers", [3, 2, 3, 4, 5, 6, 7]) == [3, 2, 3, 4, 5, 6, 7]
    error = ValueError if streaming else UserError  # the loader of a stream reports it
    with pytest.raises((error, UserError), match=mentions("cat")):
        labels("late", [3, 2, 3, 4, 5, 6, "cat"])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_class_in_a_json_member(streaming, tmp_path, write_tar):
    kinds = ["cat", "ant", "cat", "bee", "ant", "dog", None]
    records = {
        f"{number}.json": json.dumps({"width": 12} | ({} if kind is None else {"label": kind})).encode()
        for number, kind in enumerate(kinds)
    }
    names = [f"{number}.{ending}" for number in range(len(kinds)) for ending in ("jpg", "json")]
    write_tar(tmp_path / "a.tar", names, records)
    source = open_source(DataConfig(path=str(tmp_path), streaming=streaming), labels=True)
    assert source.label_column == "label" and source.image_column == "jpg"
    rows = source.dataset if streaming else source.dataset.select_columns(["label"])
    assert [row["label"] for row in rows] == kinds


def test_a_member_of_the_same_name_has_priority_over_a_json_member(tmp_path, write_tar):
    names = [f"{number}.{ending}" for number in range(3) for ending in ("cls", "jpg", "json")]
    records = {f"{number}.json": b'{"cls": 7, "kind": "x"}' for number in range(3)}
    write_tar(tmp_path / "a.tar", names, records)
    source = open_source(DataConfig(path=str(tmp_path)), labels=True)
    assert source.label_column == "cls" and source.dataset["cls"][:] == [1, 1, 1]


@pytest.mark.parametrize("case", ["compressed", "named by a README"])
def test_tars_that_datasets_finds_have_one_column_too(case, tmp_path, write_tar, encode, picture):
    names = MIXED["after the first samples"]
    tar = write_tar(tmp_path / "photos" / "data" / "a.tar", names)
    if case == "compressed":
        tar.with_name("a.tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
        tar.unlink()
    else:
        (tmp_path / "photos" / "README.md").write_text(README)
    config = DataConfig(path=str(tmp_path / "photos"))
    source = open_source(config)
    expected = [encode(picture(number)) for number in range(len(names))]
    assert [row["bytes"] for row in source.dataset["jpg"]] == expected
    stream = open_source(replace(config, num_images=len(names)), streaming=True)
    assert [row["jpg"]["bytes"] for row in stream.dataset] == expected
    write_tar(tmp_path / "photos" / "data" / "b.tar", names[:2])  # other files are not taken from the cache
    if case != "compressed":
        assert open_source(config).num_rows == len(names) + 2


def test_datasets_itself_loses_such_images(tmp_path, write_tar):
    """If this test fails, `TarImages` may be unnecessary."""
    write_tar(tmp_path / "a.tar", MIXED["after the first samples"])
    rows = datasets.load_dataset("webdataset", data_files=str(tmp_path / "a.tar"), split="train")
    assert rows.cast_column("jpg", datasets.Image(decode=False))["jpg"][5:] == [None, None]


def test_images_and_masks_stay_apart(tmp_path, write_tar):
    write_tar(tmp_path / "a.tar", ["0.jpg", "0.png", "1.jpg", "1.png"])
    source = open_source(DataConfig(path=str(tmp_path), image_column="jpg"))
    assert source.num_rows == 2 and {"jpg", "png"} <= set(source.dataset.features)


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_can_have_fewer_images(streaming, tmp_path, write_tar, encode, picture):
    """datasets 5.2 raises an error for these first samples (issue 7055)."""
    write_tar(tmp_path / "a.tar", ["0.1.png", "0.2.png", "0.cls", "1.1.png", "1.cls", "2.2.png", "2.cls"])
    config = DataConfig(path=str(tmp_path), image_column="1.png", streaming=streaming)
    rows = list(open_source(config).dataset)
    assert [row["cls"] for row in rows] == [1, 1, 1]
    found = [row["1.png"] and row["1.png"]["bytes"] for row in rows]
    assert found == [encode(picture(0)), encode(picture(3)), None]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_sample_at_several_places_are_an_error(streaming, tmp_path, write_tar):
    """Each of them would be a sample, without an image or without a label."""
    file = write_tar(tmp_path / "a.tar", ["b/0.png", "b/1.png", "b/0.cls", "b/1.cls"])
    with pytest.raises(UserError, match=mentions("data.path", file, "b/0.png", "b/0.cls")):
        open_source(DataConfig(path=str(tmp_path)), streaming=streaming)


def test_two_whole_samples_can_have_one_name(tmp_path, write_tar):
    write_tar(tmp_path / "a.tar", ["0.png", "0.cls", "1.png", "1.cls", "0.png", "0.cls"])
    assert open_source(DataConfig(path=str(tmp_path))).num_rows == 3


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_a_damaged_archive_is_named(name, streaming, tmp_path):
    (tmp_path / name).write_bytes(b"no archive" * 100)
    with pytest.raises(UserError, match=mentions("data.path", tmp_path / name)):
        open_source(DataConfig(path=str(tmp_path)), streaming=streaming)


def test_a_tar_without_samples_is_named(tmp_path, write_tar):
    write_tar(tmp_path / "a.tar", ["photo", "other"])
    with pytest.raises(UserError, match=mentions("data.path", tmp_path / "a.tar", "KEY.jpg")):
        open_source(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["a.7z", "a.rar", "a.tgz"])
def test_other_archives_are_to_be_unpacked(name, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=mentions("data.path", path, "unpack")):
            open_source(DataConfig(path=str(path)))


def damaged(content):
    """Change the name in the header of the second image, so that its checksum is wrong."""
    second = content.index(b"1.jpg")
    return content[:second] + b"x" + content[second + 1 :]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", [damaged, lambda tar: tar + tar, lambda tar: tar[:1200]])
def test_a_tar_of_which_images_would_vanish_is_an_error(change, streaming, tmp_path, write_tar):
    """`datasets` reads the first image, or the first of two tars, and reports nothing."""
    file = write_tar(tmp_path / "a.tar", ["0.jpg", "1.jpg", "2.jpg"])
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError, match=mentions("data.path", "a.tar")):
        open_source(DataConfig(path=str(tmp_path)), streaming=streaming)


def test_a_tar_without_an_end_mark_is_read(tmp_path, write_tar):
    file = write_tar(tmp_path / "a.tar", ["0.jpg", "1.jpg"])
    file.write_bytes(file.read_bytes().rstrip(b"\0").ljust(2048, b"\0"))
    assert open_source(DataConfig(path=str(tmp_path))).num_rows == 2
