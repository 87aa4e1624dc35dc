# SPDX-License-Identifier: Apache-2.0
"""Further columns of images: their pixels, their order, the data that have them, and rows that are broken."""

import io
import struct
import tarfile
from dataclasses import replace

import datasets
import image_files
import numpy as np
import PIL.Image
import pytest
import torch
from messages import mentions

from hf_ssl.data import (
    DataConfig,
    as_source,
    labeled_images,
    open_source,
    train_loader,
    without_broken_images,
)
from hf_ssl.data.decode import BrokenImage, read_pixels, stored_image
from hf_ssl.data.further_columns import (
    RowData,
    RowImages,
    class_colors,
    class_numbers,
    decode,
    stored_further_image,
)
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.stream import StreamShards
from hf_ssl.errors import UserError
from hf_ssl.views import ViewPreset
from hf_ssl.views.preset import FURTHER_MEAN, FURTHER_STD

SIZE = (10, 12)  # height, width
KINDS = {"depth": "gray", "normals": "normals", "parts": "classes", "second": "rgb"}
ROWS = 24
PLAIN = ViewPreset(size=8, count=1, jitter=0, gray=0, blur=0)


def png(array, mode=None):
    file = io.BytesIO()
    image = PIL.Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(file, "PNG")
    return file.getvalue()


def tiff(array):
    file = io.BytesIO()
    PIL.Image.fromarray(array).save(file, "TIFF")
    return file.getvalue()


def noise(row, shape, high=256, dtype=np.uint8):
    return np.random.default_rng(row).integers(0, high, shape, dtype=dtype)


def row_arrays(row):
    """Return the pixels of a row as they are before encoding."""
    return {
        "image": noise(row, (*SIZE, 3)),
        "depth": noise(100 + row, SIZE, 9000, np.uint16),
        "normals": noise(200 + row, (*SIZE, 3)),
        "parts": noise(300 + row, SIZE, 5),
        "second": noise(400 + row, (*SIZE, 3)),
    }


def expected_pixels(row):
    """Return the pixels (11, H, W) of a row by the documented rules, written independently."""
    arrays = row_arrays(row)
    depth = arrays["depth"].astype(np.float64)
    depth = np.round((depth - depth.min()) / (depth.max() - depth.min()) * 255)
    palette = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128)}
    parts = np.array([[palette[number] for number in line] for line in arrays["parts"].tolist()])
    joined = [arrays["image"], depth[..., None], arrays["normals"], parts, arrays["second"]]
    return torch.from_numpy(np.concatenate(joined, axis=2).astype(np.uint8)).permute(2, 0, 1)


def row_bytes(row):
    return {name: png(array) for name, array in row_arrays(row).items()}


