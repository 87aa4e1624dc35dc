# SPDX-License-Identifier: Apache-2.0
"""Masks: which column holds them, their class numbers, and that they belong to the images that are read."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets
from messages import mentions

from hf_ssl.data import DataConfig, LabeledImages, label_data, labeled_images
from hf_ssl.errors import UserError

KINDS = ["one", "masks"]


def pixels(row: int) -> np.ndarray:
    """The mask of a row, 4 x 6 pixels: class numbers from 0 to 3, and 255 in the corner."""
    numbers = np.random.default_rng(row).integers(0, 4, (4, 6)).astype(np.uint8)
    numbers[0, 0] = 255
    return numbers


def mask(row: int, mode: str = "L") -> PIL.Image.Image:
    image = PIL.Image.fromarray(pixels(row).astype(np.uint16 if mode == "I;16" else np.uint8))
    if mode == "P":
        image = PIL.Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([200, 0, 100] * 256)  # equal colors: only the indices distinguish the classes
    return image


def photo(row: int) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (6, 4), (row, 0, 0))


def table(count: int = 8, name: str = "mask", mode: str = "L", **columns: Any) -> Dataset:
    data = {"image": [photo(row) for row in range(count)], name: [mask(row, mode) for row in range(count)]}
    features = {"image": Image(), name: Image()}
    if "label" in columns:
        features["label"] = ClassLabel(num_classes=3)
    return Dataset.from_dict(data | columns, features=Features(features))


def check(images: LabeledImages, rows: list[int]) -> None:
    """The masks are those of the images that are read."""
    found = [image for batch in images.iter_batches(3) for image in batch]
    assert [int(image[0, 0, 0]) for image in found] == rows
    assert len(images.targets["masks"]) == len(images) == len(rows)
    for row, read in zip(rows, images.targets["masks"], strict=True):
        assert read.dtype == torch.uint8 and np.array_equal(read, pixels(row))


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
@pytest.mark.parametrize("name", ["mask", "annotation", "label"])
def test_a_column_with_a_usual_name_holds_the_masks(name: str, mode: str) -> None:
    images = label_data(table(name=name, mode=mode), DataConfig(), "test", kinds=KINDS)
    check(images, list(range(8)))
    assert images.kinds == {"masks"} and images.labels.shape == (8, 0)


def test_masks_of_any_name_and_classes() -> None:
    labels = [0, 1, 2, 0, -1, 1, 2, 0]  # row 4 has no class
    data = table(name="regions", label=labels)
    config = DataConfig(image_column="image", mask_column="regions")
    images = label_data(data, config, "test", kinds=KINDS)
    check(images, [0, 1, 2, 3, 5, 6, 7])
    assert images.kinds == {"one", "masks"}
    assert images.labels.tolist() == [label for label in labels if label >= 0]
    assert label_data(data, DataConfig(mask_column="regions"), "test").kinds == {"one"}, "not requested"
    images = label_data(data, config, "test", kinds=["masks"])
    check(images, list(range(8)))
    assert images.kinds == {"masks"} and images.labels.shape == (8, 0), "no class is needed"


def test_masks_follow_a_choice_of_images_and_broken_images() -> None:
    images = label_data(table(), DataConfig(), "test", 5, KINDS)
    rows = [int(image[0, 0, 0]) for batch in images.iter_batches(8) for image in batch]
    assert len(rows) == 5 and rows != list(range(5))
    check(images, rows)
    broken = table(20).cast_column("image", Image(decode=False))
    broken = broken.map(
        lambda item, row: {"image": {"bytes": b"no", "path": None}} if row == 3 else {}, with_indices=True
    )
    images = label_data(broken, DataConfig(max_broken_fraction=0.1), "test", kinds=["masks"])
    check(images, [row for row in range(20) if row != 3])


@pytest.mark.parametrize("form", ["pairs", "dicts", "transform"])
def test_data_sets_in_python(form: str) -> None:
    items: Any = [(photo(row), mask(row)) for row in range(8)]
    if form != "pairs":
        items = [{"image": image, "mask": np.array(own, np.int64)} for image, own in items]
    if form == "transform":
        items = table().with_transform(lambda rows: {key: rows[key] for key in ("image", "mask")})
    images = label_data(items, DataConfig(), "test", kinds=KINDS)
    check(images, list(range(8)))
    assert images.kinds == {"masks"}


def test_a_folder_with_metadata(tmp_path) -> None:
    """`datasets` reads a column `mask_file_name` of the metadata as a column of images `mask`."""
    for row in range(4):
        photo(row).save(tmp_path / f"{row}.png")
        mask(row).save(tmp_path / f"{row}_mask.png")
    lines = [f"{row}.png,{row}_mask.png" for row in range(4)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,mask_file_name", *lines]))
    check(labeled_images(DataConfig(path=str(tmp_path)), "train", kinds=["masks"]), [0, 1, 2, 3])


def with_column(data: Dataset, name: str, images: list[Any]) -> Dataset:
    column = Dataset.from_dict({name: images}, features=Features({name: Image()}))
    return concatenate_datasets([data, column], axis=1)


def test_mistakes_are_one_sentence() -> None:
    def read(data: Any, kinds: tuple[str, ...] = ("masks",), **settings: Any) -> LabeledImages:
        return label_data(data, DataConfig(image_column="image", **settings), "test", kinds=kinds)

    plain = table().remove_columns("mask").add_column("size", [3] * 8)
    with pytest.raises(UserError, match=mentions("data.mask_column", "size")):
        read(plain)
    with pytest.raises(UserError, match=mentions("data.label_column")):
        read(plain, tuple(KINDS))
    with pytest.raises(UserError, match=mentions("data.mask_column", "size", "int64")):
        read(plain, mask_column="size")
    with pytest.raises(UserError, match=mentions("data.mask_column", "typo", "missing")):
        read(table(label=[0, 1] * 4), tuple(KINDS), mask_column="typo")
    with pytest.raises(UserError, match=mentions("data.mask_column", "masks")):
        read(with_column(table(), "masks", [mask(row) for row in range(8)]))
    with pytest.raises(UserError, match=mentions("data.mask_column", "tuple")):
        label_data([(photo(0), 3)] * 4, DataConfig(), "test", kinds=["masks"])
    for bad, reason in ((photo(0), "RGB"), (None, "mask")):
        data = with_column(table(2).remove_columns("mask"), "annotation", [mask(0), bad])
        masks = read(data).targets["masks"]
        assert np.array_equal(masks[0], pixels(0))
        with pytest.raises(UserError, match=mentions("data.mask_column", 1, reason)) as error:
            masks[1]
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
