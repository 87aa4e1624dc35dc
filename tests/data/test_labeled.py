# SPDX-License-Identifier: Apache-2.0
import re

import numpy as np
import pytest
import torch
from messages import mentions

from hf_ssl import data
from hf_ssl.data import DataConfig, labeled_images
from hf_ssl.data.decode import decode
from hf_ssl.errors import UserError


@pytest.fixture
def labeled(tmp_path, write_parquet, encode, picture):
    """Return a function that writes images with known numbers and labels, and returns their configuration."""

    def make(count=90, broken=(), labels=None, size=(12, 10), **options):
        labels = [number * 3 // count for number in range(count)] if labels is None else labels
        images = [
            b"no image" if number in broken else encode(picture(number, size)) for number in range(count)
        ]
        path = write_parquet(tmp_path / "labeled" / "test.parquet", images, labels)
        return DataConfig(path=str(path.parent), **options)

    return make


def all_images(images, batch_size=16):
    batches = list(images.iter_batches(batch_size))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    return [image for batch in batches for image in batch]


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_images_have_the_order_of_their_labels(cache, labeled, encode, picture):
    images = labeled_images(labeled(cache=cache), "test")
    assert images.class_names == ["ant", "bee", "cat"] and len(images) == 90
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [0] * 30 + [1] * 30 + [2] * 30
    shown = all_images(images)
    assert len(shown) == 90
    for number, image in enumerate(shown):
        assert torch.equal(image, decode(encode(picture(number)), 3)) and torch.equal(image, images[number])
    assert torch.equal(images[-1], shown[-1]) and images.broken == []


def test_classes_are_numbered_by_name_and_only_classes_of_images_count(labeled):
    names = {"names": ["ant", "bee", "cat"]}
    bank = labeled_images(labeled(labels=[0] * 45 + [2] * 45), "test")
    images = labeled_images(labeled(labels=[0] * 45 + [2] * 45), "test")
    bank.class_names, images.class_names = ["cat", "bee", "ant"], [*names["names"]]
    images.classified_by(bank)
    assert images.labels.tolist() == [2] * 45 + [0] * 45 and images.class_names == bank.class_names
    images.class_names = ["ant", "dog", "cat"]  # no image is a dog
    images.classified_by(bank)
    images.class_names = ["dog", "bee", "cat"]
    with pytest.raises(UserError, match=mentions("labels", "dog", "ant")):
        images.classified_by(bank)


def test_the_choice_of_images_has_the_shares_of_the_classes_and_is_random_and_reproducible(labeled):
    """Balanced classes would give another accuracy than all images: 0.500 instead of 0.909 in an example."""
    config = labeled(labels=[0] * 60 + [1] * 20 + [2] * 10)
    images = labeled_images(config, "test", max_images=40)
    assert len(images) == 40 and torch.bincount(images.labels).tolist() == [27, 9, 4]
    balanced = labeled_images(config, "test", max_images=40, balanced=True)  # as for a Space
    assert torch.bincount(balanced.labels).tolist() == [15, 15, 10]
    same, other = (labeled_images(config, "test", max_images=40, seed=seed) for seed in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(all_images(images), all_images(same), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(all_images(images), all_images(other), strict=True))
    assert len(labeled_images(config, "test", max_images=1000)) == 90


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("labels_first", [False, True])
def test_broken_images_are_omitted_together_with_their_labels(cache, labels_first, labeled, encode, picture):
    config = labeled(broken=(1, 40), cache=cache, max_broken_fraction=0.1)
    images = labeled_images(config, "test")
    if labels_first:
        assert len(images.labels) == 88
    shown = all_images(images)
    numbers = [number for number in range(90) if number not in (1, 40)]
    assert len(shown) == len(images) == len(images.labels) == 88
    assert images.labels.tolist() == [number * 3 // 90 for number in numbers]
    for number, image in zip(numbers, shown, strict=True):
        assert torch.equal(image, decode(encode(picture(number)), 3))
    assert len(images.broken) == 2 and "row 1 (1.png): not an image" in images.broken[0]
    assert len(all_images(images)) == 88 and len(images.broken) == 2  # broken images are counted once


def test_too_many_broken_images_are_an_error(labeled):
    images = labeled_images(labeled(broken=range(1, 65, 4)), "test")
    with pytest.raises(UserError, match=mentions(16, 90, 0.05, "data.max_broken_fraction=0.18")):
        all_images(images)


def test_rows_without_a_label_are_omitted_and_a_split_without_labels_is_an_error(labeled):
    images = labeled_images(labeled(labels=[-1, 0, 1] * 30), "test")
    assert len(images) == 60 and images.labels.tolist() == [0, 1] * 30
    with pytest.raises(UserError, match=mentions("label")):
        labeled_images(labeled(labels=[-1] * 90), "test")


def test_data_without_classes_are_an_error_if_labels_are_needed(numbered):
    with pytest.raises(UserError, match=mentions("data.label_column=NAME")):
        labeled_images(numbered(20), "train")


def test_data_max_images_does_not_limit_the_evaluation(labeled):
    assert len(labeled_images(labeled(max_images=5), "test")) == 90


def test_classes_of_tars(tars):
    images = labeled_images(DataConfig(path=str(tars), label_column="cls", streaming=True), "train")
    assert images.class_names == ["0", "1", "2"] and len(all_images(images)) == 36


def test_digits_are_labeled():
    images = labeled_images(DataConfig(path="digits"), "test")
    pixels = torch.stack(all_images(images, 200)).float().flatten(1)
    means = torch.stack([pixels[:400][images.labels[:400] == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(pixels[400:], means).argmin(1)
    assert (nearest == images.labels[400:]).float().mean() > 0.8  # labels belong to their images
    assert pixels.max() == 255 and np.isin(np.unique(pixels), np.rint(np.arange(17) * 255 / 16)).all()


@pytest.mark.parametrize(
    ("old", "new"), [("labelled_images", "labeled_images"), ("LabelledImages", "LabeledImages")]
)
def test_old_names_are_deprecated(old, new):
    with pytest.warns(DeprecationWarning, match=mentions(old, new)):
        assert getattr(data, old) is getattr(data, new)


@pytest.mark.parametrize("missing", ["NA", "None", "null", ""])
def test_images_without_a_label_are_reported(missing, tmp_path, encode, picture, caplog):
    """pandas reads these texts as missing values, also if they are the name of a class."""
    names = ["ant", "bee", missing, "ant", missing]
    for number in range(len(names)):
        (tmp_path / f"{number}.png").write_bytes(encode(picture(number)))
    lines = [f"{number}.png,{name}" for number, name in enumerate(names)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,label", *lines]))
    images = labeled_images(DataConfig(path=str(tmp_path)), "train")
    assert images.class_names == ["ant", "bee"] and images.labels.tolist() == [0, 1, 0]
    (text,) = [record.getMessage() for record in caplog.records if "label" in record.getMessage()]
    assert re.search(mentions("2 of 5", tmp_path, "NA", "None", "null"), text)


def test_images_that_all_have_a_label_need_no_report(labeled, caplog):
    labeled_images(labeled(), "test")
    assert "label" not in caplog.text
