# SPDX-License-Identifier: Apache-2.0
"""A table of layouts of data sets, as other programs write them, each with what must be read from it.

The writers here are Pillow, pyarrow, pandas, tarfile and zipfile. Each class has its own color, so that wrong
labels are noticed.
"""

import csv
import io
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from messages import mentions
from PIL import Image

from hf_ssl.building import open_labeled_splits
from hf_ssl.data import DataConfig, open_source
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig

CLASSES = {"bus": (250, 0, 0), "car": (0, 250, 0), "train": (0, 0, 250)}
"""Name of a class -> color of its images. The name of one class is also that of a split."""


TWO = {"bus": 4, "car": 4}, {"bus": 2, "car": 2}
THREE = {**TWO[0], "train": 4}, {**TWO[1], "train": 2}
TWO_SPLITS = (("train", TWO[0], 0), ("test", TWO[1], 10))
"""Split, {class: number of images}, number of the first image."""


def number_of(name: str) -> int:
    return list(CLASSES).index(name)


def encoded(name: str, number: int, kind: str = "png") -> bytes:
    """Return an image file with the color of a class and a small difference for each number."""
    color = tuple(min(255, value + number) for value in CLASSES[name])
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(stream, kind)
    return stream.getvalue()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def folders(root: Path, counts: Mapping[str, int], first: int = 0, ending: str = "png") -> None:
    """Write a folder of images for each class."""
    for name, count in counts.items():
        for number in range(first, first + count):
            write(root / name / f"{number}.{ending}", encoded(name, number))


def splits_of_folders(root: Path) -> None:
    folders(root / "train", {"bus": 4, "car": 4})
    folders(root / "test", {"bus": 2, "car": 2}, first=10)


def table(counts: Mapping[str, int], label: Callable[[str], Any], first: int = 0) -> list[dict[str, Any]]:
    """Return rows with the columns image (bytes and path) and label."""
    return [
        {"image": {"bytes": encoded(name, number), "path": f"{number}.png"}, "label": label(name)}
        for name, count in counts.items()
        for number in range(first, first + count)
    ]


def parquet(root: Path, label: Callable[[str], Any], test: Mapping[str, int] | None = None) -> None:
    """Write train.parquet and test.parquet by pandas. Images are structs of bytes and path."""
    root.mkdir(exist_ok=True)
    pd.DataFrame(table({"bus": 4, "car": 4, "train": 4}, label)).to_parquet(root / "train.parquet")
    pd.DataFrame(table(test or {"bus": 2, "car": 2, "train": 2}, label, 10)).to_parquet(root / "test.parquet")


