# SPDX-License-Identifier: Apache-2.0
"""Reads WebDataset tars whose images have different endings."""

import os
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset, base_plus_ext

from hf_ssl.data.formats import READABLE
from hf_ssl.errors import UserError

TAR_FORMAT = "2"  # part of the names of cached tables; increase it if `TarImages` gives other rows

_BLOCK = 1 << 20


class TarImages(WebDataset):
    """The reader of `datasets` for WebDataset tars, with one column for the images of all samples.

    `datasets` (seen with 5.2) makes one column for each ending, and finds the columns in the first five
    samples. Images with another ending vanish, or it raises an error. If each of the first samples has
    exactly one image with a simple ending, this reader puts all such images into the column of the first one.
    """

    image_column: str | None = None

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        """Find the columns. The first call of `_get_pipeline_from_tar` below determines `image_column`.

        Raises:
            UserError: a local tar is damaged.
        """
        self.image_column = None
        if not dl_manager.is_streaming:  # `count_streamed` checks the tars of a stream
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
            samples = chain(first, samples)
        for sample in samples:
            names_here = _image_names(sample) if self.image_column else []
            if len(names_here) == 1 and names_here[0] != self.image_column:
                sample[self.image_column] = sample.pop(names_here[0])
            yield sample


def _image_names(sample: dict[str, Any]) -> list[str]:
    """Return the names of the images of a sample that are simple endings such as "jpg"."""
    return [name for name in sample if f".{name.lower()}" in READABLE]


def count_samples(file: str) -> int:
    """Return the number of samples that `datasets` reads from a local tar: runs of members with the same key.

    Raises:
        UserError: the tar continues after the last member that can be read. At a damaged header, and after an
            end mark, tarfile (Python 3.11 to 3.14) ends without an error, so images would vanish.
        OSError, tarfile.TarError: the file is truncated or is no tar.
    """
    count, last = 0, None
    with tarfile.open(file, "r:") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # otherwise the list of all members grows
            if not member.isreg() or os.path.basename(member.name).startswith((".", "__")):
                continue
            key, _ = base_plus_ext(member.name)
            if key is not None and key != last:
                count, last = count + 1, key
        end = archive.offset
    with open(file, "rb") as rest:
        rest.seek(end)
        while block := rest.read(_BLOCK):
            if any(block):
                raise UserError(
                    f"data.path: expected a whole tar, got {file!r}, of which only {count} images before "
                    f"byte {end} can be read; it is damaged, or consists of several tars: write one tar"
                )
    return count
