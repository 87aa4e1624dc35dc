# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import zipfile
from pathlib import Path

import datasets
import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Features, Image, List
from messages import mentions

from hf_ssl.data import DataConfig, labeled_images, open_source
from hf_ssl.data.columns import find_image_column, find_label_column, label_values
from hf_ssl.data.contents import same_contents
from hf_ssl.data.decode import EncodedImage, decode
from hf_ssl.data.decoded import decoded_rows
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.sources import label_column
from hf_ssl.data.stream import StreamShards
from hf_ssl.data.targets import CLASS_KINDS
from hf_ssl.errors import UserError


def test_parquet(numbered):
    source = open_source(numbered(30, files=2))
    assert (source.num_rows, source.image_column, source.streaming, source.label_column) == (
        30,
        "image",
        False,
        None,
    )
    assert set(source.dataset[0]["image"]) == {"bytes", "path"}  # not decoded


@pytest.mark.parametrize("pattern", ["", "/train-00001.parquet", "/*.parquet", "/train-?????.parquet"])
def test_folder_file_and_glob(pattern, numbered):
    config = numbered(30, files=2)
    config.path += pattern
    assert open_source(config).num_rows == (15 if pattern == "/train-00001.parquet" else 30)
    assert open_source(config, streaming=True).num_rows == (15 if pattern == "/train-00001.parquet" else 30)


def test_image_folder(image_folder):
    config = DataConfig(path=str(image_folder))
    source = open_source(config, "test", labels=True)
    assert source.num_rows == 12
    names = source.dataset.features[source.label_column].names
    assert names == ["ant", "bee", "cat"]
    stream = open_source(config, streaming=True)
    assert stream.streaming and stream.num_rows == 60 and stream.whole_shards
    assert open_source(DataConfig(path=str(image_folder / "train" / "ant" / "*.png"))).num_rows == 20


def test_tars(tars):
    for path in (tars, tars / "*.tar"):
        assert open_source(DataConfig(path=str(path))).num_rows == 36
        stream = open_source(DataConfig(path=str(path), streaming=True))
        assert stream.dataset.num_shards == 3
        labeled = open_source(DataConfig(path=str(path), label_column="cls"), labels=True)
        labels, names = label_values(labeled.dataset, "cls", "here")
        assert names == ["0", "1", "2"] and labels.tolist() == [0, 1, 2] * 12


def test_digits():
    train, test = (open_source(DataConfig(path="digits"), split, labels=True) for split in ("train", "test"))
    assert (train.num_rows, test.num_rows) == (1297, 500)
    assert train.dataset.features[train.label_column].names == [str(digit) for digit in range(10)]
    labels, _ = label_values(test.dataset, "label", "here")
    assert (torch.bincount(torch.from_numpy(labels)) > 35).all()
    contents = [{row["bytes"] for row in source.dataset["image"]} for source in (train, test)]
    assert not contents[0] & contents[1]


def test_the_revision_differs_for_other_data_but_not_for_copies(numbered, tmp_path):
    config = numbered(30, files=2)
    revision = open_source(config).revision
    shutil.copytree(config.path, tmp_path / "copy")
    assert open_source(DataConfig(path=str(tmp_path / "copy"))).revision == revision
    assert open_source(DataConfig(path=str(tmp_path / "copy"), streaming=True)).revision == revision
    (tmp_path / "copy" / "train-00001.parquet").unlink()
    assert open_source(DataConfig(path=str(tmp_path / "copy"))).revision != revision


def test_a_part_of_the_data(numbered):
    config = numbered(30)
    assert open_source(config, "train[:10%]").num_rows == 3
    config.max_images = 7
    source = open_source(config)
    names = [row["path"] for row in source.dataset["image"]]
    assert source.num_rows == 7 and names != [f"{number}.png" for number in range(7)]
    assert names == [row["path"] for row in open_source(config).dataset["image"]]


@pytest.mark.parametrize("kind", ["tables", "images"])
def test_negative_and_positive_percents_are_the_same_places(kind, numbered, tmp_path, encode, picture):
    """datasets 5.2 gives the rows 31 to 34, of which row 31 is also in `train[:90%]` (issue 8473)."""
    config = numbered(35)
    if kind == "images":
        config = DataConfig(path=str(tmp_path / "images"))
        (tmp_path / "images").mkdir()
        for number in range(35):
            (tmp_path / "images" / f"{number:02d}.png").write_bytes(encode(picture(number)))
    found = [
        [row["path"] for row in open_source(config, split).dataset["image"]]
        for split in ("train", "train[:90%]", "train[-10%:]", "train[:-10%]", "train[90%:]")
    ]
    assert found[1] + found[2] == found[3] + found[4] == found[0] and len(found[2]) == 3