def tar(path: Path, counts: Mapping[str, int], endings: tuple[str, ...], first: int = 0) -> None:
    """Write a WebDataset shard with images of different endings and JSON or cls files with labels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        place = 0
        for name, count in counts.items():
            for number in range(first, first + count):
                ending = endings[place % len(endings)]
                kind = {"jpg": "jpeg"}.get(ending, ending)
                label = str(list(CLASSES).index(name)).encode()
                for suffix, content in ((ending, encoded(name, number, kind)), ("cls", label)):
                    entry = tarfile.TarInfo(f"{place:05d}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
                place += 1


def zipped(path: Path, root: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.png")):
            archive.write(file, file.relative_to(root))


def stored(root: Path, features: Features | None, label: Callable[[str], Any]) -> None:
    """Write Parquet files by `datasets`."""
    splits = {
        "train": Dataset.from_list(table({"bus": 4, "car": 4, "train": 4}, label), features),
        "test": Dataset.from_list(table({"bus": 2, "car": 2, "train": 2}, label, 10), features),
    }
    for name, rows in DatasetDict(splits).items():
        rows.to_parquet(root / f"{name}-00000-of-00001.parquet")


def csv_table(root: Path, *, absolute: bool) -> None:
    """Write images, and tables of file names. Relative names start in the folder of the tables."""
    (root / "tables").mkdir()
    for split, counts, first in TWO_SPLITS:
        folders(root / "files", counts, first)
        places = [
            root / "files" / name / f"{number}.png"
            for name, count in counts.items()
            for number in range(first, first + count)
        ]
        texts = [str(place) if absolute else f"../files/{place.parent.name}/{place.name}" for place in places]
        frame = pd.DataFrame({"image": texts, "label": [place.parent.name for place in places]})
        frame.to_parquet(root / "tables" / f"{split}.parquet")


def metadata(root: Path, listed: int) -> None:
    """Write a folder whose metadata.csv names some of its images."""
    folders(root / "train", {"bus": 4, "car": 4})
    folders(root / "test", {"bus": 2, "car": 2}, first=10)
    for split in ("train", "test"):
        files = sorted((root / split).rglob("*.png"))
        with (root / split / "metadata.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["file_name", "label"])
            for file in files[: listed if split == "train" else None]:
                writer.writerow([file.relative_to(root / split).as_posix(), file.parent.name])


def shards(root: Path, endings: tuple[str, ...] = ("png",)) -> None:
    tar(root / "train-000.tar", {"bus": 4, "car": 4}, endings)
    tar(root / "test-000.tar", {"bus": 2, "car": 2}, endings, first=10)


def zips(root: Path, top: str = "") -> None:
    inner = root.parent / f"inner_of_{root.name}"
    splits_of_folders(inner / "all")
    root.mkdir()
    for split in ("train", "test"):
        zipped(root / f"{split}.zip", inner / "all" if top else inner / "all" / split)


def for_each_split(write_rows: Callable[[Path, Mapping[str, int], int], None]) -> Callable[[Path], None]:
    """Return a function that writes train.parquet and test.parquet."""

    def write_both(root: Path) -> None:
        for split, counts, first in TWO_SPLITS:
            write_rows(root / f"{split}.parquet", counts, first)

    return write_both


def named_by_pattern(root: Path) -> None:
    splits_of_folders(root / "shoot[1]")
    folders(root / "shoot1" / "train", {"train": 3})


def with_a_stray_image(root: Path) -> None:
    splits_of_folders(root)
    write(root / "more.png", encoded("bus", 50))


def capital_endings(root: Path) -> None:
    folders(root / "train", TWO[0], ending="PNG")
    folders(root / "test", TWO[1], 10, "Png")


def zip_with_a_top_folder(root: Path) -> None:
    zips(root, "all")
    (root / "test.zip").unlink()
    (root / "train.zip").rename(root / "all.zip")


def unlabeled(root: Path) -> None:
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        write(root / split / f"{number}.png", encoded("bus", number))


def orders_of_classes(root: Path) -> None:
    for split, counts, first, order in (
        ("train", THREE[0], 0, ["bus", "car", "train"]),
        ("test", THREE[1], 10, ["train", "bus", "car"]),
    ):
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=order)})
        Dataset.from_list(table(counts, order.index, first), features).to_parquet(root / f"{split}.parquet")


def truth_values(path: Path, counts: Mapping[str, int], first: int) -> None:
    pd.DataFrame(table(counts, lambda name: name == "bus", first)).to_parquet(path)


def without_some_labels(path: Path, counts: Mapping[str, int], first: int) -> None:
    rows = table(counts, number_of, first)
    rows += [*table({"train": 1}, lambda _: -1, 50), *table({"train": 1}, lambda _: None, 60)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["bus", "car"])})
    Dataset.from_list(rows, features).to_parquet(path)


def other_columns(path: Path, counts: Mapping[str, int], first: int) -> None:
    rows = [{"photo": row["image"], "kind": row["label"]} for row in table(counts, number_of, first)]
    features = Features({"photo": ImageFeature(), "kind": ClassLabel(names=["bus", "car"])})
    Dataset.from_list(rows, features).to_parquet(path)


def plain_bytes(path: Path, counts: Mapping[str, int], first: int) -> None:
    rows = table(counts, str, first)
    columns = {"image": [row["image"]["bytes"] for row in rows], "label": [row["label"] for row in rows]}
    pq.write_table(pa.table(columns), path)


def groups_of_classes(root: Path) -> None:
    for split, counts, first in TWO_SPLITS:
        folders(root / split / "vehicles", counts, first)


def files_of_other_programs(root: Path) -> None:
    splits_of_folders(root)
    write(root / "train" / "bus" / "._0.png", b"no image")
    write(root / "train" / "bus" / "Thumbs.db", b"no image")
    write(root / "__MACOSX" / "bus" / "0.png", encoded("bus", 90))
    write(root / "README.txt", b"notes")


@dataclass
class Layout:
    """A layout and its right outcome.

    Attributes:
        write: function that writes it to a folder.
        train, test: {class: number of images}.
        path: what the user gives as `data.path`, relative to the folder.
        data, evaluation: settings.
        error: parts of the message, if the layout must be rejected.
        report: parts of what is logged.
    """

    write: Callable[[Path], None]
    train: Mapping[str, int] = field(default_factory=lambda: TWO[0])
    test: Mapping[str, int] = field(default_factory=lambda: TWO[1])
    path: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    error: tuple[Any, ...] = ()
    report: tuple[str, ...] = ()


LAYOUTS = {
    "folders of splits and classes": Layout(splits_of_folders),
    "name with brackets beside the name that it matches": Layout(named_by_pattern, path="shoot[1]"),
    "name with a star and a question mark": Layout(
        lambda root: splits_of_folders(root / "a*b?"), path="a*b?"
    ),
    "classes in one folder, one named train": Layout(
        lambda root: folders(root, {"bus": 4, "car": 4, "train": 4}),
        {"bus": 3, "car": 3, "train": 3}, {"bus": 1, "car": 1, "train": 1},
        data={"split": "all"}, evaluation={"train_split": "all", "test_fraction": 0.25},
    ),
    "images beside folders of splits": Layout(with_a_stray_image),
    "endings in capitals": Layout(capital_endings),
    "metadata.csv with all names": Layout(lambda root: metadata(root, 8)),
    "metadata.csv with some of the names": Layout(
        lambda root: metadata(root, 6), {"bus": 4, "car": 2}, report=("2",)
    ),
    "Parquet of pandas, labels are text": Layout(lambda root: parquet(root, str), *THREE),
    "Parquet of pandas, labels are numbers": Layout(lambda root: parquet(root, number_of), *THREE),
    "text labels, a class is missing in the test split": Layout(
        lambda root: parquet(root, str, {"bus": 2, "train": 2}), THREE[0], {"bus": 2, "train": 2}
    ),
    "number labels, the first class is missing in the test split": Layout(
        lambda root: parquet(root, number_of, {"car": 2, "train": 2}), THREE[0], {"car": 2, "train": 2}
    ),
    "labels are numbers as text": Layout(
        lambda root: parquet(root, lambda name: str(10 - number_of(name))), *THREE
    ),
    "labels are true and false": Layout(for_each_split(truth_values)),
    "Parquet of datasets with ClassLabel": Layout(
        lambda root: stored(
            root, Features({"image": ImageFeature(), "label": ClassLabel(names=list(CLASSES))}), number_of
        ),
        *THREE,
    ),
    "Parquet of datasets, labels are text": Layout(lambda root: stored(root, None, str), *THREE),
    "Parquet of file names relative to the table": Layout(
        lambda root: csv_table(root, absolute=False), path="tables"
    ),
    "Parquet of absolute file names": Layout(lambda root: csv_table(root, absolute=True), path="tables"),
    "WebDataset of png": Layout(shards),
    "WebDataset of png, jpeg and jpg": Layout(lambda root: shards(root, ("png", "jpg", "jpeg"))),
    "zip of each split": Layout(zips),
    "zip with one folder above the classes": Layout(
        zip_with_a_top_folder, {"bus": 5, "car": 5}, {"bus": 1, "car": 1}, evaluation={"test_fraction": 0.2}
    ),
    "images directly in folders of splits": Layout(
        unlabeled, error=("data.label_column", "one folder per class")
    ),
    "one folder of classes, a part is tested": Layout(
        lambda root: folders(root, {"bus": 10, "car": 20}),
        {"bus": 8, "car": 16}, {"bus": 2, "car": 4}, evaluation={"test_fraction": 0.2},
    ),
    "one folder of classes without a test split": Layout(
        lambda root: folders(root, {"bus": 10, "car": 20}),
        error=("evaluation.test_split", "evaluation.test_fraction"),
    ),
    "slices of a folder that is sorted by class": Layout(
        lambda root: folders(root, {"bus": 10, "car": 10}),
        evaluation={"train_split": "train[:50%]", "test_split": "train[50%:]"},
        error=("2 classes", "train[:50%]"),
    ),
    "ClassLabel in another order in the test split": Layout(
        orders_of_classes, error=("train.parquet", "bus", "test.parquet", "train", 0, "label")
    ),
    "labels of -1 and missing labels": Layout(for_each_split(without_some_labels)),
    "columns with other names": Layout(for_each_split(other_columns)),
    "a column of plain bytes": Layout(
        for_each_split(plain_bytes), data={"image_column": "image", "label_column": "label"}
    ),
    "classes inside groups of classes": Layout(groups_of_classes),
    "hidden files, notes and thumbnails of other programs": Layout(files_of_other_programs),
}  # fmt: skip


def class_of(image: Any) -> str:
    """Return the class whose color an image (C, H, W) has."""
    return list(CLASSES)[int(image.float().mean(dim=(1, 2)).argmax())]


@pytest.mark.parametrize("name", LAYOUTS)
def test_images_and_classes_of_a_layout(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout, root = LAYOUTS[name], tmp_path / "data"
    root.mkdir()
    layout.write(root / "zips" if name.startswith("zip") else root)
    path = root / "zips" if name.startswith("zip") else root / layout.path
    data = DataConfig(path=str(path), **layout.data)
    evaluation = EvaluationConfig(**layout.evaluation)
    if layout.error:
        with pytest.raises(UserError, match=mentions(*layout.error)):
            open_labeled_splits(data, evaluation)
        return
    matching: set[tuple[str, str]] = set()
    for images, expected in zip(
        open_labeled_splits(data, evaluation), (layout.train, layout.test), strict=True
    ):
        shown = [class_of(image) for batch in images.iter_batches(64) for image in batch]
        assert Counter(shown) == dict(expected)
        named = [images.class_names[label] for label in images.labels.tolist()]
        matching.update(zip(shown, named, strict=True))
    colors, names = zip(*matching, strict=True)  # in both splits, one name for each color, and the reverse
    assert len(matching) == len(set(colors)) == len(set(names))
    assert open_source(data).num_rows is not None
    assert all(part in caplog.text for part in layout.report)


def test_there_are_thirty_layouts() -> None:
    assert len(LAYOUTS) >= 30
