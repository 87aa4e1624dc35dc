# SPDX-License-Identifier: Apache-2.0
"""Chooses the loader of `datasets` for a place, and the cache of its tables."""

import os
from glob import has_magic
from typing import Any

import datasets
from datasets import DatasetBuilder, load_dataset_builder
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from hf_ssl.data.archives import reads_archives
from hf_ssl.data.config import DataConfig
from hf_ssl.data.folder import LocalData
from hf_ssl.data.location import Location, file_state, fingerprint, state_of_files
from hf_ssl.data.metadata_files import METADATA
from hf_ssl.data.tars import TAR_FORMAT, TarImages
from hf_ssl.errors import UserError

_last_builder: dict[tuple, tuple[LocalData, DatasetBuilder]] = {}
"""The builder of the local data that were opened last. The next split of these data reuses it."""


def open_builder(location: Location, config: DataConfig, found: LocalData) -> DatasetBuilder:
    """Return the loader of a data set, with the files that hf_ssl found in a local folder.

    Raises:
        UserError: the path of a folder whose README selects its files contains wildcards.
    """
    if location.kind == "hub":
        return _load_builder(location.loader, name=config.name, revision=config.revision)
    options: dict[str, Any] = {"name": config.name}
    state: tuple[Any, ...]
    if found.files and config.name is None:
        options["data_files"] = DataFilesDict(
            {name: DataFilesList(files, _states(files)) for name, files in found.files.items()}
        )
        state = tuple((*files, *files.origin_metadata) for files in options["data_files"].values())
    else:
        if has_magic(folder := os.path.realpath(location.loader)):
            # `datasets` (seen with 5.2) would read the path as a pattern, and so find another folder.
            raise UserError(
                "data.path: expected a folder without the characters * ? [ ] in its path, because its README "
                f"or data.name selects its files, got {folder!r}; rename it"
            )
        # `datasets` (seen with 5.2) names the cache of a folder that declares its files only by the last part
        # of the path and by the patterns in the README. Another folder with this name, or new files in the
        # same folder, would give the earlier images.
        state = (f"{state_of_files(found.paths)}-{fingerprint(found.paths)}",)
        options["cache_dir"] = os.path.join(str(datasets.config.HF_DATASETS_CACHE), f"hf_ssl-{state[0]}")
    key = (location.loader, config.name, datasets.config.HF_DATASETS_CACHE, state)
    if key not in _last_builder:
        builder = _new_builder(location, options)
        _last_builder.clear()
        _last_builder[key] = (found, builder)
    return _last_builder[key][1]


def _new_builder(location: Location, options: dict[str, Any]) -> DatasetBuilder:
    files = [file for each in options.get("data_files", {}).values() for file in each]
    if files and all(file.lower().endswith(".tar") for file in files):
        return TarImages(dataset_name="tar_images", hash=TAR_FORMAT, data_files=options["data_files"])
    # `datasets` (seen with 5.2) chooses the loader by the endings, and does not find all images.
    described = any(os.path.basename(file) in METADATA for file in files)
    return _load_builder("imagefolder" if described else location.loader, **options)


def _load_builder(path: str, **options: Any) -> DatasetBuilder:
    builder = load_dataset_builder(path, **options)
    if isinstance(builder, WebDataset):  # tars on the Hub, of a README, or compressed
        return TarImages(
            dataset_name=f"tar_images_{TAR_FORMAT}",
            hash=builder.hash,  # the revision of data on the Hub
            data_files=builder.config.data_files,
            features=builder.info.features,  # if the README states them
            cache_dir=options.get("cache_dir"),
        )
    # `images_in_archives` adds the labels.
    return load_dataset_builder(path, **options, drop_labels=True) if reads_archives(builder) else builder


def _states(files: list[str]) -> list[tuple[str]]:
    """Return a text for each file that changes with any of them, also if all times stay the same."""
    content = fingerprint(files)
    return [(f"{file_state(os.stat(file))} {content}",) for file in files]
