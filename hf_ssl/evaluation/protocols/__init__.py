# SPDX-License-Identifier: Apache-2.0
"""The table of evaluation protocols. It contains only strings, so importing it loads no protocol.

A protocol is one file, `<name>.py` in this folder, and one line in `PROTOCOLS`. The file contains:

- `VERSION`, which increases with each change that can change the numbers;
- `Config`, a dataclass with the settings, with `check(where)`. The field `folder` is the folder for
  checkpoints of trainings;
- `run(inputs, config)`, which receives `hf_ssl.evaluation.inputs.Inputs` and returns a list of
  `ProtocolResult` (an empty one, if it measures no accuracy);
- optionally `features(config)`, the names of further features (`Split.further`): those of
  `hf_ssl.modeling.pooling.FEATURES`;
- optionally `require_packages()`, which raises UserError before the images are read if an optional package is
  missing.
"""

from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from typing import Any, NamedTuple

from hf_ssl.errors import check_name


class Protocol(NamedTuple):
    """One protocol.

    Attributes:
        title: name of the protocol in text, for example "linear probe".
        summary: one line about the protocol.
        of_pixels: whether the protocol is also run for raw pixels.
        takes_long: whether `hf-ssl evaluate --protocols all` leaves it out, because it runs the encoder in
            each of many epochs.
        needs_encoder: whether the protocol needs an encoder. If only features are given, it is skipped.
        labels: kinds of labels. The images need at least one of them: "one" class, "several" classes, "boxes"
            with classes (such images also have "several"), or a kind of `hf_ssl.data.targets` ("masks").
    """

    title: str
    summary: str
    of_pixels: bool = False
    needs_encoder: bool = False
    takes_long: bool = False
    labels: tuple[str, ...] = ("one",)


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol("k-NN", "The nearest training images vote for the class.", of_pixels=True),
    "few_label_knn": Protocol(
        "k-NN with few labels", "The nearest of a few labeled images gives the class.", of_pixels=True
    ),
    "retrieval": Protocol(
        "retrieval", "Each test image ranks the training images by cosine similarity.", of_pixels=True
    ),
    "linear": Protocol("linear probe", "SGD trains a linear classifier on frozen features."),
    "attentive": Protocol(
        "attentive probe", "A learned query attends to frozen patch tokens.", needs_encoder=True
    ),
    "logistic_regression": Protocol(
        "logistic regression", "L-BFGS minimizes the cross entropy plus a penalty on the weights."
    ),
    "ridge": Protocol(
        "ridge regression", "A closed form minimizes the squared error plus a penalty on the weights."
    ),
    "mlp": Protocol("MLP probe", "SGD trains a classifier with one hidden layer on frozen features."),
    "few_label_linear": Protocol(
        "linear classifier with few labels", "Logistic regression learns from a few labeled images."
    ),
    "linear_augmented": Protocol(
        "linear probe with crops and flips",
        "SGD or LARS trains a linear classifier on new crops and flips of the images in every epoch.",
        needs_encoder=True,
        takes_long=True,
    ),
    "fine_tune": Protocol(
        "fine-tuning",
        "The encoder itself is trained with all or few labels.",
        needs_encoder=True,
        takes_long=True,
        labels=("one", "several"),
    ),
    "quality": Protocol(
        "quality without labels",
        "LiDAR and alignment compare the features of augmented views of each image.",
        needs_encoder=True,
        labels=("one", "several", "masks"),
    ),
    "multi_label": Protocol(
        "multi-label probe",
        "A logistic regression for each class gives the mean average precision.",
        labels=("several",),
    ),
    "segmentation": Protocol(
        "segmentation",
        "A linear classifier on frozen patch tokens predicts the class of each pixel.",
        needs_encoder=True,
        labels=("masks",),
    ),
    "attention_masks": Protocol(
        "attention masks",
        "The attention of the class token is compared with the masks of the objects.",
        needs_encoder=True,
        labels=("masks",),
    ),
    "detection": Protocol(
        "object detection",
        "Faster R-CNN with a feature pyramid is trained on the frozen and on the fine-tuned encoder.",
        needs_encoder=True,
        takes_long=True,
        labels=("boxes",),
    ),
}

DEFAULT_PROTOCOLS = ("knn", "linear")
SEVERAL_LABELS_PROTOCOLS = ("multi_label",)
"""Protocols that the commands run by default if images have several labels."""


def label_kinds(names: Iterable[str]) -> list[str]:
    """Return the kinds of labels that the protocols with these names accept, see `Protocol.labels`."""
    return sorted({kind for name in names if name in PROTOCOLS for kind in PROTOCOLS[name].labels})


def uses_image_labels(name: str) -> bool:
    """Return whether a protocol can use class labels of whole images, instead of boxes or masks."""
    return not {"one", "several"}.isdisjoint(PROTOCOLS[name].labels)


def has_checkpoints(name: str) -> bool:
    """Return whether a protocol has a setting `folder`, for checkpoints of its trainings."""
    return any(field.name == "folder" for field in fields(load_protocol(name).Config))


def load_protocol(name: str) -> Any:
    """Return the module of a protocol, or raise UserError for an unknown name."""
    check_name("evaluation.protocols", name, PROTOCOLS, "known protocols")
    return import_module(f"hf_ssl.evaluation.protocols.{name}")
