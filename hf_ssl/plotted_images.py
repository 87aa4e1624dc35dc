# SPDX-License-Identifier: Apache-2.0
"""Opens the images that `hf-ssl plot` draws, for each encoder (layer 5)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from hf_ssl.building import open_labeled_splits
from hf_ssl.cards.result_files import with_trained_reading
from hf_ssl.data import DataConfig, LabeledImages, open_source
from hf_ssl.data.labeled_splits import unlabeled_images
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.progress import notice


class PlottedImages(NamedTuple):
    """The training images, which are None without labels, the test images, and the name of their split."""

    train: LabeledImages | None
    test: LabeledImages
    split: str

    @property
    def splits(self) -> dict[str, LabeledImages]:
        """Return {"train" or "test": images}."""
        return {"test": self.test} if self.train is None else {"train": self.train, "test": self.test}


def images_of_encoders(
    models: Mapping[str, str], data: DataConfig, evaluation: EvaluationConfig
) -> dict[str, PlottedImages]:
    """Return {name of the encoder: images}, read as in its training.

    All have the same rows. Only images of more than 8 bits can differ, by `data.value_range`.

    Raises:
        UserError: the images cannot be read, or the column of labels that the user named does not exist.
    """
    readings = {name: with_trained_reading(data, model) for name, model in models.items()}
    tolerated = max(reading.max_broken_fraction for reading in readings.values())
    opened: dict[str, PlottedImages] = {}
    for reading in readings.values():
        if str(reading.value_range) not in opened:
            settings = replace(reading, max_broken_fraction=tolerated)
            opened[str(reading.value_range)] = _open_images(settings, evaluation)
    return {name: opened[str(reading.value_range)] for name, reading in readings.items()}


def _open_images(data: DataConfig, evaluation: EvaluationConfig) -> PlottedImages:
    """Return the images of both splits.

    Without labels, or with a single class, there are only test images, whose classes are not used.

    Raises:
        UserError: the images cannot be read, or the column of labels that the user named does not exist.
    """
    data = replace(data, streaming=False)  # as for hf-ssl evaluate
    try:
        train, test = open_labeled_splits(data, evaluation)
        return PlottedImages(train, test, evaluation.split_names[1])
    except UserError as error:
        named = [evaluation.test_split] if evaluation.test_fraction is None else []
        for split in (*named, evaluation.train_split):
            try:
                settings = evaluation.data(data)
                images = unlabeled_images(settings, split, max_images=evaluation.max_test_images)
            except UserError:
                continue
            if settings.label_column is not None:
                open_source(settings, split, labels=True)  # a column that does not exist is an error
            notice(f"the pictures show no classes: {error}")
            return PlottedImages(None, images, split)
        raise
