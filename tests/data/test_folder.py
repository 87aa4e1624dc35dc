# SPDX-License-Identifier: Apache-2.0
"""Local folders: hf_ssl and `datasets` find the same data, and hf_ssl lists each directory once."""

import logging
import math
import os
import shutil
import sys
import unicodedata
import zipfile

import datasets
import numpy as np
import PIL.Image
import pytest
from messages import mentions

from hf_ssl.data import DataConfig, builders, folder, labeled_images, open_source
from hf_ssl.data.decoded import decoded_rows
from hf_ssl.data.folder import find_local_data
from hf_ssl.data.images import EncodedRows
from hf_ssl.data.location import fingerprint, list_folder, locate
from hf_ssl.errors import UserError

LAYOUTS = {
    "flat": ["b.jpg", "a.jpg", "c.jpg"],
    "one class folder": ["cats/a.jpg", "cats/b.jpg"],
    "class folders": ["dogs/b.jpg", "cats/a.jpg", "cats/c.jpg"],
    "class folders at different depths": ["dogs/b.jpg", "cats/old/a.jpg"],
    "images beside class folders": ["a.jpg", "cats/b.jpg", "dogs/c.jpg"],
    "train and test folders": ["train/cats/a.jpg", "train/dogs/b.jpg", "test/cats/c.jpg", "test/dogs/d.jpg"],
    "all three splits": ["val/x/a.jpg", "training/x/b.jpg", "evaluation/y/c.jpg", "training/y/d.jpg"],
    "splits deep inside": ["data/v1/train/x/a.jpg", "data/v1/dev/x/b.jpg"],
    "splits in file names": ["train_1.jpg", "photo-train.jpg", "test.jpg", "a valid 1.jpg", "0train0.jpg"],
    "other words that hold keywords": ["trainer.jpg", "latest.jpg", "contest.jpg", "Train.jpg", "devil.jpg"],
    "a folder that is named after a split by chance": ["test shots/a.jpg", "summer/b.jpg", "winter/c.jpg"],
    "a split in a name and in a folder": ["test/x/train_1.jpg", "train/x/test_1.jpg", "train/y/a.jpg"],
    "shards": ["data/train-00000-of-00002.jpg", "data/extra-00001-of-00002-ab.jpg", "data/a.jpg", "test.jpg"],
    "spaces and umlauts": ["Ausflüge 2019/Bär 1.jpg", "Ausflüge 2020/Bär 2.jpg"],
    "nested deeper": ["2019/may/a.jpg", "2019/june/b.jpg", "2020/may/c.jpg"],
    "hidden files": [".a.jpg", "b.jpg", ".hidden/c.jpg", "__MACOSX/d.jpg", "__e.jpg", "x/.thumbs/f.jpg"],
    "upper-case endings": ["a.JPG", "b.JPEG", "c.jpg"],
    "mixed endings": ["a.jpg", "b.png", "c.webp", "d.bmp", "e.gif", "f.tif", "g.ppm"],
    "images that are fewer than half": ["a.jpg", "b.jpg", "notes.md", "c.jpg", "film.mp4", "Thumbs.db"],
    "dots in names": ["a.b.jpg", "c.1.jpg", "x.y/d.jpg"],
}


def write(root, names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".ppm"):
            PIL.Image.new("RGB", (8 + number % 2, 8), (number, 0, 0)).save(path)
        else:
            path.write_bytes(b"no image")
    return root


def rows(dataset):
    paths = [row["path"] for row in dataset.cast_column("image", datasets.Image(decode=False))["image"]]
    names = dataset.features["label"].names if "label" in dataset.features else None
    return paths, dataset["label"][:] if names else None, names


