# SPDX-License-Identifier: Apache-2.0
"""Reads WebDataset tars whose images have different endings."""

from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_ssl.data.formats import READABLE

TAR_FORMAT = "1"  # part of the names of cached tables; increase it if `TarImages` gives other rows


class TarImages(WebDataset):
    """The reader of `datasets` for WebDataset tars, with one column for the images of all samples.

    `datasets` (seen with 5.2) makes one column for each ending, and finds the columns in the first five
    samples. Images with another ending vanish, or it raises an error. If each of the first samples has
    exactly one image with a simple ending, this reader puts all such images into the column of the first one.
    """

    image_column: str | None = None

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        """Find the columns. The first call of `_get_pipeline_from_tar` below determines `image_column`."""
        self.image_column = None
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
