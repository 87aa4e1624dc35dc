# SPDX-License-Identifier: Apache-2.0
import os
import pickle

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from messages import mentions, missing

from hf_ssl.data import (
    DataConfig,
    all_images,
    as_source,
    builders,
    inspection,
    open_source,
    without_broken_images,
)
from hf_ssl.data import decoded as decoded_module
from hf_ssl.data import folder as folder_module
from hf_ssl.data.batch import is_small
from hf_ssl.data.decoded import DecodedRows, decoded_rows
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.inspection import common_size
from hf_ssl.errors import UserError


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("cache", ["memory", "memmap", "auto"])
def test_images_decoded_in_advance_equal_images_decoded_each_time(cache, channels, numbered):
    source = open_source(numbered(700, row_group=200, broken=(3, 600)))
    stored = decoded_rows(source, channels, cache)
    rows = np.array([699, 3, 0, 600, 512, 3])
    pixels, broken = stored.read(rows)
    expected, expected_broken = EncodedRows(source, channels).read(rows)
    assert broken == expected_broken and sorted(broken) == [1, 3, 5]
    for position in (0, 2, 4):
        assert torch.equal(pixels[position], expected[position])


@pytest.mark.parametrize("has_times", [True, False])
@pytest.mark.parametrize("kind", ["folder", "parquet", "names"])
def test_replaced_files_with_their_old_times_are_read_again(
    kind: str, has_times: bool, tmp_path, datasets_cache, monkeypatch
):
    """`rsync -t` and the layers of containers keep the time of the file, and its size may be equal too.

    Some network file systems have no time of the last change of the status.
    """
    if not has_times:
        for module in ("location", "folder", "builders"):
            monkeypatch.setattr(f"hf_ssl.data.{module}.file_state", lambda status: str(status.st_size))
    folder = tmp_path / "data"
    folder.mkdir()
    image, table = folder / "one.bmp", folder / "table.parquet"

    def write(value: int) -> None:
        PIL.Image.new("RGB", (8, 8), (value,) * 3).save(image)
        if kind == "parquet":
            rows = [{"bytes": image.read_bytes(), "path": None}]
            image.unlink()
        else:
            rows = [{"bytes": None, "path": str(image)}]
        if kind != "folder" and not (kind == "names" and table.exists()):
            datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image()).to_parquet(
                table
            )
        for file in folder.iterdir():
            os.utime(file, (1e9, 1e9))

    def value() -> tuple[int, str]:
        if not has_times:  # another process has not listed the folder before
            folder_module._folder_cache.clear()
            folder_module._split_cache.clear()
            builders._last_builder.clear()
        source = open_source(DataConfig(path=str(folder if kind == "folder" else table), cache="memmap"))
        pixels = decoded_rows(source, 3, "memmap").read(np.array([0]))[0][0]
        return int(pixels.float().mean()), source.revision

    write(40)
    first = value()
    write(41)
    second = value()
    assert (first[0], second[0]) == (40, 41) and first[1] != second[1]
    assert value() == second


def test_a_cache_file_is_written_once_and_reused(numbered, datasets_cache, monkeypatch):
    config = numbered(30, broken=(4,))
    first = decoded_rows(open_source(config), 3, "memmap")
    assert first.file.parent == datasets_cache / "hf_ssl"
    assert not list(first.file.parent.glob("_writing-*"))
    monkeypatch.setattr(decoded_module, "_fill", None)
    again = decoded_rows(open_source(config), 3, "memmap")
    assert again.file == first.file and again.broken == first.broken and (again.pixels == first.pixels).all()
    copy = pickle.loads(pickle.dumps(again))
    assert len(pickle.dumps(again)) < 5000
    assert (copy.pixels == first.pixels).all() and copy.read(np.array([4]))[1] == first.read(np.array([4]))[1]