def assert_equal_to_datasets(root):
    expected = datasets.load_dataset(str(root))
    found = find_local_data(locate(str(root)))
    assert list(found.images or found.files) == list(expected)
    for split, dataset in expected.items():
        source = open_source(DataConfig(path=str(root)), split)
        assert rows(source.dataset) == rows(dataset)
        assert source.num_rows == len(dataset)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_images_gives_the_same_rows_as_datasets(layout, tmp_path):
    root = write(tmp_path / "photos", LAYOUTS[layout])
    assert find_local_data(locate(str(root))).images  # it is not opened by `datasets`
    assert_equal_to_datasets(root)


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (["train/a.jpg", "train/b.jpg", "test/c.jpg"], {"train": 2, "test": 1}),
        (["train/a.jpg", "train_2/b.jpg", "my-train/c.jpg", "other train 3/d.jpg"], {"train": 4}),
        (["photos/val/a.jpg", "photos/dev 2/b.jpg"], {"validation": 2}),
    ],
)
def test_folders_with_only_names_of_splits_are_no_classes(names, counts, tmp_path):
    """`datasets` 5.2 gives these images the classes "train" and "test"."""
    root = write(tmp_path / "photos", names)
    assert len(datasets.load_dataset(str(root))[next(iter(counts))].features["label"].names) > 1
    for split, count in counts.items():
        source = open_source(DataConfig(path=str(root)), split)
        assert list(source.dataset.features) == ["image"] and source.num_rows == count
        with pytest.raises(UserError, match=mentions("data.label_column", "folder per class")):
            labeled_images(DataConfig(path=str(root)), split)


FORMS = (("train", "NFC"), ("test", "NFD"))
UPPER_CASE = {
    "folders": (["Training/cat/a.jpg", "Training/dog/b.jpg", "Testing/cat/c.jpg"], {"train": 2, "test": 1}),
    "folders of two cases": (["Train/a/a.jpg", "Train/b/b.jpg", "test/a/c.jpg"], {"train": 2, "test": 1}),
    "folders without classes": (["TRAIN/a.jpg", "VAL/b.jpg", "VAL/c.jpg"], {"train": 1, "validation": 2}),
    "files": (["Train_1.jpg", "Train_2.jpg", "Test_1.jpg"], {"train": 2, "test": 1}),
    "a class": (["bus/a.jpg", "car/b.jpg", "Train/c.jpg"], {"train": 3}),
    "only one split": (["Train/cat/a.jpg", "Train/dog/b.jpg"], {"train": 2}),
    "only test files": (["Test_1.jpg", "Test_2.jpg"], {"train": 2}),
    "only other folders": (["Dev/a.jpg", "Eval/b.jpg"], {"train": 2}),
    "a class in a split": (["train/Dev/a.jpg", "train/Ops/b.jpg", "test/Dev/c.jpg"], {"train": 2, "test": 1}),
}
UNLABELED = ("folders without classes", "files", "only test files", "only other folders")


@pytest.mark.parametrize("case", UPPER_CASE)
def test_names_of_splits_in_upper_case(case, tmp_path):
    """`datasets` 5.2 puts the images of `Testing` into the split "train"."""
    names, counts = UPPER_CASE[case]
    root = write(tmp_path / "photos", names)
    found = find_local_data(locate(str(root))).images
    assert {split: len(images.dataset) for split, images in found.items()} == counts
    assert ("label" in found["train"].dataset.features) == (case not in UNLABELED)


def test_tables_in_folders_in_upper_case(tmp_path, write_parquet, encode, picture):
    for split, count in (("TRAIN", 3), ("Test", 2)):
        write_parquet(tmp_path / split / "part.parquet", [encode(picture(number)) for number in range(count)])
    assert [open_source(DataConfig(path=str(tmp_path)), split).num_rows for split in ("train", "test")] == [
        3,
        2,
    ]


def test_names_of_classes_with_accents_are_equal_in_all_unicode_forms(tmp_path):
    """macOS can write the form NFD. Before, the test images had another class than the training images."""
    names = [unicodedata.normalize(form, f"{split}/caf\u00e9/{form}.jpg") for split, form in FORMS]
    root = write(tmp_path / "photos", [*names, "train/bar/a.jpg", "test/bar/b.jpg"])
    train, test = (labeled_images(DataConfig(path=str(root)), split) for split in ("train", "test"))
    assert train.class_names == test.class_names == ["bar", "caf\u00e9"]
    test.classified_by(train)
    assert test.labels.tolist() == [0, 1] and test.unknown_to(train) == 0


@pytest.mark.parametrize(("names", "reported"), [(["cat", "dog"], True), (["cat"], False)])
def test_a_class_in_several_folders_is_reported(names, reported, tmp_path, caplog):
    """The classes of `cat/2020`, `cat/2021` and `dog/2020` are the years, which a user may not expect."""
    years = [f"{name}/{year}/{name}.jpg" for name in names for year in (2020, 2021)]
    root = write(tmp_path / "photos", years)
    assert labeled_images(DataConfig(path=str(root)), "train").class_names == ["2020", "2021"]
    assert ("cat/2020 and dog/2020" in caplog.text) == reported