@pytest.fixture(scope="module")
def table():
    columns = {
        name: [{"bytes": row_bytes(row)[name], "path": None} for row in range(ROWS)] for name in row_bytes(0)
    }
    features = {name: datasets.Image() for name in columns} | {"label": datasets.ClassLabel(2)}
    return datasets.Dataset.from_dict(
        columns | {"label": [row % 2 for row in range(ROWS)]}, features=datasets.Features(features)
    )


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    table.to_parquet(folder / "train.parquet", batch_size=8)
    return folder


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("column_tars")
    for shard in range(2):
        with tarfile.open(folder / f"train-{shard}.tar", "w") as tar:
            for row in range(shard, ROWS, 2):
                for name, content in row_bytes(row).items():
                    ending = "png" if name == "image" else f"{name}.png"
                    info = tarfile.TarInfo(f"{row:03d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


class Torch(torch.utils.data.Dataset):
    """Items that are dicts of arrays, tensors and images of Pillow."""

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        arrays = row_arrays(row)
        return {
            "image": PIL.Image.fromarray(arrays["image"]),
            "depth": arrays["depth"].astype(np.float32) / 1000,
            "normals": torch.from_numpy(arrays["normals"]).permute(2, 0, 1),
            "parts": arrays["parts"].astype(np.int64),
            "second": arrays["second"],
        }


def read_all(source):
    """Return the pixels of all rows, in any order, as a set of bytes."""
    if source.streaming:
        shards = StreamShards(source, 4)
        images = [
            image for shard in range(shards.count) for block in shards.blocks(shard) for image in block.images
        ]
    else:
        images = EncodedRows(source, 3).stored(range(len(source.dataset)))
    return sorted(decode(image.read(), 3).contiguous().numpy().tobytes() for image in images)


KEYED = {f"{name}.png": kind for name, kind in KINDS.items()}


@pytest.mark.parametrize(
    "kind", ["folder", "stream", "tars", "tar stream", "table", "iterable", "transform", "torch", "generator"]
)
def test_every_kind_of_data_gives_the_same_pixels(kind, folder, tars, table):
    config = DataConfig.of({"further_image_columns": KINDS})
    if kind in ("folder", "stream"):
        source = open_source(replace(config, path=str(folder), streaming=kind == "stream"))
    elif kind in ("tars", "tar stream"):
        config = replace(config, further_image_columns=KEYED, streaming=kind == "tar stream")
        source = open_source(replace(config, path=str(tars)))
    else:
        plain = table.remove_columns("label")
        rows = [plain[row] for row in range(ROWS)]
        data = {
            "table": plain,
            "iterable": plain.to_iterable_dataset(num_shards=2),
            "transform": plain.with_transform(lambda batch: batch),
            "torch": Torch(),
            "generator": datasets.IterableDataset.from_generator(lambda: iter(rows)),
        }[kind]
        source = as_source(data, config)
    expected = sorted(expected_pixels(row).contiguous().numpy().tobytes() for row in range(ROWS))
    assert list(source.further_columns.values()) == list(KINDS.values())
    assert read_all(source) == expected


def kinds_of_data(columns, features):
    """Return rows of these columns as data with declared columns, and as data whose columns are unknown."""
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows = [{name: values[row] for name, values in columns.items()} for row in range(len(table))]
    return {
        "table": table,
        "stream": table.to_iterable_dataset(),
        "declared": datasets.IterableDataset.from_generator(lambda: iter(rows), features=table.features),
        "undeclared": datasets.IterableDataset.from_generator(lambda: iter(rows)),
        "transform": table.with_transform(lambda batch: {name: columns[name][:1] for name in batch}),
        "items": rows,
    }


@pytest.mark.parametrize("kind", ["table", "stream", "declared", "undeclared", "transform", "items"])
def test_further_columns_of_arrays_follow_the_rules_of_their_kinds(kind):
    """Missing rows do not turn the whole numbers of other rows into floating-point numbers."""
    arrays = [row_arrays(row) for row in range(2)]
    columns = {
        "content": [each["image"] for each in arrays],
        "depth": [each["depth"] for each in arrays],
        "normals": [each["normals"] for each in arrays],
        # `datasets` 5 cannot read a missing array from a generator with declared columns.
        "parts": [arrays[0]["parts"], arrays[1]["parts"] if kind == "declared" else None],
        "second": [each["second"] for each in arrays],
    }
    types = {"content": "uint8", "depth": "uint16", "normals": "uint8", "parts": "int32", "second": "uint8"}
    features = {
        name: datasets.Array2D(SIZE, dtype)
        if name in ("depth", "parts")
        else datasets.Array3D((*SIZE, 3), dtype)
        for name, dtype in types.items()
    }
    config = DataConfig.of({"further_image_columns": KINDS})
    source = as_source(kinds_of_data(columns, features)[kind], config)
    assert source.image_column == "content" and source.further_columns == KINDS
    if source.streaming:
        stored = StreamShards(source, 1).first_images
    else:
        stored = EncodedRows(source, 3).stored([0, 1])
    assert torch.equal(decode(stored[0].read(), 3), expected_pixels(0))
    if kind not in ("declared", "transform"):
        with pytest.raises(BrokenImage, match=mentions("column parts", "no image")):
            stored[1].read()


@pytest.mark.parametrize("kind", ["table", "stream", "declared", "undeclared", "transform", "items"])
@pytest.mark.parametrize(("image", "further"), [("content", "depth"), ("content", "image")])
def test_a_further_column_is_no_candidate_for_the_image(kind, image, further):
    """Without the further column, "image" and two columns of bytes would give another result."""
    columns = {image: [png(noise(0, (*SIZE, 3)))], further: [png(noise(1, SIZE))], "name": ["a"]}
    features = {name: datasets.Value("binary") for name in (image, further)} | {
        "name": datasets.Value("string")
    }
    data = kinds_of_data(columns, features)[kind]
    source = as_source(data, DataConfig.of({"further_image_columns": {further: "gray"}}))
    assert source.image_column == image and source.further_columns == {further: "gray"}
    only = as_source(data, DataConfig.of({"further_image_columns": {further: "gray"}}), only_image=True)
    assert only.image_column == image and only.further_columns == {}


def test_the_order_of_the_columns_is_that_of_their_names(folder):
    config = DataConfig(path=str(folder), further_image_columns=dict(reversed(KINDS.items())))
    assert list(open_source(config).further_columns) == sorted(KINDS)


@pytest.mark.parametrize("cache", ["none", "memory", "device", "memmap"])
def test_every_cache_gives_the_same_batches(cache, folder):
    config = DataConfig(path=str(folder), further_image_columns=KINDS, cache=cache)
    loader = train_loader(open_source(config), PLAIN, config=config, seed=3, batch_size=8)
    batch = next(iter(loader))
    other = replace(config, cache="none")
    expected = next(iter(train_loader(open_source(other), PLAIN, config=other, seed=3, batch_size=8)))
    found = batch.views("cpu").pixel_values
    assert found.shape == (8, 1, 13, 8, 8) and torch.equal(found, expected.views("cpu").pixel_values)
    assert batch.mirrored == (4,)


def test_a_cache_of_other_columns_is_not_reused(folder):
    for columns in ({}, {"second": "rgb"}, {"normals": "rgb"}):
        config = DataConfig(path=str(folder), cache="memmap", further_image_columns=columns)
        batch = next(iter(train_loader(open_source(config), PLAIN, config=config, seed=0, batch_size=4)))
        rows = batch.sample_index.tolist()
        want = torch.stack([expected_pixels(row) for row in rows])
        first = {"second": 10, "normals": 4}.get(next(iter(columns), ""), 3)
        want = torch.cat([want[:, :3], want[:, first : first + 3 * len(columns)]], dim=1)
        assert torch.equal(batch.images, want)


def test_the_image_part_of_a_batch_does_not_depend_on_further_columns(folder):
    """Also the seeds of a stream, which are hashes of the image."""
    for streaming in (False, True):
        found = []
        for columns in ({}, KINDS):
            config = DataConfig(path=str(folder), streaming=streaming, further_image_columns=columns)
            batch = next(
                iter(
                    train_loader(open_source(config), ViewPreset(size=8), config=config, seed=1, batch_size=8)
                )
            )
            found.append(batch)
        plain, joined = (batch.views("cpu").pixel_values for batch in found)
        assert np.array_equal(found[0].seeds, found[1].seeds)
        torch.testing.assert_close(joined[:, :, :3], plain, rtol=0, atol=1e-6)


def joined(kind, data, image=None):
    """Return the pixels of a further column of one row."""
    image = png(noise(0, (*SIZE, 3))) if image is None else image
    stored = (
        stored_image({"bytes": data, "path": None})
        if isinstance(data, bytes)
        else stored_further_image(data, kind)
    )
    return decode(RowImages(stored_image(image), {"extra": (kind, stored)}).read(), 3)[3:]


def test_gray_images_of_8_bits_keep_their_values():
    values = noise(1, SIZE, 50)
    assert torch.equal(joined("gray", png(values))[0], torch.from_numpy(values))
    color = noise(2, (*SIZE, 3))
    luma = np.asarray(PIL.Image.fromarray(color).convert("L"))
    assert torch.equal(joined("gray", png(color))[0], torch.from_numpy(luma.copy()))


@pytest.mark.parametrize("form", ["png16", "tiff", "array", "integers"])
def test_depth_is_scaled_to_its_own_range(form):
    depth = np.linspace(500, 4500, 120).reshape(SIZE)
    given = {
        "png16": png(depth.astype(np.uint16)),
        "tiff": tiff(depth.astype(np.float32)),
        "array": depth[..., None],
        "integers": depth.astype(np.int32),
    }[form]
    found = joined("gray", given)[0].double()
    expected = torch.from_numpy((depth - 500) / 4000 * 255)
    assert (found.min(), found.max()) == (0, 255)
    assert (found - expected).abs().max() <= 0.6


def test_missing_depth_is_zero_and_does_not_change_the_range():
    depth = np.full(SIZE, 2.0, np.float32)
    depth[0, :4] = (1.0, 3.0, np.nan, np.inf)
    found = joined("gray", tiff(depth))[0]
    assert found[0, :5].tolist() == [0, 255, 0, 0, 128]
    assert not joined("gray", np.full(SIZE, 7, np.uint16)).any()
    assert not joined("gray", np.full(SIZE, np.nan)).any()


def test_class_numbers_have_the_colors_of_pascal_voc():
    colors = class_colors()
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 7: (128, 128, 128), 8: (64, 0, 0),
             15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}  # fmt: skip
    assert {number: tuple(colors[number].tolist()) for number in known} == known
    assert len(np.unique(colors, axis=0)) == 256


