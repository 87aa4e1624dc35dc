# SPDX-License-Identifier: Apache-2.0
"""The `data` section of a recipe. This module imports nothing slow, because the command line needs it at
once.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from hf_ssl.errors import UserError, check_name, check_values
from hf_ssl.sections import MISSING, as_section

CACHES = ("auto", "none", "memory", "memmap", "device")
CHANNELS = (1, 3)
BOX_FORMATS = ("xywh", "xyxy")
COLUMN_KINDS = {"gray": 1, "rgb": 3, "normals": 3, "classes": 3}
"""Kind of a further image column -> number of channels. `hf_ssl.data.further_columns` describes the kinds."""


@dataclass
class DataConfig:
    """Which images to read, and how.

    Attributes:
        path: one of: a data set on the Hub ("user/name"); a folder, a file or a glob pattern of Parquet, CSV
            or JSON files, images or WebDataset tars; "digits" (built in, from scikit-learn). In a folder of
            images, hf_ssl ignores all other files (text, videos, archives), except a metadata file that names
            the images. It also ignores output folders of hf_ssl. The folders inside a zip archive are
            classes, as those on the disk. Relative file names in a table belong to the folder of the table.
            In the name of an existing folder, `* ? [ ]` are no wildcards.
        name: the configuration ("subset") of a data set that has several.
        revision: branch, tag or commit on the Hub.
        split: the training split. A slice such as "train[:10%]" needs `streaming=False`. "all" reads all
            splits. In a local folder, it reads all files, whatever the names of files and folders are, and
            without metadata files. If most files of a folder are in no split because of such names, a run
            stops unless the split is set.
        streaming: whether to read the files directly, shuffled in a window, without a local copy.
        image_column: the column of images. It is required if the data set has several, or if the column does
            not have the type Image. A column with a gray mode, such as `Image(mode="L")`, gives gray images.
        further_image_columns: further columns of images and their kinds, such as `{depth: gray, normals:
            normals}`. Only CMC uses them: each column is one more view of the image. All images of a row must
            have the same size. Kinds: "gray" (depth or any other single channel), "rgb", "normals" (surface
            normals; red is the horizontal part) and "classes" (class numbers of pixels).
            `hf_ssl.data.further_columns` describes how they become pixels.
        label_column: the column of classes, or of boxes for the protocol `detection`. It is required if
            labels are needed and several columns are possible.
        box_format: format of the boxes, in pixels: "xywh" (x, y, width, height; COCO) or "xyxy" (x1, y1, x2,
            y2; PASCAL VOC). `hf_ssl.data.boxes` describes the column.
        mask_column: the column of masks (images of class numbers), for segmentation protocols.
            It is required if no column has a usual name (`hf_ssl.data.columns.MASK_NAMES`).
        channels: 3 (color; gray images get three equal channels) or 1 (gray).
        cache: where decoded images are kept: in "memory", in a file that is mapped into memory ("memmap"), on
            the device of the model ("device", which also crops them) or nowhere ("none"). "auto" keeps images
            of one size, of at most 96 pixels per side and 4 GiB in total. Images of several sizes cannot be
            kept: this is a warning for "memory", and an error for "memmap" and "device".
        max_broken_fraction: the largest share of images that may be unreadable. Above it, the run stops, but
            not for fewer than 16 broken images (at most half of the images). 0 allows none. Commands that
            evaluate an encoder use the value of its training, unless another one is set.
        shuffle_window: number of rows of a stream that are shuffled together.
        open_shards: number of shards of a stream that are read in turn.
        max_images: number of images to train on, a fixed random choice; None for all images.
        num_images: number of images in an epoch of a stream whose length is not known. hf_ssl counts the
            images of local files, and reads the number on the card of a data set on the Hub. For local
            tars, hf_ssl reads the headers of all files, unless this number is given.
        value_range: the values that become black and white, such as [0, 4095] for a camera of 12 bits whose
            files have 16 bits. "auto" takes the lowest and highest value of 64 training images, also for the
            evaluation. None takes the limits of the type of numbers: 0 to 65,535 for 16 bits, 0 to 1 for
            floating-point numbers, 0 to 255 for other whole numbers. Images of 8 bits keep their values.
        dtype: type of the pixels, always "uint8". Images with more bits are scaled to 8 bits.
    """

    path: str = MISSING
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    streaming: bool = False
    image_column: str | None = None
    further_image_columns: dict[str, str] = field(default_factory=dict)
    label_column: str | None = None
    box_format: str = "xywh"
    mask_column: str | None = None
    channels: int = 3
    cache: str = "auto"
    max_broken_fraction: float = 0.05
    shuffle_window: int = 4096
    open_shards: int = 32
    max_images: int | None = None
    num_images: int | None = None
    value_range: Any = None
    dtype: str = "uint8"

    @classmethod
    def of(cls, given: Any) -> "DataConfig":
        """Return checked settings for data in Python, which need no `path`.

        Args:
            given: a `DataConfig`, a dict of its fields, or None for the defaults.

        Raises:
            UserError: a key is unknown, or a value has the wrong type or is outside its range.
        """
        config = as_section(cls, given, "data")
        replace(config, path="in Python").check()
        return config

    def check(self) -> None:
        """Raise UserError if a value is outside its range."""
        self._check_further_columns()
        path = None if self.path == MISSING else self.path
        share, limit, length = self.max_broken_fraction, self.max_images, self.num_images
        values = self.value_range
        check_values(
            "data",
            ("path", path, path, "a data set on the Hub, a folder, files or digits", "data.path=FOLDER"),
            ("channels", self.channels, self.channels in CHANNELS, "3 (RGB) or 1 (gray)", "data.channels=3"),
            ("box_format", self.box_format, self.box_format in BOX_FORMATS, " or ".join(BOX_FORMATS)),
            ("cache", self.cache, self.cache in CACHES, f"one of {', '.join(CACHES)}", "data.cache=auto"),
            ("dtype", self.dtype, self.dtype == "uint8", "uint8", "data.dtype=uint8, also for 16-bit images"),
            ("value_range", values, _is_range(values), "[LOW, HIGH], auto or null", "[0, 4095] for 12 bits"),
            ("max_broken_fraction", share, 0 <= share <= 1, "a share from 0 to 1", "the default"),
            ("shuffle_window", self.shuffle_window, self.shuffle_window >= 1, "at least 1", "the default"),
            ("open_shards", self.open_shards, self.open_shards >= 1, "at least 1", "the default"),
            ("max_images", limit, limit is None or limit >= 1, "at least 1", "data.max_images=null for all"),
            ("num_images", length, length is None or length >= 2, "at least 2", "the number of images"),
            (
                "max_images", limit, limit is None or not self.streaming, "null for a stream",
                "data.streaming=false, because the images are chosen at random",
            ),
        )  # fmt: skip

    def _check_further_columns(self) -> None:
        for column, kind in self.further_image_columns.items():
            check_name(f"data.further_image_columns.{column}", kind, COLUMN_KINDS, "a kind of images")
            if column == self.image_column:
                raise UserError(
                    "data.further_image_columns: expected other columns than data.image_column, got "
                    f"{column}; leave it out"
                )


def _is_range(value: Any) -> bool:
    """Return whether a value is valid for `data.value_range`."""
    if value is None or value == "auto":
        return True
    numbers = isinstance(value, list | tuple) and all(type(number) in (int, float) for number in value)
    return numbers and len(value) == 2 and value[0] < value[1]