@pytest.mark.parametrize("name", ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"])
def test_thumbnails_and_deleted_files_are_not_read(name, tmp_path):
    """Before, hf_ssl also read the thumbnails of a file server, and the photos had no classes."""
    photos = ["cat/a.jpg", f"cat/{name}/a.jpg/thumbnail.jpg", "dog/b.jpg", f"{name}/c.jpg"]
    root = write(tmp_path / "photos", photos)
    images = labeled_images(DataConfig(path=str(root)), "train")
    assert images.class_names == ["cat", "dog"] and len(images) == 2


def test_one_class_in_folders_of_several_splits_needs_no_report(tmp_path, caplog):
    root = write(tmp_path / "photos", [f"{s}/{c}/{s}.jpg" for s in ("train", "test") for c in ("a", "b")])
    assert labeled_images(DataConfig(path=str(root)), "test").class_names == ["a", "b"]
    assert "one class" not in caplog.text


def test_all_splits_of_a_folder_have_labels_if_one_has(tmp_path):
    """`datasets` 5.2 gives the images of the first split no labels, because they have only one class."""
    root = write(tmp_path / "photos", ["train/x/a.jpg", "train/x/b.jpg", "test/x/c.jpg", "test/y/d.jpg"])
    assert datasets.load_dataset(str(root))["train"]["label"][:] == [None, None]
    train, test = (labeled_images(DataConfig(path=str(root)), split) for split in ("train", "test"))
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0], [0, 1])
    assert train.class_names == test.class_names == ["x", "y"]


def test_links_are_treated_as_datasets_does(tmp_path):
    write(tmp_path / "elsewhere", ["a.jpg", "sub/b.jpg"])
    root = write(tmp_path / "photos", ["c.jpg"])
    (root / "link.jpg").symlink_to(tmp_path / "elsewhere" / "a.jpg")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "dangling.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "link").symlink_to(root)
    for path in (root, tmp_path / "link"):
        assert_equal_to_datasets(path)


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_metadata_files_are_left_to_datasets(ending, tmp_path):
    root = write(tmp_path / "photos", ["train/a.jpg", "train/b.jpg", "test/c.jpg"])
    for split, names in (("train", ["b.jpg", "a.jpg"]), ("test", ["c.jpg"])):
        lines = ["file_name,kind", *(f"{name},x" for name in names)]
        if ending == "jsonl":
            lines = [f'{{"file_name": "{name}", "kind": "x"}}' for name in names]
        (root / split / f"metadata.{ending}").write_text("\n".join(lines))
    assert_equal_to_datasets(root)
    assert "kind" in open_source(DataConfig(path=str(root))).dataset.features


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", b"image_id,age\n0,5\n"),
        ("metadata.csv", b"file_name;age\na.jpg;5\n"),
        ("metadata.csv", b""),
        ("metadata.jsonl", b'{"image_id": 3}\n'),
        ("metadata.jsonl", b"no json\n"),
        ("metadata.parquet", b"no parquet"),
        ("metadata.csv", "größe\n".encode("latin-1")),
    ],
)
def test_a_metadata_file_of_another_program_is_not_used(name, content, tmp_path, caplog):
    root = write(tmp_path / "photos", ["cats/a.jpg", "dogs/b.jpg"])
    (root / name).write_bytes(content)
    source = open_source(DataConfig(path=str(root)), labels=True)
    assert source.num_rows == 2
    names = source.dataset.features[source.label_column].names
    assert names == ["cats", "dogs"]
    assert [record.getMessage() for record in caplog.records if name in record.getMessage()]


def test_a_metadata_file_with_a_byte_order_mark_is_used(tmp_path):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg"])
    (root / "metadata.csv").write_bytes("\ufefffile_name,kind\na.jpg,x\nb.jpg,y\n".encode())
    assert "kind" in open_source(DataConfig(path=str(root))).dataset.features


