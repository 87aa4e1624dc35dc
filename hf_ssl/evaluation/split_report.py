# SPDX-License-Identifier: Apache-2.0
"""Reports what makes the numbers of two labeled splits doubtful: shared images, and unknown classes."""

from weakref import WeakKeyDictionary, WeakSet

from hf_ssl.data import LabeledImages
from hf_ssl.errors import counted
from hf_ssl.progress import notice

_reported: WeakKeyDictionary[LabeledImages, WeakSet[LabeledImages]] = WeakKeyDictionary()


def report_comparison(where: str, train: LabeledImages, test: LabeledImages) -> None:
    """Report once how many test images are also training images, and how many have no known class.

    An image that is also a training image is its own nearest neighbor. The class of an image is unknown if no
    training image has it.

    Args:
        where: what uses the images, for the message.
        train, test: the images, after `test.classified_by(train)`.
    """
    known = _reported.setdefault(test, WeakSet())
    if train in known:
        return
    known.add(train)
    if shared := test.shared_with(train):
        are = "is" if shared == 1 else "are"
        notice(
            f"{where}: {counted(shared, 'image')} of {len(test):,} in {test.description} {are} also in "
            f"{train.description}, so all numbers are too high; use other splits"
        )
    if unknown := test.unknown_to(train):
        notice(unknown_classes(where, unknown, len(test), test.description, train.description))


def unknown_classes(where: str, count: int, total: int, test: str, train: str) -> str:
    """Return the sentence about test images whose class has no training image."""
    have, wrong = ("has", "counts as wrong") if count == 1 else ("have", "count as wrong")
    return (
        f"{where}: {counted(count, 'image')} of {total:,} in {test} {have} a class without images in "
        f"{train}, and {wrong}"
    )