@pytest.mark.parametrize("form", ["L", "P", "I;16", "1", "array", "mask"])
def test_class_numbers_are_read_in_every_form(form):
    numbers = noise(5, SIZE, 2 if form in ("1", "mask") else 200)
    palette = PIL.Image.fromarray(numbers)
    palette.putpalette([7, 9, 11] * 256)  # colors without effect
    file = io.BytesIO()
    palette.save(file, "PNG")
    given = {
        "L": png(numbers),
        "P": file.getvalue(),
        "I;16": png(numbers.astype(np.uint16)),
        "1": png(numbers * 255, "1"),
        "array": torch.from_numpy(numbers.astype(np.int64))[None],
        "mask": numbers.astype(bool),
    }[form]
    assert torch.equal(joined("classes", given), torch.from_numpy(class_colors()[numbers]).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("normals", png(noise(0, SIZE)), ("three channels", "L")),
        ("normals", png(noise(0, SIZE, 999, np.uint16)), ("three channels", "uint16")),
        ("classes", png(noise(0, (*SIZE, 3))), ("one channel", "RGB")),
        ("classes", png(noise(0, SIZE, 894, np.uint16)), ("0 to 255", 891)),
        ("classes", np.zeros(SIZE, np.float32), ("whole numbers", "float32")),
        ("gray", png(noise(0, (5, 12))), ("10x12", "5x12")),
        ("rgb", b"no image", ("not an image",)),
        ("gray", b"", ("zero bytes",)),
    ],
)
def test_images_that_do_not_fit_are_broken(kind, data, words):
    with pytest.raises(BrokenImage, match=mentions("column extra", *words)):
        joined(kind, data)