def test_images_that_a_metadata_file_names_twice_are_reported(tmp_path, caplog):
    """Such an image is two rows, so the number of rows does not show that another file is missing."""
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg", "c.jpg"])
    (root / "metadata.csv").write_text("file_name,kind\na.jpg,x\nb.jpg,y\nb.jpg,y\n")
    assert open_source(DataConfig(path=str(root))).num_rows == 3
    assert "1 of 3 rows in the metadata" in caplog.text and "1 of 3 images" in caplog.text
    caplog.clear()
    (root / "metadata.csv").write_text("file_name,kind\na.jpg,x\nb.jpg,y\nc.jpg,y\n")
    open_source(DataConfig(path=str(root)))
    assert not caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_images_that_the_metadata_file_does_not_name_are_reported(tmp_path, caplog, streaming):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg", "c.jpg"])
    (root / "metadata.csv").write_text("file_name,kind\na.jpg,x\n")
    assert open_source(DataConfig(path=str(root)), streaming=streaming).num_rows == 1
    assert "2 of 3 images" in caplog.text


def test_folders_are_no_classes_beside_a_metadata_file_without_a_label(tmp_path):
    """The error named folders of classes as solution, which the user already had."""
    root = write(tmp_path / "photos", ["cats/a.jpg", "dogs/b.jpg"])
    (root / "metadata.csv").write_text("file_name,width\ncats/a.jpg,8\ndogs/b.jpg,9\n")
    with pytest.raises(UserError, match=mentions("data.label_column", "metadata.csv", "column label")):
        labeled_images(DataConfig(path=str(root)), "train")
    (root / "metadata.csv").write_text("file_name,width,label\ncats/a.jpg,8,cat\ndogs/b.jpg,9,dog\n")
    assert labeled_images(DataConfig(path=str(root)), "train").class_names == ["cat", "dog"]


@pytest.mark.parametrize("pattern", ["*", "*.jpg"])
def test_a_pattern_leaves_out_folders(pattern, tmp_path):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg", "more.jpg/c.jpg"])
    assert open_source(DataConfig(path=f"{root}/{pattern}")).num_rows == 2


def test_a_pattern_that_matches_only_folders_is_an_error(tmp_path):
    root = write(tmp_path / "photos", ["cats/a.jpg", "dogs/b.jpg"])
    with pytest.raises(UserError, match="folders") as error:
        open_source(DataConfig(path=f"{root}/*/"))
    suggested = str(error.value).split("'")[-2]
    assert open_source(DataConfig(path=suggested)).num_rows == 2


def test_parquet_in_shards(tmp_path, write_parquet, encode, picture):
    root = tmp_path / "numbers"
    for file, count in (("train-00000-of-00002", 3), ("train-00001-of-00002", 2), ("test-00000-of-00001", 1)):
        images = [encode(picture(number)) for number in range(count)]
        write_parquet(root / "data" / f"{file}.parquet", images, [0] * count)
    assert_equal_to_datasets(root)


def test_a_readme_that_declares_its_files(tmp_path):
    root = write(tmp_path / "photos", ["one/a.jpg", "two/b.jpg"])
    declared = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: left\n    path: one/*\n---\n"
    (root / "README.md").write_text(declared)
    assert open_source(DataConfig(path=str(root)), "left").num_rows == 1
    with pytest.raises(UserError, match=mentions("data.split=left", root, "train")):
        open_source(DataConfig(path=str(root)))


# Intended differences from `datasets`.


def test_images_are_found_among_other_files(tmp_path):
    """`datasets` chooses the loader of the most frequent ending, here text, video or JSON. It treats the name
    of a text file as a split, and `a.jpg.json` (from a Google Photos export) and `film.mpg` as images.
    """
    others = [f"notes {number}.txt" for number in range(5)]
    others += ["test.mp4", "a.jpg.json", "b.jpg.json", "film.mpg", "instruction.md", "Thumbs.db", "x.pdf"]
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg", "Größe 1/c.png", *others])
    source = open_source(DataConfig(path=str(root)))
    names = [os.path.basename(path) for path in rows(source.dataset)[0]]
    assert sorted(names) == ["a.jpg", "b.jpg", "c.png"]


def test_a_file_is_in_a_split_once(tmp_path):
    """`datasets` reads a file twice if two patterns match."""
    root = write(tmp_path / "photos", ["train-training/a.jpg", "test/b.jpg"])
    assert open_source(DataConfig(path=str(root))).num_rows == 1
    assert len(datasets.load_dataset(str(root))["train"]) == 2


def test_names_of_shards_that_are_no_names_of_splits(tmp_path):
    """`datasets` raises an error."""
    root = write(tmp_path / "photos", ["data/my photo-00000-of-00001.jpg", "data/b.jpg"])
    assert open_source(DataConfig(path=str(root))).num_rows == 2


def test_a_folder_whose_name_is_a_pattern(tmp_path):
    """`datasets` reads the brackets as a pattern and finds nothing."""
    root = write(tmp_path / "photos [2020]", ["a.jpg"])
    assert open_source(DataConfig(path=str(root))).num_rows == 1


@pytest.mark.parametrize("name", ["shoot[1]", "shoot*", "shoot?"])
def test_a_folder_with_the_name_of_a_pattern_beside_another_one(name, tmp_path):
    """`datasets` (5.2) and `glob` would read `shoot1`."""
    root, other = tmp_path / name, tmp_path / "shoot1"
    write(root, ["photos/a.jpg", "one/b.jpg"])
    write(other, ["photos/a.jpg", "photos/b.jpg", "photos/c.jpg"])
    for path, rows in (("", 2), ("/photos", 1), ("/photos/*.jpg", 1), ("/**/*", 2), ("/photos/a.jpg", 1)):
        source = open_source(DataConfig(path=f"{root}{path}"))
        assert source.num_rows == rows
        assert all(path.startswith(str(root)) for path in found_paths(source))


