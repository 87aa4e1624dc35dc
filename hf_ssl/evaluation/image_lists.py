# SPDX-License-Identifier: Apache-2.0
"""Lists of labeled images: random ones, and those that publications use (files with one name per line)."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_ssl.data.subsets import balanced_rows
from hf_ssl.errors import UserError, counted, first_line
from hf_ssl.evaluation.inputs import Inputs
from hf_ssl.evaluation.protocols import PROTOCOLS


class ImageList(NamedTuple):
    """A published list.

    Attributes:
        title: its name in text.
        address: where the file can be downloaded.
    """

    title: str
    address: str


_SIMCLR = "https://raw.githubusercontent.com/google-research/simclr/383d414/imagenet_subsets"
LISTS = {
    "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17": ImageList(
        "SimCLR's 1 % of ImageNet", f"{_SIMCLR}/1percent.txt"
    ),
    "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091": ImageList(
        "SimCLR's 10 % of ImageNet", f"{_SIMCLR}/10percent.txt"
    ),
}
"""SHA-256 of a file -> the list. SimCLR's lists have 12,811 and 128,116 images. Most results with 1 % and
10 % of the labels of ImageNet use them."""


def class_sizes(labels: Tensor) -> Tensor:
    """Return the number of images of each class that has images."""
    counts = labels.bincount()
    return counts[counts > 0]


def possible_numbers(
    inputs: Inputs,
    protocol: str,
    labels_per_class: Sequence[int],
    fractions: Sequence[float] = (),
    others: int = 0,
) -> tuple[list[int], list[float]]:
    """Return the numbers of labels per class and the fractions that the training images allow.

    A number is at most the size of the smallest class. A fraction contains an image of each class. All others
    are added to `inputs.skipped`.

    Args:
        inputs: the images, with one label each.
        protocol: name of the protocol with these settings.
        labels_per_class, fractions: the settings.
        others: number of other measurements of the protocol.

    Raises:
        UserError: no measurement is possible.
    """
    labels, where = inputs.train.labels, f"evaluation.settings.{protocol}"
    sizes = class_sizes(labels)
    smallest = int(sizes.min())
    counts = [count for count in labels_per_class if count <= smallest]
    shares = [share for share in fractions if round(share * len(labels)) >= len(sizes)]
    problems = [
        f"{where}.fractions: expected a labeled image for each of {len(sizes):,} classes of "
        f"{counted(len(labels), 'image')}, got {share:g}; use a larger fraction"
        for share in fractions
        if share not in shares
    ]
    problems += [
        f"{where}.labels_per_class: expected at most {smallest:,}, the size of the smallest class, "
        f"got {count:,}; use a smaller number"
        for count in labels_per_class
        if count not in counts
    ]
    if not (counts or shares or others):
        raise UserError("; ".join(problems))
    inputs.skipped += [f"{PROTOCOLS[protocol].title}: {each}" for each in problems]
    return counts, shares


def draw_rows(labels: Tensor, count: int, seed: int, draw: int = 0) -> Tensor:
    """Return the sorted row numbers of `count` random images with balanced classes, on the CPU.

    Args:
        labels: (N,).
        count: number of images of all classes.
        seed, draw: the choice depends only on these numbers, the labels and the count.
    """
    return torch.from_numpy(balanced_rows(labels.cpu().numpy(), count, seed, draw))


def rows_hash(draws: Sequence[Tensor], labels: Tensor) -> str:
    """Return a hash of the chosen rows and of their labels (16 hexadecimal digits).

    It identifies the lists on every machine.

    Args:
        draws: sorted row numbers of each draw.
        labels: (N,), or (N, K) for images with several labels.
    """
    digest = hashlib.sha256()
    for rows in draws:
        chosen = labels.cpu()[rows].reshape(len(rows), -1)
        digest.update(torch.cat([rows[None], chosen.T]).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def list_error(path: str) -> str | None:
    """Return why a list cannot be read; None: it can be read and contains names."""
    try:
        return None if Path(path).expanduser().read_text(encoding="utf-8").split() else "the file is empty"
    except (OSError, UnicodeDecodeError) as error:
        return getattr(error, "strerror", None) or first_line(error)


def read_list(path: str) -> tuple[list[str], str]:
    """Return the image names of a list, and its SHA-256."""
    content = Path(path).expanduser().read_bytes()
    lines = content.decode("utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()], hashlib.sha256(content).hexdigest()


def find_rows(names: list[str], images: Any, where: str) -> Tensor:
    """Return the sorted row numbers of the named images.

    Only the last parts of paths are compared. "n01440764_1_n01440764.JPEG", a name of ImageNet on the Hub, is
    also found as "n01440764_1.JPEG", the name in ImageNet's archives.

    Args:
        names: image names.
        images: the training images, a `LabeledImages`; None: only features are known.
        where: the list, for messages.

    Raises:
        UserError: the images have no names, several have one of the names, or a name does not exist.
    """
    known = getattr(images, "names", None)
    if not known:
        raise UserError(f"few labels: expected images with file names for the list {where}, got none")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(known):
        rows.setdefault(_name(name), []).append(row)
    wanted = dict.fromkeys(_name(name) for name in names)
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise UserError(
            f"few labels: expected all {len(wanted):,} images of the list {where} among {len(known):,} "
            f"training images, got {len(wanted) - len(missing):,}; {missing[0]} is missing"
        )
    for name in wanted:
        if len(rows[name]) > 1:
            raise UserError(
                f"few labels: expected one image {name} of the list {where}, got {len(rows[name])}"
            )
    return torch.tensor(sorted(rows[name][0] for name in wanted))


def _name(path: str) -> str:
    name = re.split(r"[/\\]", path)[-1]
    return re.sub(r"^(n\d{8}_\d+)_n\d{8}\.", r"\1.", name)