def test_all_columns_follow_their_exif_orientation():
    def rotated(array):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        PIL.Image.fromarray(array).save(file, "PNG", exif=exif)
        return file.getvalue()

    image, numbers = noise(0, (*SIZE, 3)), noise(1, SIZE, 4)
    found = joined("classes", rotated(numbers), rotated(image))
    assert torch.equal(found, torch.from_numpy(class_colors()[np.rot90(numbers, -1)].copy()).permute(2, 0, 1))


def test_a_row_with_one_broken_column_is_a_broken_image(table, tmp_path):
    small = {"bytes": png(noise(0, (4, 4))), "path": None}
    depth = [small if row == 5 else {"bytes": row_bytes(row)["depth"], "path": None} for row in range(ROWS)]
    depth[7] = {"bytes": None, "path": None}
    broken = table.remove_columns("depth").add_column("depth", depth).cast_column("depth", datasets.Image())
    broken.to_parquet(tmp_path / "train.parquet")
    config = DataConfig(path=str(tmp_path), further_image_columns={"depth": "gray"}, max_broken_fraction=0.2)
    batches = list(train_loader(open_source(config), PLAIN, config=config, seed=0, batch_size=8))
    messages = sorted({message for batch in batches for message in batch.broken})
    assert len(messages) == 2
    assert "row 5: column depth" in messages[0] and "10x12" in messages[0] and "4x4" in messages[0]
    assert "row 7: column depth: the row has no image" in messages[1]
    assert len(without_broken_images(broken, config)) == ROWS - 2
    assert len(without_broken_images(broken, replace(config, further_image_columns={}))) == ROWS


