# SPDX-License-Identifier: Apache-2.0
"""The images in zip archives, and their labels: the names of the folders inside the archives.

`datasets` (seen with 5.2) labels each image of an archive with the name of the folder that contains the
archive. If no class has this name, it raises an error, also if nobody needs labels. If a class has this name,
all images get this class. So hf_ssl lets `datasets` read archives without labels, and adds the labels.
"""

import logging
import os
import re
from collections.abc import Sequence

import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetBuilder, Image
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder

from hf_ssl.data.class_numbers import class_name
from hf_ssl.data.location import ARCHIVES, IMAGE, ZIP, file_kind
from hf_ssl.data.split_rules import report_splits_inside
from hf_ssl.errors import counted

logger = logging.getLogger(__name__)

LABEL = "label"
_INSIDE = re.compile(r"zip://(?P<name>.*?)::.*", re.DOTALL)


def reads_archives(builder: DatasetBuilder) -> bool:
    """Return whether a loader reads plain images from archives."""
    files = builder.config.data_files or {}
    return isinstance(builder, FolderBasedBuilder) and any(
        str(file).lower().endswith(ZIP) for split in files.values() for file in split
    )


def images_in_archives(table: Dataset, splits: dict[str, Dataset]) -> Dataset:
    """Return the images of archives, with the column "label" if the folders in the archives are classes.

    The folders are classes if all images are in archives, all folders have the same depth, and there are at
    least two names. This is the rule for folders on the disk. Other files in archives are left out, because
    `datasets` (seen with 5.2) returns them as images. A table with other columns, which come from a metadata
    file, stays unchanged.

    Args:
        table: the images of one split, or of a part or a sum of splits.
        splits: all splits. They have the same classes.
    """
    if list(table.features) != ["image"]:
        return table
    own = _names(table)
    inside = [name for name in own if name is not None and _is_image(name)]
    report_splits_inside({folder for name in inside for folder in name.split("/")[:-1]})
    _report_archives_inside(own)
    rows = [row for row, name in enumerate(own) if _is_image(name)]
    if len(rows) < len(table):
        table, own = table.select(rows), [own[row] for row in rows]
    used = {name for split in splits.values() for name in _names(split) if _is_image(name)}
    classes = sorted({_class(name) for name in used if name is not None})
    depths = {None if name is None else name.count("/") for name in used}
    if len(classes) < 2 or len(depths) != 1 or None in depths:
        return table
    numbers = {name: number for number, name in enumerate(classes)}
    labels = pa.array([numbers[_class(str(name))] for name in own], pa.int64())
    return table.add_column(LABEL, labels, feature=ClassLabel(names=classes))


def _report_archives_inside(names: Sequence[str | None]) -> None:
    found = sorted({name for name in names if name is not None and name.lower().endswith(ARCHIVES)})
    if found:
        logger.warning(
            "%s inside of an archive, such as %s, cannot be read; unpack the outer archive, and use its "
            "folder", counted(len(found), "archive"), found[0],
        )  # fmt: skip


def _names(table: Dataset) -> list[str | None]:
    """Return the path of each image inside its archive; None for an image outside of an archive."""
    paths = table.cast_column("image", Image(decode=False)).flatten().with_format(None)["image.path"][:]
    matches = [_INSIDE.fullmatch(path or "") for path in paths]
    return [None if match is None else match["name"] for match in matches]


def _is_image(name: str | None) -> bool:
    """Return whether a file in an archive is an image. Files outside of archives were checked before."""
    if name is None:
        return True
    hidden = any(part.startswith((".", "__")) for part in name.split("/"))
    return file_kind(name) == IMAGE and not hidden


def _class(name: str) -> str:
    return class_name(os.path.basename(os.path.dirname(name)))
