# SPDX-License-Identifier: Apache-2.0
"""Reads WebDataset tars whose images have different endings."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from textwrap import shorten
from typing import Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from hf_ssl.data.columns import LABEL_NAMES
from hf_ssl.data.formats import READABLE
from hf_ssl.data.split_rules import report_splits_inside
from hf_ssl.errors import UserError

TAR_FORMAT = "3"  # part of the names of cached tables; increase it if `TarImages` gives other rows

_BLOCK = 1 << 20
_CLASSES = ("cls", "cls2")
"""Endings of members that contain a class."""


class TarImages(WebDataset):
    """The reader of `datasets` for WebDataset tars, with one column for the images of all samples.

    `datasets` (seen with 5.2) makes one column for each ending, and finds the columns in the first five
    samples. It drops images with another ending, or raises an error. If each of the first samples has
    exactly one image with a simple ending, this reader puts all such images into the column of the first one.
    Otherwise, each ending of the first samples is a column, and a sample may lack some of them, as a sample
    with fewer images does (github.com/huggingface/datasets/issues/7055).

    An entry of a member `KEY.json` with a name in `LABEL_NAMES`, as in `{"label": "cat"}`, becomes a column.
    The classes in these entries and in `KEY.cls` become whole numbers if all classes of the first samples are
    whole numbers, else texts. (`datasets` accepts only numbers in `KEY.cls`.)
    """

    image_column: str | None = None
    DECODERS = WebDataset.DECODERS | dict.fromkeys(_CLASSES, bytes.decode)
    _class_names: tuple[str, ...] = ()
    _numbers: frozenset[str] = frozenset()

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        """Find the columns. The first call of `_get_pipeline_from_tar` below determines `image_column`.

        Raises:
            UserError: a local tar is damaged.
        """
        self.image_column = None
        if not dl_manager.is_streaming:  # `size_of_stream` checks the tars of a stream
            for file in chain.from_iterable((self.config.data_files or {}).values()):
                with suppress(OSError, tarfile.TarError):  # the reader reports the file
                    count_samples(str(file))
        return super()._split_generators(dl_manager)

    # `datasets` calls this class method through the builder.
    def _get_pipeline_from_tar(self, tar_path: str, tar_iterator: Any) -> Iterator[dict[str, Any]]:
        """Yield the samples of a tar, with the image in `image_column` if the samples have only one image."""
        samples = super()._get_pipeline_from_tar(tar_path, tar_iterator)
        if self.image_column is None:
            first = list(islice(samples, self.NUM_EXAMPLES_FOR_FEATURES_INFERENCE))
            if not first:
                raise ValueError(f"{tar_path} contains no files whose names have the form KEY.jpg")
            names = [_image_names(sample) for sample in first]
            merges = bool(names) and all(len(each) == 1 for each in names)
            self.image_column = names[0][0] if merges else ""
            self._class_names, self._numbers = _class_names(first), frozenset()
            for sample in first:
                self._add_classes(sample)
            self._numbers = _numbers(first, self._class_names)
            first = [self._merged(sample) for sample in first]
            columns = dict.fromkeys(name for sample in first for name in sample)
            for sample in first:
                yield dict.fromkeys(columns) | sample
        for sample in samples:
            yield self._merged(sample)

    def _merged(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Return a sample with columns for its classes, and with a single image in `image_column`."""
        self._add_classes(sample)
        for name, value in _classes(sample, self._class_names).items():
            sample[name] = _whole_number(value, name, sample) if name in self._numbers else str(value).strip()
        names = _image_names(sample) if self.image_column else []
        if len(names) == 1 and names[0] != self.image_column:
            sample[str(self.image_column)] = sample.pop(names[0])
        return sample

    def _add_classes(self, sample: dict[str, Any]) -> None:
        record = sample.get("json")
        for name in self._class_names:
            sample[name] = record.get(name) if isinstance(record, dict) else None


def _classes(sample: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return {column: class} of a sample, from the members with the endings `_CLASSES` and from JSON."""
    return {
        name: value
        for name, value in sample.items()
        if value is not None and (name in names or name.rpartition(".")[2].lower() in _CLASSES)
    }


def _numbers(samples: list[dict[str, Any]], names: tuple[str, ...]) -> frozenset[str]:
    """Return the columns of classes that contain only whole numbers in these samples."""
    found = [each for sample in samples for each in _classes(sample, names).items()]
    others = {name for name, value in found if not _is_whole_number(value)}
    return frozenset(name for name, _ in found) - others


def _is_whole_number(value: Any) -> bool:
    try:
        int(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, float)


def _whole_number(value: Any, name: str, sample: dict[str, Any]) -> int:
    if not _is_whole_number(value):
        raise ValueError(
            f"expected a whole number as the class of {sample['__key__']} ({name}), as in the first samples, "
            f"got {shorten(repr(value), 40)}; use only numbers or only names"
        )
    return int(value)


def _image_names(sample: dict[str, Any]) -> list[str]:
    """Return the names of the images of a sample that are simple endings such as "jpg"."""
    return [name for name in sample if f".{name.lower()}" in READABLE]


def _class_names(samples: list[dict[str, Any]]) -> tuple[str, ...]:
    """Return the names in `LABEL_NAMES` that JSON members contain, except those of other columns."""
    records = [record for sample in samples if isinstance(record := sample.get("json"), dict)]
    known = {name for sample in samples for name in sample}
    return tuple(
        name
        for name in LABEL_NAMES
        if name not in known and any(isinstance(record.get(name), str | int) for record in records)
    )


def count_samples(file: str) -> int:
    """Return the number of samples that `datasets` reads from a local tar: runs of members with the same key.

    Report folders that are named after several splits.

    Raises:
        UserError: the tar continues after the last member that can be read. At a damaged header, and after an
            end mark, tarfile (Python 3.11 to 3.14) ends without an error, so images would be missing. Or
            the members of a sample are at several places. They would become several samples, some without an
            image and some without a label (github.com/webdataset/webdataset/issues/258).
        OSError, tarfile.TarError: the file is truncated or is no tar.
    """
    count, last = 0, None
    endings: dict[str, str] = {}  # those of the samples so far
    folders: set[str] = set()
    with tarfile.open(file, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # otherwise the list of all members grows
            if not member.isreg() or os.path.basename(member.name).startswith((".", "__")):
                continue
            key, ending = base_plus_ext(member.name)
            if key is None:
                continue
            if key != last:
                count, last = count + 1, key
                folders.update(key.split("/")[:-1])
                if endings.setdefault(key, ending) != ending:
                    raise UserError(
                        f"data.path: expected the files of each sample one after the other in {file!r}, got "
                        f"{key}.{endings[key]} and {member.name} apart; write the tar sorted by name"
                    )
        end = archive.offset
    with open(file, "rb") as rest:
        rest.seek(end)
        while block := rest.read(_BLOCK):
            if any(block):
                raise UserError(
                    f"data.path: expected a whole tar, got {file!r}, of which only {count} images before "
                    f"byte {end} can be read; it is damaged, or consists of several tars: write one tar"
                )
    report_splits_inside(folders)
    return count
