# SPDX-License-Identifier: Apache-2.0
"""Loads an encoder that consists of parts in subfolders of a folder or of a repository on the Hub."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils.hub import extract_commit_hash

from hf_ssl.errors import UserError, first_line
from hf_ssl.modeling.encoder_parts import PARTS, described_views, listed_subfolders
from hf_ssl.modeling.narrow_encoders import joined_config
from hf_ssl.modeling.parallel_encoders import ParallelEncoders
from hf_ssl.views.color_spaces import ColorViews


@dataclass(frozen=True)
class EncoderFolder:
    """A folder with `encoders.json`.

    Attributes:
        place: a folder or a Hub id.
        subfolders: the folder of each part.
        views: the division of images between the parts.
        options: arguments of `from_pretrained`. On the Hub, they name one commit for all parts.
    """

    place: str
    subfolders: list[str]
    views: ColorViews
    options: dict[str, Any]

    def config(self) -> PreTrainedConfig:
        """Return the config of an encoder that is as wide as all parts together.

        Raises:
            UserError: the parts do not belong together.
        """
        return self._joined(self._read(AutoConfig))

    def load(self) -> ParallelEncoders:
        """Return an encoder of RGB images that joins the parts. Errors: see `config`."""
        parts = self._read(AutoModel)
        encoder = ParallelEncoders(self._joined([part.config for part in parts]), parts, self.views)
        encoder.name_or_path = self.place  # `load_processor` reads it
        return encoder

    def _read(self, kind: Any) -> list[Any]:
        """Return the result of `from_pretrained` of each subfolder."""
        found = []
        for name in self.subfolders:
            try:
                found.append(kind.from_pretrained(self.place, subfolder=name, **self.options))
            except Exception as error:  # see `hf_ssl.modeling.backbones.loading_errors`
                raise UserError(f"{name}: {first_line(error)}") from error
        return found

    def _joined(self, configs: list[Any]) -> PreTrainedConfig:
        channels = [config.num_channels for config in configs]
        if channels != list(self.views.groups):
            raise UserError(
                f"{PARTS}: expected encoders of {list(self.views.groups)} channels, got {channels} in "
                f"{', '.join(self.subfolders)}"
            )
        config: PreTrainedConfig = joined_config(configs)
        config.name_or_path = self.place
        config._commit_hash = self.options.get("revision")
        return config


def find_parts(place: str, **options: Any) -> EncoderFolder | None:
    """Return the description of an encoder in parts; None if the folder or repository has no `encoders.json`.

    Args:
        place: a folder or a Hub id.
        options: arguments of `from_pretrained` that say where the files are, such as `revision`.

    Raises:
        UserError: `encoders.json` is damaged.
    """
    if os.path.isdir(place):
        file = os.path.join(place, PARTS)
        if not os.path.isfile(file):
            return None
    else:
        # Not `cached_file` of transformers, which finds the file of an older commit if the newest has none.
        known = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
        try:
            file = hf_hub_download(place, PARTS, **known)
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return None  # AutoConfig reports other errors than a missing file
        options = options | {"revision": extract_commit_hash(file, None)}
    return EncoderFolder(place, listed_subfolders(Path(file)), described_views(Path(file)), options)
