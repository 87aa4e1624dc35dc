# SPDX-License-Identifier: Apache-2.0
"""The `data` section of a recipe. Imports nothing heavy: the command line needs it at once."""

from dataclasses import dataclass

from hf_ssl.errors import UserError

CACHES = ("auto", "none", "memory", "memmap", "device")
CHANNELS = (1, 3)


@dataclass
class DataConfig:
    """Which images to read, and how.

    Attributes:
        path: a data set on the Hub ("user/name"), a folder of Parquet files, of images or of WebDataset tars,
            a single such file or a glob pattern of them, or "digits" (scikit-learn's, built in). hf_ssl
            does not read other files beside images (text, videos, archives).
        name: the configuration ("subset") of a data set that has several.
        revision: branch, tag or commit on the Hub.
        split: the split to train on; a slice such as "train[:10%]" where nothing is streamed.
        streaming: read from the files as they are, in a shuffled window, without building a local copy first.
        image_column: needed where there is more than one column of images, or where it is not typed as one.
        label_column: needed where labels are asked for and there is more than one column of classes.
        channels: 3 (colour; grey images become three equal channels) or 1 (grey).
        cache: decoded images in "memory", in a file mapped into memory ("memmap"), on the model's device
            ("device", where they are cropped too) or not at all ("none").
            "auto" caches images of one size up to 96 pixels that take up to 4 GiB.
        max_broken_fraction: the run stops when more than this share of the images cannot be read.
        shuffle_window: rows of a stream that are shuffled together.
        open_shards: shards of a stream that are read in turn.
        max_images: train on so many images only, a fixed random choice.
        dtype: of the pixels that are handed on; 16-bit images are scaled to 8 bits.
    """

    path: str = "???"  # OmegaConf's mark for "must be given"
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    streaming: bool = False
    image_column: str | None = None
    label_column: str | None = None
    channels: int = 3
    cache: str = "auto"
    max_broken_fraction: float = 0.05
    shuffle_window: int = 4096
    open_shards: int = 32
    max_images: int | None = None
    dtype: str = "uint8"

    def check(self) -> None:
        """Raises UserError for a value that cannot be."""
        if not self.path or self.path == "???":
            raise UserError("data.path is missing: expected a data set on the Hub, a folder, or digits")
        if self.channels not in CHANNELS:
            raise UserError(
                f"expected data.channels=3 (colour) or 1 (grey), got {self.channels}: images with other "
                "numbers of channels are not supported"
            )
        if self.cache not in CACHES:
            raise UserError(f"expected data.cache to be one of {', '.join(CACHES)}, got {self.cache!r}")
        if self.dtype != "uint8":
            raise UserError(f"expected data.dtype=uint8 (16-bit images are scaled to it), got {self.dtype!r}")
        if not 0 <= self.max_broken_fraction <= 1:
            raise UserError(f"expected data.max_broken_fraction from 0 to 1, got {self.max_broken_fraction}")
        for key in ("shuffle_window", "open_shards"):
            if getattr(self, key) < 1:
                raise UserError(f"expected data.{key} of at least 1, got {getattr(self, key)}")
        if self.max_images is not None and self.max_images < 1:
            raise UserError(f"expected data.max_images of at least 1, got {self.max_images}")
        if self.max_images is not None and self.streaming:
            raise UserError("data.max_images chooses rows at random, so it needs data.streaming=false")