@pytest.mark.parametrize("split", ["train[-1%:]", "train[99%:]", "train[3:3]", "train[3:3]+test[500:]"])
def test_a_part_without_images_is_an_error(split, numbered):
    """In datasets 5.2, `train[-1%:]` of 30 images is all of them (issue 8473)."""
    config = DataConfig(path="digits") if "test" in split else numbered(30)
    with pytest.raises(UserError, match=mentions("data.path", "no rows", split)):
        open_source(config, split)


def test_the_message_about_a_broken_image_names_its_row_in_the_whole_data_set(numbered):
    source = open_source(numbered(30, broken=(17,))).select(np.array([3, 17]))
    for rows in (EncodedRows(source, 3), decoded_rows(source, 3, "memory")):
        _, broken = rows.read(np.array([1, 0]))
        assert list(broken) == [0] and "row 17 (17.png)" in broken[0]


def test_a_column_of_bytes_or_of_file_names(tmp_path, make_loader, encode, picture):
    images = [encode(picture(number)) for number in range(8)]
    for number, image in enumerate(images):
        (tmp_path / f"{number}.png").write_bytes(image)
    names = [str(tmp_path / f"{number}.png") for number in range(8)]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"raw": images, "file": names}).to_parquet(tmp_path / "data" / "train.parquet")
    shown = [
        next(
            iter(
                make_loader(DataConfig(path=str(tmp_path / "data"), image_column=column, streaming=streaming))
            )
        )
        for column in ("raw", "file")
        for streaming in (False, True)
    ]
    assert torch.equal(shown[0].images, shown[2].images) and torch.equal(shown[1].images, shown[3].images)
    assert open_source(DataConfig(path=str(tmp_path / "data"))).image_column == "raw"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kinds", [("binary", "string"), ("large_binary", "large_string"), ("binary",)])
def test_structs_of_pandas_and_polars(kinds, streaming, tmp_path, make_loader, encode, picture):
    images = [encode(picture(number)) for number in range(8)]
    fields = list(zip(("bytes", "path"), (getattr(pa, kind)() for kind in kinds), strict=False))
    names = [field for field, _ in fields]
    rows = [dict(zip(names, (image, "x.png"), strict=False)) for image in images]
    for column in ("image", "photo"):
        table = pa.table({column: pa.array(rows, pa.struct(fields)), "label": list(range(8))})
        pq.write_table(table, tmp_path / f"{column}.parquet")
        config = DataConfig(path=str(tmp_path / f"{column}.parquet"), streaming=streaming)
        source = open_source(config)
        assert source.image_column == column
        assert next(iter(make_loader(config))).broken == []
        if not streaming:
            decoded, broken = EncodedRows(source, 3).read(np.arange(8))
            assert not broken and torch.equal(decoded[3], decode(images[3], 3))
            (contents,) = same_contents([source]) or [np.zeros(8)]
            assert len(set(contents.tolist())) == 8


@pytest.mark.parametrize("streaming", [False, True])
def test_structs_that_have_only_paths(streaming, tmp_path, make_loader, encode, picture):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number)))
    rows = [{"bytes": None, "path": f"{number}.png"} for number in range(8)]  # the type of `bytes` is null
    pq.write_table(pa.table({"image": pa.array(rows)}), tmp_path / "table.parquet")
    config = DataConfig(path=str(tmp_path / "table.parquet"), streaming=streaming)
    assert next(iter(make_loader(config))).broken == []
    if not streaming:
        decoded, broken = EncodedRows(open_source(config), 3).read(np.arange(8))
        assert not broken and torch.equal(decoded[3], decode(encode(picture(3)), 3))