def test_a_pattern_that_is_no_name_matches_other_folders(tmp_path):
    write(tmp_path, ["shoot1/photos/a.jpg", "shoot2/photos/b.jpg", "shoot3/photos/c.jpg"])
    assert open_source(DataConfig(path=f"{tmp_path}/shoot[12]/photos/*")).num_rows == 2


def found_paths(source):
    return rows(source.dataset)[0]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_table_with_the_name_of_a_pattern(ending, tmp_path):
    for job, count in (("job[1]", 1), ("job1", 3)):
        write(tmp_path / job, [f"{number}.jpg" for number in range(count)])
        names = [str(tmp_path / job / f"{number}.jpg") for number in range(count)]
        table = datasets.Dataset.from_dict({"image": names})
        for name in ("part[1]", "part1"):
            getattr(table, f"to_{ending}")(tmp_path / job / "lists" / f"{name}.{ending}")
    lists = tmp_path / "job[1]" / "lists"
    for path, rows in ((lists / f"part[1].{ending}", 1), (lists, 2), (lists / f"*.{ending}", 2)):
        assert open_source(DataConfig(path=str(path), image_column="image")).num_rows == rows


@pytest.mark.parametrize("name", [None, "default"])
def test_a_folder_that_datasets_would_read_as_a_pattern_is_an_error(name, tmp_path):
    for shoot in ("shoot[1]", "shoot1"):
        root = write(tmp_path / shoot, ["one/a.jpg"])
        declared = (
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: one/*\n---\n"
        )
        (root / "README.md").write_text(declared)
    assert open_source(DataConfig(path=str(tmp_path / "shoot1"), name=name)).num_rows == 1
    with pytest.raises(UserError, match=mentions("data.path", "shoot[1]", "README")):
        open_source(DataConfig(path=str(tmp_path / "shoot[1]"), name=name))


def test_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path / "photos", ["cats/a.jpg", "dogs/b.jpg"]))
    for path in (".", "./"):
        source = open_source(DataConfig(path=path), labels=True)
        assert source.num_rows == 2
    monkeypatch.chdir("cats")
    assert open_source(DataConfig(path="..")).num_rows == 2


def test_only_names_that_are_not_unicode(tmp_path):
    root = write(tmp_path / "photos", ["a.jpg"])
    os.rename(root / "a.jpg", os.fsencode(root) + b"/b\xe4r.jpg")
    for path in (root, root / "*"):
        with pytest.raises(UserError, match=mentions("data.path", "UTF-8")):
            open_source(DataConfig(path=str(path)))


def test_names_that_are_not_unicode(tmp_path, caplog):
    root = write(tmp_path / "photos", ["a.jpg"])
    shutil.copy(root / "a.jpg", os.fsencode(root) + b"/b\xe4r.jpg")
    with caplog.at_level(logging.WARNING):
        assert open_source(DataConfig(path=str(root))).num_rows == 1
    assert "not valid UTF-8; rename it" in caplog.text


def test_folders_that_are_not_unicode(tmp_path, caplog):
    root = write(tmp_path / "photos", ["a.jpg"])
    strange = os.fsencode(root) + b"/b\xe4r"
    os.mkdir(strange)
    shutil.copy(root / "a.jpg", strange + b"/b.jpg")
    for path in (str(root), f"{root}/**/*.jpg"):
        with caplog.at_level(logging.WARNING):
            assert open_source(DataConfig(path=path)).num_rows == 1
        assert "not valid UTF-8" in caplog.text
        caplog.clear()
    with pytest.raises(UserError, match=mentions("data.path", "UTF-8")):
        open_source(DataConfig(path=os.fsdecode(strange)))


def test_an_entry_that_cannot_be_examined_is_left_out(tmp_path, caplog):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg", "sub/c.jpg"])
    (root / "itself.jpg").symlink_to("itself.jpg")
    (root / "sub" / "itself.jpg").symlink_to("itself.jpg")
    with caplog.at_level(logging.WARNING):
        assert open_source(DataConfig(path=str(root))).num_rows == 3
    assert caplog.text.count("itself.jpg is not used") == 2


def test_only_the_metadata_of_a_readme_declare_files(tmp_path):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg"])
    (root / "README.md").write_bytes(b"# Notes in Latin-1: B\xe4r\nconfigs:\n")
    assert open_source(DataConfig(path=str(root))).num_rows == 2
    (root / "README.md").write_text("---\nconfigs: [\n bad: : yaml\n---\n")
    with pytest.raises(UserError, match=mentions("data.path", root, "while parsing")):
        open_source(DataConfig(path=str(root)))


def test_an_archive_beside_images_is_reported(tmp_path, caplog):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg", "c/d.jpg"])
    with zipfile.ZipFile(root / "backup.zip", "w") as archive:
        archive.write(root / "a.jpg", "a.jpg")
    with caplog.at_level(logging.WARNING):
        assert open_source(DataConfig(path=str(root))).num_rows == 3
    assert f"use data.path={root / 'backup.zip'} to read it" in caplog.text


def test_files_outside_the_splits_are_reported(tmp_path, caplog):
    names = ["train trip/a.jpg", "summer/b.jpg", "winter/c.jpg", "winter/film.mp4"]
    root = write(tmp_path / "photos", names)
    with caplog.at_level(logging.WARNING):
        assert open_source(DataConfig(path=str(root))).num_rows == 1
    assert "1 of 3 image files" in caplog.text and "data.split=all" in caplog.text
    for config in (DataConfig(path=f"{root}/**/*"), DataConfig(path=str(root), split="all")):
        source = open_source(config, labels=True)
        assert source.num_rows == 3
        names = source.dataset.features[source.label_column].names
        assert names == ["summer", "train trip", "winter"]


CLASSES = {name: [f"{name}/{number}.jpg" for number in range(4)] for name in ("bus", "car", "train")}
NAMED_BY_CHANCE = {
    "a class": ([*CLASSES["bus"], *CLASSES["car"], *CLASSES["train"]], 4, 8),
    "a folder beside images": ([*(f"{n}.jpg" for n in range(10)), "train/a.jpg", "train/b.jpg"], 2, 10),
    "a file": (["a.jpg", "b.jpg", "train station.jpg"], 1, 2),
    "tables": (["x.csv", "y.csv", "train.csv"], None, 2),
}


@pytest.mark.parametrize("case", NAMED_BY_CHANCE)
@pytest.mark.parametrize("streaming", [False, True])
def test_most_files_must_be_in_a_split(case, streaming, tmp_path):
    if streaming and case == "tables":
        pytest.skip("`datasets` declares no columns of a stream of CSV files")
    names, read, outside = NAMED_BY_CHANCE[case]
    root = write(tmp_path / "photos", names)
    for table in root.glob("*.csv"):
        table.write_text("image\na.png\n")
    config = DataConfig(path=str(root), streaming=streaming, image_column="image")
    source = open_source(config)
    assert read is None or source.num_rows == read
    assert (source.count.total, source.count.outside) == (len(names), outside)
    expected = mentions("data.split", root, outside, "data.split=all", "data.split=train")
    with pytest.raises(UserError, match=expected):
        source.count.require_most_files("train")
    whole = open_source(config, "all")
    assert read is None or whole.num_rows == len(names)
    whole.count.require_most_files("train")


def test_a_class_with_the_name_of_another_split(tmp_path):
    root = write(tmp_path / "photos", ["bus/a.jpg", "car/b.jpg", "val/c.jpg"])
    with pytest.raises(UserError, match=mentions("data.split", root, "validation", "data.split=all")):
        open_source(DataConfig(path=str(root)))
    assert open_source(DataConfig(path=str(root), split="all")).num_rows == 3


def test_files_of_other_splits_are_counted(tmp_path):
    names = [f"{split}/{number}.jpg" for split in ("train", "test") for number in range(5)]
    root = write(tmp_path / "photos", names)
    count = open_source(DataConfig(path=str(root))).count
    count.require_most_files("train")
    assert (count.total, dict(count.unread)) == (10, {"in the split test": 5})
    assert dict(open_source(DataConfig(path=str(root)), "train[:40%]").count.unread) == {
        "in the split test": 5, "outside of the part train[:40%]": 3
    }  # fmt: skip
    assert dict(open_source(DataConfig(path=str(root)), "all").count.unread) == {}


def test_all_reads_the_images_that_a_metadata_file_does_not_name(tmp_path):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg", "c.jpg"])
    (root / "metadata.csv").write_text("file_name,kind\na.jpg,x\n")
    count = open_source(DataConfig(path=str(root))).count
    assert (count.total, list(count.unread.values())) == (3, [2])
    assert open_source(DataConfig(path=str(root), split="all")).num_rows == 3


def test_all_splits_of_other_data(numbered, tmp_path, write_parquet, encode, picture):
    assert open_source(DataConfig(path="digits"), "all").num_rows == 1797
    for split, rows in (("train", 3), ("test", 2)):
        write_parquet(tmp_path / "x" / f"{split}.parquet", [encode(picture(row)) for row in range(rows)])
    for streaming in (False, True):
        source = open_source(DataConfig(path=str(tmp_path / "x")), "all", streaming=streaming)
        assert source.num_rows == 5


def test_a_link_to_a_folder_is_reported(tmp_path, caplog):
    write(tmp_path / "elsewhere", ["a.jpg"])
    root = write(tmp_path / "photos", ["b.jpg"])
    (root / "more").symlink_to(tmp_path / "elsewhere")
    assert open_source(DataConfig(path=str(root))).num_rows == 1
    assert str(root / "more") in caplog.text


def test_files_that_cannot_be_read_are_broken_images(tmp_path):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg"])
    source = open_source(DataConfig(path=str(root)))
    (root / "a.jpg").unlink()
    (root / "a.jpg").mkdir()  # for root, who can read every file, a folder replaces a file without permission
    assert len(fingerprint([str(root / "a.jpg"), str(root / "b.jpg")])) == 16
    _, broken = EncodedRows(source, 3).read(np.array([0, 1]))
    assert list(broken) == [0]


def test_an_invalid_slice_is_an_error(tmp_path):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg"])
    with pytest.raises(UserError, match=mentions("data.path", root, "train[a:b]")):
        open_source(DataConfig(path=str(root)), "train[a:b]")


def test_an_empty_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=mentions("data.path", tmp_path / "photos")):
        open_source(DataConfig(path=str(tmp_path / "photos")))