def test_a_cache_file_whose_writing_was_interrupted_is_not_used(numbered, monkeypatch):
    config = numbered(31)
    fill = decoded_module._fill

    def interrupted(pixels, rows):
        pixels[:10] = 7
        raise KeyboardInterrupt

    monkeypatch.setattr(decoded_module, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded_rows(open_source(config), 3, "memmap")
    monkeypatch.setattr(decoded_module, "_fill", fill)
    source = open_source(config)
    assert torch.equal(
        decoded_rows(source, 3, "memmap").read(np.arange(5))[0][2],
        EncodedRows(source, 3).read(np.arange(5))[0][2],
    )


def test_auto_does_not_cache_large_data_or_images_of_several_sizes(numbered, image_folder, monkeypatch):
    assert decoded_rows(open_source(DataConfig(path=str(image_folder))), 3, "auto") is None
    source = open_source(numbered(20))
    assert isinstance(decoded_rows(source, 3, "auto"), DecodedRows)
    assert decoded_rows(source, 3, "auto").file is None
    assert decoded_rows(source, 3, "auto", shared=True).file is not None
    assert decoded_rows(source, 3, "none") is None
    monkeypatch.setattr(decoded_module, "_AUTO_BYTES", 20 * 3 * 120 - 1)
    assert decoded_rows(open_source(numbered(20)), 3, "auto") is None


def test_auto_does_not_cache_images_over_96_pixels_but_memory_does(numbered):
    source = open_source(numbered(4, size=(97, 20)))
    assert decoded_rows(source, 3, "auto") is None
    assert decoded_rows(source, 3, "memory").pixels.shape == (4, 3, 97, 20)


@pytest.mark.parametrize("cache", ["memory", "memmap"])
def test_an_image_of_another_size_is_named(cache, tmp_path, write_parquet, encode, picture, caplog):
    images = [encode(picture(number, (12, 11 if number == 301 else 10))) for number in range(600)]
    config = DataConfig(
        path=str(write_parquet(tmp_path / "d" / "train.parquet", images, row_group=600).parent)
    )
    parts = [f"data.cache={cache}", "12x10", "12x11", "row 301"]
    if cache == "memory":  # recipes set it, and users have images of several sizes
        for _ in range(2):
            assert decoded_rows(open_source(config), 3, cache) is None
        (text,) = [record.getMessage() for record in caplog.records if "data.cache" in record.getMessage()]
        assert missing(text, *parts) == []
    else:
        with pytest.raises(UserError, match=mentions(*parts)):
            decoded_rows(open_source(config), 3, cache)
    assert decoded_rows(open_source(config), 3, "auto") is None


@pytest.mark.parametrize("cache", ["device", "memmap"])
def test_images_of_several_sizes_cannot_be_cached(cache, image_folder):
    with pytest.raises(UserError, match=mentions(f"data.cache={cache}", "size")):
        decoded_rows(open_source(DataConfig(path=str(image_folder))), 3, cache)


def test_data_that_are_opened_twice_are_decoded_once_while_they_are_in_use(numbered, monkeypatch):
    config = numbered(32)
    first = decoded_rows(open_source(config), 3, "auto")
    assert decoded_rows(open_source(config), 3, "auto") is first
    assert decoded_rows(open_source(config), 1, "auto") is not first
    some = open_source(config).select(np.array([4, 2]))
    assert torch.equal(decoded_rows(some, 3, "auto").read(np.arange(2))[0], first.read(np.array([4, 2]))[0])
    first, pixels = None, first.pixels
    again = decoded_rows(open_source(config), 3, "auto")
    assert again.pixels is not pixels and (again.pixels == pixels).all()


def test_no_space_on_the_disk(numbered, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(UserError, match=mentions("data.cache=memmap", "0.0 GiB")):
        decoded_rows(open_source(numbered(33)), 3, "memmap")


def test_the_inspection_decodes_one_image_of_each_size(tmp_path, monkeypatch):
    for number in range(64):
        PIL.Image.new("RGB", (8 + number % 2, 8)).save(tmp_path / f"{number}.png")
    decoded = []
    monkeypatch.setattr(inspection, "decode", lambda *arguments, own=inspection.decode: (
        decoded.append(1), own(*arguments))[1])  # fmt: skip
    assert common_size(open_source(DataConfig(path=str(tmp_path))), 3) is None
    assert len(decoded) == 2
    for number in range(1, 64, 2):
        (tmp_path / f"{number}.png").unlink()
    assert common_size(open_source(DataConfig(path=str(tmp_path))), 3) == (8, 8)
    assert len(decoded) == 3


def test_the_inspection_applies_the_orientation_and_skips_broken_images(tmp_path):
    upright = PIL.Image.new("RGB", (6, 9))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for number, kind in enumerate(("jpg", "png", "webp", "tif")):
        upright.save(tmp_path / f"{number}.{kind}")
        upright.transpose(PIL.Image.Transpose.ROTATE_90).save(tmp_path / f"turned{number}.{kind}", exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    whole = (tmp_path / "0.jpg").read_bytes()
    PIL.Image.new("RGB", (50, 50)).save(tmp_path / "large.bmp")
    (tmp_path / "large.bmp").write_bytes((tmp_path / "large.bmp").read_bytes()[:60])  # header only
    assert common_size(open_source(DataConfig(path=str(tmp_path))), 3) == (9, 6)
    for path in tmp_path.iterdir():
        path.write_bytes(whole[:40])
    (tmp_path / "another.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=mentions("data.path", tmp_path, "row 0")):
        common_size(open_source(DataConfig(path=str(tmp_path))), 3)


@pytest.mark.parametrize(("size", "small"), [(None, False), ((96, 96), True), ((8, 97), False)])
def test_images_of_one_size_up_to_96_pixels_are_small(size, small):
    assert is_small(size) == small


def test_images_that_cannot_be_read_are_left_out(numbered, caplog) -> None:
    dataset = open_source(numbered(700, row_group=200, broken=(3, 600))).dataset
    kept = without_broken_images(dataset)
    assert len(kept) == 698 and "2 of 700" in caplog.text and "row 600" in caplog.text
    assert sum(map(len, all_images(as_source(kept, DataConfig()), 3, 256))) == 698
    with pytest.raises(UserError, match=mentions("row 3", "without_broken_images")):
        next(all_images(as_source(dataset, DataConfig()), 3, 256))
    with pytest.raises(UserError, match=mentions("dataset", "list")):
        without_broken_images([])  # type: ignore[arg-type]