RELATIVE = ("parquet", "csv", "json", "struct")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", RELATIVE)
def test_relative_names_belong_to_the_folder_of_the_table(
    kind, streaming, tmp_path, monkeypatch, encode, picture
):
    """The working folder has a file of the same name with another image."""
    if streaming and kind == "csv":
        pytest.skip("`datasets` declares no columns of a stream of CSV files")
    for folder, first in (("data", 0), ("elsewhere", 100)):
        (tmp_path / folder / "photos").mkdir(parents=True)
        for number in range(2):
            (tmp_path / folder / "photos" / f"{number}.png").write_bytes(encode(picture(first + number)))
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = [f"photos/{number}.png" for number in range(2)]
    table = datasets.Dataset.from_dict({"image": names})
    file = tmp_path / "data" / f"list.{'parquet' if kind == 'struct' else kind}"
    if kind == "struct":
        table = table.cast_column("image", datasets.Image(decode=False))
        pq.write_table(table.data.table, file)
    else:
        getattr(table, f"to_{kind}")(file)
    source = open_source(DataConfig(path=str(file), image_column="image", streaming=streaming))
    if streaming:
        images = StreamShards(source, 4).first_images
    else:
        images = EncodedRows(source, 3).stored(np.arange(2))
        file_state = source.identity
        (tmp_path / "data" / "photos" / "0.png").write_bytes(encode(picture(7, (30, 30))))
        assert open_source(DataConfig(path=str(file), image_column="image")).identity != file_state
    assert [image.read() for image in images][1] == encode(picture(1))
    (tmp_path / "data" / "photos").rename(tmp_path / "data" / "moved")  # only the working folder has them
    source = open_source(DataConfig(path=str(file), image_column="image"))
    assert EncodedRows(source, 3).stored([1])[0].read() == encode(picture(101))


IMAGE, LABEL, TEXT = datasets.Image(), datasets.ClassLabel(names=["a"]), datasets.Value("string")


def test_columns_are_found_by_type():
    assert find_image_column({"x": TEXT, "picture": IMAGE}, None, "here") == "picture"
    assert find_label_column({"x": TEXT, "kind": LABEL}, None, "here") == "kind"
    assert find_label_column({"x": TEXT, "kind": LABEL}, "x", "here") == "x"