def test_a_part_and_a_sum_of_splits(tmp_path):
    names = [f"{split}/{'xy'[n % 2]}/{n}.jpg" for split in ("train", "test") for n in range(10)]
    root = write(tmp_path / "photos", names)
    config = DataConfig(path=str(root))
    expected = datasets.load_dataset(str(root), split="train[:30%]+test[2:]")
    assert rows(open_source(config, "train[:30%]+test[2:]").dataset) == rows(expected)
    assert (
        open_source(config, "train+test").revision
        != open_source(config).revision
        == open_source(config, "train[:1]").revision
    )


def test_the_table_changes_with_the_files(tmp_path):
    root = write(tmp_path / "photos", ["a.jpg", "b.jpg"])
    config = DataConfig(path=str(root), cache="memmap")

    def opened():
        source = open_source(config)
        return source.dataset._fingerprint, source.num_rows, decoded_rows(source, 3, "none")

    first = opened()
    assert opened() == first
    write(tmp_path / "other", ["x/x.jpg", "x.jpg"])
    os.replace(tmp_path / "other" / "x.jpg", root / "a.jpg")
    second = opened()
    assert second[0] != first[0] and second[1] == 2
    write(root, ["c.jpg"])
    assert opened()[:2] != second[:2] and opened()[1] == 3


