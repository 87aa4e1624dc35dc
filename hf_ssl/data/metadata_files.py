# SPDX-License-Identifier: Apache-2.0
"""Recognizes the files in a folder that describe its images, and folders without images."""

import csv
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Image, IterableDataset

from hf_ssl.data.location import advice_for_others
from hf_ssl.errors import UserError

logger = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_NAME_COLUMNS = ("file_name", "file_names")
_NAME_ENDINGS = ("_file_name", "_file_names")
_YAML_BLOCK = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---[\r\n]", re.DOTALL)
_DECLARATION = re.compile("^(configs|dataset_info):", re.MULTILINE)


def describes_images(path: str) -> bool:
    """Return whether a metadata file has a column of file names; log a warning if not.

    Many data sets contain a `metadata.csv` of their own. `datasets` (seen with 5.2) raises for such a file.
    """
    try:
        if path.endswith(".parquet"):
            columns = pq.read_schema(path).names
        else:
            with open(path, encoding="utf-8-sig") as file:
                line = file.readline()
            columns = next(csv.reader([line]), []) if path.endswith(".csv") else list(json.loads(line))
    except (OSError, ValueError, pa.ArrowException):
        columns = []
    if any(column in _NAME_COLUMNS or column.endswith(_NAME_ENDINGS) for column in columns):
        return True
    logger.warning(
        "%s is not used: expected a column file_name, got %s", path, ", ".join(map(str, columns)) or "none"
    )
    return False


@contextmanager
def folders_are_no_classes(files: Iterable[str]) -> Iterator[None]:
    """Explain that folders are no classes if a metadata file describes the images, when no column is found.

    Args:
        files: the files of a split.
    """
    try:
        yield
    except UserError as error:
        file = next((each for each in files if os.path.basename(each) in METADATA), None)
        if file is None:
            raise
        raise UserError(
            f"data.label_column: expected a column of classes in {file}, got none; add a column label with "
            "the name of the folder of each image, because folders are no classes beside such a file"
        ) from error


def report_listed_files(data: Dataset | IterableDataset, rows: int, images: int, where: str) -> None:
    """Log a warning if a metadata file does not name all images of a folder, or names some of them again.

    `datasets` (seen with 5.2) reads an image once for each row. This can be intended, for example for several
    captions of an image.

    Args:
        data: the rows. In a stream, images that are named again are not found.
        rows: number of the rows.
        images: number of images in the folder.
        where: the folder, for the message.
    """
    repeated = _repeated(data) if isinstance(data, Dataset) else 0
    if repeated:
        logger.warning(
            "%d of %d rows in the metadata of %s name an image again; each row counts as an image", repeated,
            rows, where,
        )  # fmt: skip
    if rows - repeated < images:
        logger.warning(
            "%d of %d images in %s are not used, because a metadata file in the folder does not name them; "
            "data.split=all reads all images without the metadata",
            images - rows + repeated, images, where,
        )  # fmt: skip


def _repeated(table: Dataset) -> int:
    """Return how many rows name an image that an earlier row has named."""
    column = next((name for name, feature in table.features.items() if isinstance(feature, Image)), None)
    if column is None:
        return 0
    images = table.select_columns([column]).cast_column(column, Image(decode=False))
    paths = [path for path in images.flatten().with_format(None)[f"{column}.path"][:] if path is not None]
    return len(paths) - len({*paths})


def declares_its_files(root: str) -> bool:
    """Return whether the folder declares the files of its splits, as a data set on the Hub does."""
    if any(os.path.exists(os.path.join(root, name)) for name in (".huggingface.yaml", "dataset_infos.json")):
        return True
    try:
        with open(os.path.join(root, "README.md"), encoding="utf-8", errors="replace") as file:
            block = _YAML_BLOCK.match(file.read() + "\n")
    except OSError:
        return False
    return block is not None and _DECLARATION.search(block[1]) is not None


def require_known_files(root: str, paths: list[str]) -> None:
    """Raise UserError if a folder contains only images that cannot be read, or archives."""
    endings = sorted({os.path.splitext(path)[1].lower() for path in paths})
    advice = advice_for_others(endings)
    # `datasets` opens compressed tars.
    if advice != advice_for_others([]) and not any(path.endswith(".tar.gz") for path in paths):
        raise UserError(
            f"data.path: expected a folder of Parquet files, images or WebDataset tars, got {root!r} with "
            f"the endings {', '.join(filter(None, endings[:8]))}; {advice}"
        )