@pytest.mark.parametrize(
    ("features", "requested", "parts"),
    [
        (
            {"a": IMAGE, "b": IMAGE},
            None,
            [2, "data.image_column=a", "a (Image)", "b (Image)"],
        ),
        ({"a": LABEL}, None, ["data.image_column=NAME", "a (ClassLabel)"]),
        ({"a": IMAGE}, "b", ["here", "b", "data.image_column", "a (Image)"]),
        ({"a": LABEL}, "a", ["data.image_column", "a", "ClassLabel"]),
    ],
)
def test_no_or_several_image_columns_are_an_error(features, requested, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        find_image_column(features, requested, "here")


@pytest.mark.parametrize(
    ("features", "requested", "parts"),
    [
        ({"a": LABEL, "b": LABEL}, None, [2, "data.label_column=a"]),
        ({"label": TEXT, "quality": LABEL}, None, ["data.label_column=label", "quality"]),
        ({"a": IMAGE}, None, ["here", "data.label_column=NAME"]),
        (
            {"a": datasets.Value("binary")},
            "a",
            ["data.label_column", "a", "binary"],
        ),
    ],
)
def test_no_or_several_label_columns_are_an_error(features, requested, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        find_label_column(features, requested, "here")


@pytest.mark.parametrize(
    ("values", "feature", "labels", "names"),
    [
        ([2, 0, None, 2], datasets.ClassLabel(names=["x", "y", "z"]), [2, 0, -1, 2], ["x", "y", "z"]),
        ([7, 3, None, 7], datasets.Value("int32"), [1, 0, -1, 1], ["3", "7"]),
        (["dog", "cat", None, "dog"], TEXT, [1, 0, -1, 1], ["cat", "dog"]),
        ([7.0, 3.0, float("nan"), 7.0], datasets.Value("float64"), [1, 0, -1, 1], ["3", "7"]),
        ([7, 3, -1, 7], datasets.Value("int8"), [1, 0, -1, 1], ["3", "7"]),
        ([True, False, None, True], datasets.Value("bool"), [1, 0, -1, 1], ["False", "True"]),
    ],
)
def test_labels(values, feature, labels, names):
    dataset = datasets.Dataset.from_dict({"c": values}, features=datasets.Features({"c": feature}))
    found, classes = label_values(dataset, "c", "here")
    assert found.tolist() == labels and classes == names


def test_a_fraction_is_no_label():
    dataset = datasets.Dataset.from_dict({"c": [1.0, 0.5]})
    with pytest.raises(UserError, match=mentions("here", 0.5)):
        label_values(dataset, "c", "here")


@pytest.mark.parametrize(
    ("features", "image", "label"),
    [
        ({"image": IMAGE, "mask": IMAGE, "label": LABEL}, "image", "label"),
        ({"depth": IMAGE, "img": IMAGE, "label": LABEL, "coarse": LABEL}, "img", "label"),
        ({"jpg": datasets.Value("binary"), "label": datasets.Value("float64")}, "jpg", "label"),
        ({"image": datasets.Value("binary"), "mask": IMAGE, "label": LABEL}, "image", "label"),
        ({"image": TEXT, "photo": IMAGE, "kind": LABEL}, "photo", "kind"),
    ],
)
def test_a_usual_name_decides_between_several_columns(features, image, label):
    assert find_image_column(features, None, "here") == image
    assert find_label_column(features, None, "here") == label


def test_parts_of_the_digits():
    part = open_source(DataConfig(path="digits", split="train[:100]"))
    assert (
        part.num_rows == 100 and open_source(DataConfig(path="digits", split="train+test")).num_rows == 1797
    )
    with pytest.raises(UserError, match=mentions("data.split", "train", "test", "valid")):
        open_source(DataConfig(path="digits", split="valid[:3]"))


@pytest.mark.parametrize("streaming", [False, True])
def test_data_that_cannot_be_opened_are_an_error(streaming, tmp_path, numbered, monkeypatch):
    def assert_error(*parts, split="train", **options):
        with pytest.raises(UserError, match=mentions(*parts)) as error:
            open_source(DataConfig(streaming=streaming, **options), split)
        assert "\n" not in str(error.value)

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_error("./nothing/here", path="./nothing/here")
    assert_error("/nothing/here", path="/nothing/here")
    assert_error(
        "somebody/something",
        "Hub",
        path="somebody/something",
    )
    assert_error("data.path", tmp_path / "nothing*.tar", path=str(tmp_path / "nothing*.tar"))
    (tmp_path / "empty").mkdir()
    assert_error(
        "data.path",
        tmp_path / "empty",
        path=str(tmp_path / "empty"),
    )
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.md").write_text("hello")
    assert_error("data.path", tmp_path / "text", path=str(tmp_path / "text"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.parquet").write_text("hello")
    assert_error("data.path", tmp_path / "bad", "footer", path=str(tmp_path / "bad"))
    config = numbered(20)
    assert_error("numbered", "test", "train", path=config.path, split="test")
    assert_error("digits", "validation", "train", "test", path="digits", split="validation")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, ["data.path"]),
        ({"channels": 4}, ["data.channels", 3, 1, 4]),
        ({"cache": "disk"}, ["data.cache", "auto", "none", "memory", "memmap", "device", "disk"]),
        ({"dtype": "uint16"}, ["data.dtype", "uint8", "uint16"]),
        ({"max_broken_fraction": 2}, ["data.max_broken_fraction", 0, 1, 2]),
        ({"shuffle_window": 0}, ["data.shuffle_window", 1, 0]),
        ({"open_shards": 0}, ["data.open_shards", 1, 0]),
        ({"max_images": 0}, ["data.max_images", 1, 0]),
        ({"max_images": 5, "streaming": True}, ["data.max_images", "data.streaming=false"]),
    ],
)
def test_values_outside_their_range_are_an_error(options, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        open_source(DataConfig(**({"path": "digits"} if options else {}) | options))


def test_files_in_archives_and_elsewhere_are_read(tmp_path, encode, picture):
    data = encode(picture(1))
    with fsspec.open("memory://folder/image.png", "wb") as file:
        file.write(data)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/image.png", data)
    assert EncodedImage(None, "memory://folder/image.png").read() == data
    assert EncodedImage(None, f"zip://a/image.png::{tmp_path / 'images.zip'}").read() == data
    for streaming in (False, True):
        source = open_source(DataConfig(path=str(tmp_path / "images.zip"), streaming=streaming))
        assert source.num_rows == 1


def test_a_slice_of_a_stream_is_an_error(numbered):
    config = numbered(20, streaming=True)
    with pytest.raises(UserError, match=mentions("data.streaming=false", "train[:5]")):
        open_source(config, "train[:5]")


def test_a_message_lists_only_the_first_of_many_columns():
    features = {f"column_{number}": TEXT for number in range(100)}
    with pytest.raises(UserError, match=mentions("column_0 (string)", "data.image_column=NAME")) as error:
        find_image_column(features, None, "here")
    assert len(str(error.value)) < 300


def test_folders_that_declare_their_files_have_own_caches(tmp_path):
    """`datasets` 5.2 names their cache only by the last part of the path and by the patterns in README.md."""
    files = "[{split: train, path: data/*.parquet}]"
    block = f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n"

    def write(place: str, value: int) -> None:
        folder = tmp_path / place / "photos"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(block)
        images = [PIL.Image.new("RGB", (8, 8), (value,) * 3)]
        kinds = datasets.Features(image=datasets.Image())
        rows = datasets.Dataset.from_dict({"image": images}, features=kinds)
        rows.to_parquet(folder / "data" / "train.parquet")
        os.utime(folder / "data" / "train.parquet", (1e9, 1e9))

    def value(place: str) -> int:
        source = open_source(DataConfig(path=str(tmp_path / place / "photos")))
        return int(EncodedRows(source, 3).read(np.array([0]))[0][0].float().mean())

    write("one", 10)
    write("two", 20)
    assert (value("one"), value("two")) == (10, 20)
    write("one", 30)
    assert value("one") == 30


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_table_is_an_error(streaming, numbered):
    """A stream reads its first row while it is opened."""
    config = numbered(10)
    (file,) = Path(config.path).glob("*.parquet")
    content = file.read_bytes()
    file.write_bytes(content[:4] + bytes(64) + content[68:])  # the footer, with the columns, is right
    with pytest.raises(UserError, match=mentions("data.path", config.path)):
        open_source(config, streaming=streaming)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["class", "list", "boxes"])
def test_files_with_other_names_for_a_class_number_are_an_error(kind, ending, tmp_path, encode, picture):
    """`datasets` gives the names of the first file to the numbers of all files, so 20-NN was 0.000."""

    def write(name: str, names: list[str]) -> None:
        classes = ClassLabel(names=names)
        boxes = {"bbox": List(List(datasets.Value("float32"))), "category": List(classes)}
        feature = {"class": classes, "list": List(classes), "boxes": boxes}[kind]
        schema = Features(image=Image(), label=feature).arrow_schema
        objects = {"bbox": [[0, 0, 4, 4]], "category": [1]}
        label = {"class": 1, "list": [1], "boxes": objects}[kind]
        rows = [{"image": {"bytes": encode(picture(1)), "path": None}, "label": label}]
        table = pa.Table.from_pylist(rows, schema=schema)
        if ending == "parquet":
            pq.write_table(table, tmp_path / f"{name}.parquet")
        else:
            with pa.ipc.new_file(tmp_path / f"{name}.arrow", schema) as file:
                file.write_table(table)

    write("train-0", ["ant", "bee"])
    write("train-1", ["ant", "bee", "cat"])  # one more class
    assert open_source(DataConfig(path=str(tmp_path))).num_rows == 2
    write("train-2", ["ant", "cat", "bee"])
    for streaming in (False, True):
        config = DataConfig(path=str(tmp_path), streaming=streaming, label_column="label")
        source = open_source(config)  # a training without labels
        with pytest.raises(UserError, match=mentions("label", 1, "bee", f"train-2.{ending}", "cat")):
            label_column(source, config)
    with pytest.raises(UserError, match=mentions("label", 1, "bee", "cat")):
        labeled_images(config, "train", kinds=["boxes"] if kind == "boxes" else CLASS_KINDS)


def test_names_of_classes_in_one_file_and_numbers_in_another_are_an_error(tmp_path, encode, picture):
    """Before, the classes were the names and the texts "0" and "1"."""
    for number, (label, feature) in enumerate([("bee", TEXT), (1, ClassLabel(names=["ant", "bee"]))]):
        rows = {"image": [{"bytes": encode(picture(number)), "path": None}], "label": [label]}
        table = datasets.Dataset.from_dict(rows, features=Features(image=Image(), label=feature))
        table.to_parquet(tmp_path / f"train-{number}.parquet")
    with pytest.raises(
        UserError, match=mentions("label", "train-0.parquet", "train-1.parquet", "ClassLabel")
    ):
        labeled_images(DataConfig(path=str(tmp_path)), "train")


def test_the_message_about_lists_of_numbers_names_the_type_to_cast_to(tmp_path):
    """pandas, for example, saves pixels as lists."""
    pixels = np.zeros((2, 4, 4, 3), int).tolist()
    datasets.Dataset.from_dict({"image": pixels, "label": [0, 1]}).to_parquet(tmp_path / "train.parquet")
    for column in (None, "image"):
        with pytest.raises(UserError, match=mentions("data.image_column", "image", "Array3D", "uint8")):
            open_source(DataConfig(path=str(tmp_path), image_column=column))