# hf_ssl lists each directory once.

_listed: list[str] | None = None


def _note(event, arguments):
    if _listed is None or event not in ("os.scandir", "os.listdir"):
        return
    if not isinstance(arguments[0], int):  # a descriptor of an open directory
        _listed.append(os.path.abspath(os.fsdecode(arguments[0] or ".")))


sys.addaudithook(_note)  # Python cannot remove a hook; it does nothing while `_listed` is None


@pytest.fixture
def listed():
    global _listed
    _listed = []
    yield _listed
    _listed = None


@pytest.mark.parametrize("kind", ["images", "metadata", "parquet"])
def test_each_directory_is_listed_once(kind, tmp_path, listed, write_parquet, encode, picture):
    names = [f"{split}/{name}/{n}.jpg" for split in ("train", "test") for name in "xy" for n in range(4)]
    root = tmp_path / "data"
    if kind == "parquet":
        for split in ("train", "test"):
            images = [encode(picture(number)) for number in range(4)]
            write_parquet(root / split / "numbers.parquet", images, [0, 1, 0, 1])
    else:
        write(root, names)
    if kind == "metadata":
        for split in ("train", "test"):
            lines = [f"{name}/{n}.jpg,{n % 2}" for name in "xy" for n in range(4)]
            (root / split / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    for directory, _, _ in os.walk(root):
        os.utime(directory, (1e9, 1e9))  # an old time stamp
    listed.clear()
    config = DataConfig(path=str(root), label_column="label")
    open_source(config)
    for limit in (2, None):  # the limits of the monitor and of the evaluation
        for split in ("train", "test"):
            labeled_images(config, split, max_images=limit)
    inside = [path for path in listed if path.startswith(str(root))]
    assert str(root) in inside
    assert {path: inside.count(path) for path in inside if inside.count(path) > 1} == {}


def test_a_listing_of_a_changed_folder_is_out_of_date(tmp_path):
    root = write(tmp_path / "photos", ["x/a.jpg", "b.jpg"])
    for directory in (root, root / "x"):
        os.utime(directory, (1e9, 1e9))
    listing = list_folder(str(root))
    assert listing.is_current()
    (root / "x" / "a.jpg").rename(root / "x" / "c.jpg")
    assert not listing.is_current()
    assert not list_folder(str(root)).is_current()  # the folder may change again with the same time stamp
    shutil.rmtree(root / "x")
    assert not listing.is_current()


def test_a_declared_folder_is_resolved_once(tmp_path, monkeypatch):
    root = write(tmp_path / "photos", ["one/a.jpg", "two/b.jpg"])
    declared = "---\nconfigs:\n- config_name: mine\n  data_files:\n  - split: train\n    path: one/*\n---\n"
    (root / "README.md").write_text(declared)
    for directory, _, _ in os.walk(root):
        os.utime(directory, (1e9, 1e9))
    built = []
    own = builders.load_dataset_builder
    monkeypatch.setattr(
        builders, "load_dataset_builder", lambda *args, **kw: (built.append(args), own(*args, **kw))[1]
    )
    for name in (None, None, "mine", "mine"):
        assert open_source(DataConfig(path=str(root), name=name)).num_rows == 1
    assert len(built) == 2


@pytest.mark.parametrize("slow", [False, True])
def test_a_file_that_is_overwritten_in_place_is_noticed_in_the_same_process(tmp_path, monkeypatch, slow):
    """As in a notebook. The time of the folder does not change. A slow check is not repeated soon."""
    monkeypatch.setattr(folder, "_SHORT_SECONDS", -1.0 if slow else math.inf)
    file = tmp_path / "photos" / "one.png"
    file.parent.mkdir()
    PIL.Image.new("RGB", (8, 8), (10, 10, 10)).save(file)
    os.utime(file.parent, (1e9, 1e9))
    first = open_source(DataConfig(path=str(file.parent)))
    PIL.Image.new("RGB", (8, 8), (20, 20, 20)).save(file)
    os.utime(file.parent, (1e9, 1e9))
    second = open_source(DataConfig(path=str(file.parent)))
    assert (first.identity == second.identity) == (first.revision == second.revision) == slow
    monkeypatch.setattr(folder, "_FRESH_SECONDS", 0.0)
    third = open_source(DataConfig(path=str(file.parent)))
    assert third.identity != first.identity and third.revision != first.revision
