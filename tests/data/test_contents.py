# SPDX-License-Identifier: Apache-2.0
"""Images with the same content are found in every kind of storage."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Array3D, Dataset, Features, Image, Value

from hf_ssl.data import DataConfig, as_source, contents
from hf_ssl.data.contents import same_contents


@pytest.fixture
def files(tmp_path, encode, picture) -> list[Path]:
    """Write five files. The last two have the content of the first two."""
    found = []
    for number, content in enumerate((0, 1, 2, 0, 1)):
        found.append(tmp_path / f"{number}.png")
        found[-1].write_bytes(encode(picture(content)))
    return found


def stored(kind: str, files: list[Path], folder: Path) -> Dataset | list[str]:
    if kind == "files":
        return [str(file) for file in files]
    if kind == "archive":
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            for file in files:
                archive.write(file, file.name)
        paths = [f"zip://{file.name}::{folder / 'all.zip'}" for file in files]
        return Dataset.from_dict({"image": paths}, features=Features(image=Image(decode=False)))
    encoded = [file.read_bytes() for file in files]
    if kind == "bytes":
        return Dataset.from_dict({"image": encoded}, features=Features(image=Value("binary")))
    if kind == "images":
        rows = [{"bytes": content, "path": f"{number}.png"} for number, content in enumerate(encoded)]
        return Dataset.from_dict({"image": rows}, features=Features(image=Image()))
    arrays = [
        np.full((2, 2, 3), len(encoded) - encoded[::-1].index(content), np.uint8) for content in encoded
    ]
    return Dataset.from_dict({"image": arrays}, features=Features(image=Array3D((2, 2, 3), "uint8")))


@pytest.mark.parametrize("kind", ["files", "archive", "bytes", "images", "arrays"])
def test_equal_images_have_equal_numbers(kind: str, files: list[Path], tmp_path: Path) -> None:
    source = as_source(stored(kind, files, tmp_path), DataConfig())
    (numbers,) = same_contents([source]) or []
    assert numbers.tolist() == [0, 1, 2, 0, 1]
    first, last = same_contents([source.select(np.arange(2)), source.select(np.arange(1, 5))]) or []
    assert np.isin(last, first).tolist() == [True, False, True, True]


def test_a_copy_of_a_file_is_found_in_a_table(files: list[Path], tmp_path: Path) -> None:
    sources = [
        as_source(stored(kind, files, tmp_path), DataConfig()) for kind in ("files", "archive", "images")
    ]
    assert [each.tolist() for each in same_contents(sources) or []] == [[0, 1, 2, 0, 1]] * 3


def test_missing_files_are_not_equal(files: list[Path], tmp_path: Path) -> None:
    source = as_source(stored("files", files, tmp_path), DataConfig())
    for file in files[:2]:
        file.unlink()
    (numbers,) = same_contents([source]) or []
    assert len(set(numbers.tolist())) == 5


def test_data_in_python_and_large_data_are_not_compared(
    files: list[Path], tmp_path: Path, monkeypatch
) -> None:
    source = as_source(stored("images", files, tmp_path), DataConfig())
    assert same_contents([source, as_source([np.zeros((4, 4, 3), np.uint8)] * 2, DataConfig())]) is None
    monkeypatch.setattr(contents, "MOST_BYTES", 100)
    assert same_contents([source]) is None