def test_evaluations_need_only_the_image(table, tmp_path):
    """The further columns are no candidates for the column of images, and they may be missing."""
    named = table.rename_column("image", "photo")
    named.to_parquet(tmp_path / "train.parquet")
    config = DataConfig(path=str(tmp_path), further_image_columns=KINDS)
    assert open_source(config).image_column == "photo"
    images = labeled_images(config, "train")
    assert next(images.iter_batches(4))[3].shape == (3, *SIZE)
    only = as_source(named.select_columns(["photo"]), config, only_image=True)
    assert only.image_column == "photo" and only.further_columns == {}
    with pytest.raises(UserError, match=mentions("data.image_column", "photo")):
        open_source(replace(config, further_image_columns={}))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"dept": "gray"}, ("data.further_image_columns.dept", "depth")),
        ({"label": "gray"}, ("data.further_image_columns.label", "ClassLabel", "depth (Image)")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_columns_are_errors(columns, words, streaming, folder):
    with pytest.raises(UserError, match=mentions(*words)):
        open_source(DataConfig(path=str(folder), further_image_columns=columns, streaming=streaming))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"further_image_columns": {"depth": "grey"}}, ("data.further_image_columns.depth", "grey", "gray")),
        ({"further_image_columns": {"a": "rgb"}, "image_column": "a"}, ("image_column", "a")),
        ({"further_image_columns": ["depth"]}, ("data.further_image_columns", "mapping")),
    ],
)
def test_wrong_settings_are_errors(settings, words):
    with pytest.raises(UserError, match=mentions(*words)):
        DataConfig.of(settings)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([np.zeros((8, 8, 3), np.uint8)] * 4, ("data.further_image_columns", "depth", "dicts")),
        ([{"image": np.zeros((8, 8, 3), np.uint8)}] * 4, ("data.further_image_columns.depth", "image")),
        (
            [{"image": np.zeros((8, 8, 3), np.uint8), "depth": 3}] * 4,
            ("data.further_image_columns.depth", "float64"),
        ),
    ],
)
def test_python_data_without_the_columns_are_an_error(data, words):
    with pytest.raises(UserError, match=mentions(*words)):
        as_source(data, DataConfig.of({"further_image_columns": {"depth": "gray"}}))


def test_an_item_that_lacks_a_column_is_broken():
    items = [{"image": np.zeros((8, 8, 3), np.uint8), "depth": np.zeros((8, 8), np.uint8)} for _ in range(4)]
    del items[2]["depth"]
    source = as_source(items, DataConfig.of({"further_image_columns": {"depth": "gray"}}))
    images, broken = EncodedRows(source, 3).read(np.arange(4))
    assert list(broken) == [2] and "depth" in broken[2]
    assert [len(image) for image in images] == [4] * 4


