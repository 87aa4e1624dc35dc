# SPDX-License-Identifier: Apache-2.0
"""Images in zip archives have the names of the folders inside the archives as classes."""

import zipfile
from collections import Counter
from pathlib import Path

import pytest
from messages import mentions

from hf_ssl.data import DataConfig, labeled_images, open_source
from hf_ssl.data.training_labels import training_labels
from hf_ssl.errors import UserError

CLASSES = ("Bag", "Coat", "Shoe")


@pytest.fixture
def archive(tmp_path, encode, picture):
    """Return a function that writes a zip archive into the folder `Bag`, and returns its path.

    `datasets` 5.2 gives all images of this archive the class "Bag".
    """

    def write(path: str, names: list[str]) -> Path:
        file = tmp_path / "Bag" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(file, "w") as opened:
            for number, name in enumerate(names):
                opened.writestr(name, encode(picture(number)))
        return file

    return write


def entries(count: int, classes: tuple[str, ...] = CLASSES, top: str = "") -> list[str]:
    return [f"{top}{name}/{number}.png" for name in classes for number in range(count)]


def classes_of(path: Path, split: str = "train") -> Counter:
    images = labeled_images(DataConfig(path=str(path)), split)
    names = [images.class_names[label] for label in images.labels.tolist()]
    inside = [file.partition("::")[0] for file in images.names]  # zip://photos/Bag/0.png
    assert [file.split("/")[-2] for file in inside] == names
    return Counter(names)


@pytest.mark.parametrize("top", ["", "photos/"])
def test_the_class_is_the_folder_inside_the_archive(top: str, archive) -> None:
    others = ["readme.txt", "__MACOSX/Coat/._0.png", f"{top}Coat/.hidden.png", "notes/list.csv"]
    path = archive("all.zip", [*entries(4, top=top), *others])
    assert classes_of(path) == dict.fromkeys(CLASSES, 4)
    assert classes_of(path.parent) == dict.fromkeys(CLASSES, 4)


@pytest.mark.parametrize(("folders", "reported"), [(("train", "test"), True), (("train",), False)])
def test_splits_inside_of_an_archive_are_reported(folders, reported: bool, archive, caplog) -> None:
    """`datasets` puts all images into the split "train", so a training would use the test images."""
    path = archive("all.zip", [name for top in folders for name in entries(2, top=f"photos/{top}/")])
    images = len(folders) * 2 * len(CLASSES)
    assert len(open_source(DataConfig(path=str(path)), "train").dataset) == images
    assert ("test, train" in caplog.text) == reported


def test_archives_inside_of_an_archive_are_reported(archive, caplog) -> None:
    path = archive("all.zip", [*entries(2), "more/part1.ZIP", "more/part2.tar.gz"])
    assert open_source(DataConfig(path=str(path))).num_rows == 2 * len(CLASSES)
    assert "2 archives inside of an archive, such as more/part1.ZIP" in caplog.text


def test_several_archives_have_one_table_of_classes(archive) -> None:
    archive("train.zip", entries(3))
    root = archive("test.zip", entries(2, CLASSES[1:])).parent
    assert classes_of(root) == dict.fromkeys(CLASSES, 3) and classes_of(root, "train[:3]") == {"Bag": 3}
    assert classes_of(root, "test") == dict.fromkeys(CLASSES[1:], 2)
    test = labeled_images(DataConfig(path=str(root)), "test")
    assert test.class_names == [*CLASSES] and test.labels.tolist() == [1, 1, 2, 2]


def test_a_stream_of_an_archive_has_the_same_classes(archive) -> None:
    config = DataConfig(path=str(archive("all.zip", entries(2))), streaming=True)
    source = open_source(config)
    assert training_labels(source, config).class_names == [*CLASSES]
    found = {(row["image"]["path"].split("/")[2], row["label"]) for row in source.dataset}
    assert found == {(name, number) for number, name in enumerate(CLASSES)}


@pytest.mark.parametrize("names", [["a.png", "b.png"], entries(2, ("Bag",)), ["Coat/a.png", "x/Shoe/b.png"]])
def test_archives_without_folders_of_classes_have_images_but_no_labels(names: list[str], archive) -> None:
    path = archive("all.zip", names)
    assert open_source(DataConfig(path=str(path))).num_rows == 2
    with pytest.raises(UserError, match=mentions("data.label_column", "one folder per class")):
        labeled_images(DataConfig(path=str(path)), "train")