def test_normals_change_their_direction_with_a_flip(folder):
    config = DataConfig(path=str(folder), further_image_columns={"normals": "normals", "second": "rgb"})
    preset = ViewPreset(size=10, count=1, jitter=0, gray=0, blur=0, scale=(1, 1), ratio=(1, 1), flip=1.0)
    views = {}
    for flip in (0.0, 1.0):
        chosen = replace(preset, flip=flip)
        batch = next(iter(train_loader(open_source(config), chosen, config=config, seed=0, batch_size=8)))
        views[flip] = batch.views("cpu").pixel_values[:, 0] * FURTHER_STD + FURTHER_MEAN
    expected = views[0.0].flip(-1)[:, 3:]
    expected[:, 0] = 1 - expected[:, 0]
    torch.testing.assert_close(views[1.0][:, 3:], expected, rtol=0, atol=1e-5)


def test_a_transparent_value_of_16_bits_does_not_change_depth_and_classes():
    numbers = np.array([[0, 51, 255]], np.uint16)
    content = image_files.png(numbers, before=[(b"tRNS", struct.pack(">H", 0))])
    image = np.zeros((1, 3, 3), np.uint8)
    found = decode(RowData(image, {"depth": ("gray", content), "parts": ("classes", content)}), 3)
    assert found[3].tolist() == [[0, 51, 255]]
    assert found[4:].permute(1, 2, 0).tolist() == [class_colors()[[0, 51, 255]].tolist()]


@pytest.mark.parametrize("maximum", [1, 20, 150, 255, 300, 65535])
@pytest.mark.parametrize("kind", [b"P5", b"P2"])
def test_class_numbers_of_a_pgm_file_are_not_scaled(maximum, kind):
    """Pillow 13.0 returns class 1 as 13 if the maximum in the header is 20."""
    numbers = np.array([[0, 1, min(maximum, 255)]])
    pixels = numbers.astype(">u2" if maximum > 255 else "u1").tobytes()
    text = " ".join(map(str, numbers[0])).encode()
    content = kind + b" 3 1 %d\n" % maximum + (pixels if kind == b"P5" else text)
    opened = PIL.Image.open(io.BytesIO(content))
    for data in (content, opened, opened):
        assert read_pixels(data, class_numbers)[0].tolist() == numbers.tolist()
    shown = np.rint(numbers * (255 / maximum))
    assert decode(content, 1)[0].tolist() == shown.tolist()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_class_numbers_of_few_bits_in_a_tiff_file_are_not_scaled(bits):
    """Pillow 13.0 returns class 1 of a 4-bit file as 17."""
    numbers = [0, 1, 2**bits - 1]
    pixels = "".join(f"{number:0{bits}b}" for number in numbers).ljust(16, "0")
    tags = {256: 3, 257: 1, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 2}  # 273: place of pixels
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    end = struct.pack("<H", len(tags)) + entries + bytes(4)
    content = b"II*\0" + struct.pack("<I", 10) + int(pixels, 2).to_bytes(2, "big") + end
    opened = PIL.Image.open(io.BytesIO(content))
    for data in (content, opened, opened):
        assert read_pixels(data, class_numbers)[0, 0].tolist() == numbers
    assert decode(content, 1)[0, 0].tolist() == [round(number * 255 / (2**bits - 1)) for number in numbers]


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("before", [[], [(b"tRNS", struct.pack(">H", 1))]])
def test_class_numbers_of_few_bits_in_a_png_file_are_not_scaled(bits, before):
    """Pillow 13.0 returns class 1 of a 4-bit file as 17."""
    numbers = np.array([[0, 1, 2**bits - 1]], np.uint8)
    content = image_files.png(numbers, bits=bits, before=before)
    opened = PIL.Image.open(io.BytesIO(content))
    for data in (content, opened, opened):
        assert read_pixels(data, class_numbers)[0].tolist() == numbers.tolist()
    shown = np.rint(numbers * (255 / (2**bits - 1)))
    if not before:
        assert decode(content, 1)[0].tolist() == decode(content, 1, (0, 1))[0].tolist() == shown.tolist()
    pixels = RowData(np.zeros((1, 3, 3), np.uint8), {"depth": ("gray", image_files.png(numbers, bits=bits))})
    assert decode(pixels, 3)[3].tolist() == shown.tolist()
