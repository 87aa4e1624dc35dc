# SPDX-License-Identifier: Apache-2.0
"""Stores features on the disk, so that another evaluation of the same encoder and images reads them.

A file holds one feature of one split. Its name contains a key, the hash of everything that determines the
numbers: encoder, processor, images, precision, kind of device, and versions of libraries. The batch size and
the number of threads are not part of the key, because they change only the last digits.

The files can be deleted at any time, also while a program uses them.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock, Timeout
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from hf_ssl.data import LabeledImages
from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.evaluation.encoders import chosen_precision, inspect_encoder
from hf_ssl.evaluation.features import PatchGrid, extract_poolings
from hf_ssl.evaluation.inputs import LabeledData
from hf_ssl.evaluation.shared_extraction import extract_together
from hf_ssl.files import remove_incomplete, replaced_file
from hf_ssl.modeling.gather import (
    from_every_process,
    is_first_on_machine,
    process_count,
    work_is_shared,
)
from hf_ssl.precision import autocast_dtype
from hf_ssl.progress import notice

logger = logging.getLogger(__name__)

FORMAT = 1  # increase it if the extraction of features changes
_LIBRARIES = ("torch", "torchvision", "transformers", "pillow", "timm")
_KNOWN_CODE = {"torch", "torchvision", "transformers", "transformers_modules", "timm", "hf_ssl"}
_LOCK_SECONDS = 60
_ABOUT = "hf_ssl"


class Entry(NamedTuple):
    """Stored features.

    Attributes:
        features: (N, ...) float32, without broken images.
        broken: "where: reason" of the broken images by their position in the split.
    """

    features: Tensor
    broken: dict[int, str]


class FeatureCache:
    """Features in a folder, one file for each feature of a split.

    Several processes may use the folder at the same time. A file gets its name after it is complete, and only
    one process at a time writes and deletes.

    Args:
        folder: the folder, which is created when the first file is written.
        most_bytes: the least recently used files are deleted if all files together have more bytes.
    """

    def __init__(self, folder: Path, most_bytes: float) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    @classmethod
    def of(cls, config: EvaluationConfig) -> "FeatureCache | None":
        """Return the cache of the settings; None: `evaluation.cache` is false."""
        if not config.cache:
            return None
        folder = config.cache_dir or os.path.join(constants.HF_HOME, "hf_ssl", "features")
        return cls(Path(folder).expanduser(), config.cache_size * 2**30)

    def path(self, key: str, name: str) -> Path:
        """Return the file of a feature."""
        return self.folder / f"{_hash([key.encode()])}-{name}.safetensors"

    def read(self, key: str, name: str, images: int) -> Entry | None:
        """Return a stored feature; None if it is missing or damaged.

        Args:
            key: see `feature_key`.
            name: name of the feature.
            images: number of images with the broken ones.
        """
        path = self.path(key, name)
        try:
            with safe_open(path, framework="pt") as opened:
                stored = json.loads((opened.metadata() or {})[_ABOUT])
                features = opened.get_tensor("features")
            broken = {int(row): text for row, text in stored["broken"].items()}
            if stored["key"] != key or len(features) != images - len(broken):
                raise ValueError("other images")
            if stored["checksum"] != _hash([_bytes(features)]):
                raise ValueError("wrong checksum")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, AttributeError) as error:
            logger.warning("%s in %s is damaged and is replaced: %s", path.name, self.folder, error)
            return None
        with suppress(OSError):
            os.utime(path)  # it is the most recently used one now
        return Entry(features, broken)

    def write(self, key: str, name: str, entry: Entry) -> None:
        """Store a feature. If this is not possible, log a warning."""
        features = entry.features.contiguous()
        size = features.numel() * features.element_size()
        # One text, because safetensors writes several in a random order.
        about = json.dumps({"key": key, "broken": entry.broken, "checksum": _hash([_bytes(features)])})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if size > self.most_bytes or size > shutil.disk_usage(self.folder).free / 2:
                logger.warning(
                    "the features %s are not cached, because they need %.1f GiB; use a larger "
                    "evaluation.cache_size, or another evaluation.cache_dir",
                    name,
                    size / 2**30,
                )
                return
            lock = self.folder / "lock"
            with FileLock(lock, timeout=_LOCK_SECONDS):
                remove_incomplete(self.folder)  # of killed processes
                with replaced_file(self.path(key, name)) as staging:
                    save_file({"features": features}, staging, {_ABOUT: about})
                    shutil.copymode(lock, staging)  # safetensors creates files that only their owner can read
                self._delete_oldest(self.path(key, name))
        except (OSError, UserError, Timeout) as error:
            logger.warning("the features are not cached: %s", error)

    def _delete_oldest(self, newest: Path) -> None:
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                state = path.stat()
                found.append((path == newest, state.st_mtime, state.st_size, path))
        total = sum(size for *_, size, _ in found)
        for is_newest, _, size, path in sorted(found):
            if total > self.most_bytes and not is_newest:
                path.unlink(missing_ok=True)
                total -= size


def read_or_extract(
    cache: FeatureCache | None,
    key: str | None,
    images: Any,
    names: Sequence[Any],
    extract: Callable[[list[Any]], dict[Any, Tensor]],
) -> tuple[dict[Any, Tensor], bool]:
    """Return features by name, and whether all of them were stored.

    Args:
        cache: the cache; None: all features are extracted.
        key: see `feature_key`; None: nothing is stored.
        images: the images, a `LabeledImages` if there is a key. If all features were stored, its broken
            images are those of that time.
        names: names of the features.
        extract: extracts the features with the given names, from all images.
    """
    if cache is None or key is None:
        return extract(list(names)), False
    total = len(images) + len(images.broken_rows)
    read = {name: cache.read(key, name, total) for name in names}
    stored = {name: entry for name, entry in read.items() if entry is not None}
    if len({frozenset(entry.broken) for entry in stored.values()}) > 1:
        stored = {}  # a file could not be read when some of them were stored, so their images differ
    missing = _of_any_process([name for name in names if name not in stored])
    extracted = extract(missing) if missing else {}
    if missing:  # the stored features must belong to the same images
        rows, kept = images.broken_rows.keys(), stored.keys() - extracted.keys()
        others = _of_any_process(
            [name for name in names if name in kept and stored[name].broken.keys() != rows]
        )
        extracted |= extract(others) if others else {}
    for name, features in extracted.items() if is_first_on_machine() else ():
        cache.write(key, name, Entry(features, images.broken_rows))
    if not missing:
        images.omit_broken(next(iter(stored.values())).broken)
    found = {name: entry.features for name, entry in stored.items()} | extracted
    return {name: found[name] for name in names}, not missing


def _of_any_process(names: list[Any]) -> list[Any]:
    """Return the names of all processes that share the extraction, so that they extract the same features."""
    if not work_is_shared():
        return names
    return list(dict.fromkeys(name for process in from_every_process(names) for name in process))


def feature_key(
    encoder: str | None, processor: Any, images: Any, precision: str, device: torch.device
) -> str | None:
    """Return a text with everything that determines the features of a split, except for their names.

    Return None if something is not known: images without fingerprint, or an encoder or processor whose code
    may change.

    Args:
        encoder: see `encoder_fingerprint`.
        processor: the image processor.
        images: the labeled images of the split.
        precision: precision of the encoder.
        device: device of the encoder. Only its kind is part of the key.
    """
    data = images.fingerprint if isinstance(images, LabeledImages) else None
    if encoder is None or data is None or not isinstance(processor, BaseImageProcessor):
        return None
    if not _is_known(type(processor)):
        return None
    transforms = getattr(processor, "val_transforms", None)  # of timm; not in `to_dict`
    parts = {
        "format": FORMAT,
        "encoder": encoder,
        "processor": [_place(type(processor)), processor.to_dict(), repr(transforms)],
        "images": data,
        "precision": precision,
        "device": device.type,
        "libraries": {name: _version(name) for name in _LIBRARIES},
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):  # timm is optional
        return metadata.version(package)
    return None


def encoder_fingerprint(model: nn.Module, *settings: Any) -> str | None:
    """Return a hash of the code, the configuration and all weights of an encoder.

    Return None if the encoder contains code of the user, which may change without notice: modules or hooks
    from outside transformers, timm, torch and hf_ssl, or a `forward` that other code than hf_ssl replaced.

    Args:
        model: the encoder.
        settings: further values that determine its features.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    modules = list(model.modules())
    replaced = [vars(module)["forward"] for module in modules if "forward" in vars(module)]
    if not all(_is_own(forward) for forward in replaced):
        return None
    hooks = [
        hook
        for module in modules
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    if not all(map(_is_known, [*map(type, modules), *hooks])):
        return None
    config = {key: value for key, value in model.config.to_dict().items() if key not in _UNUSED}
    attention = getattr(model.config, "_attn_implementation", None)
    about = [[_place(type(module)) for module in modules], config, attention, settings]
    parts: list[Any] = [json.dumps(about, sort_keys=True, default=str).encode()]

    def weights() -> Iterable[Any]:
        yield parts[0]
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield _bytes(tensor)

    return _hash(weights())


_UNUSED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def _place(known: Any) -> str:
    return f"{known.__module__}.{known.__qualname__}"


def _is_known(code: Any) -> bool:
    """Return whether a class or function belongs to a library whose version determines its code."""
    return (getattr(code, "__module__", None) or type(code).__module__).split(".")[0] in _KNOWN_CODE


def _is_own(forward: Any) -> bool:
    """Return whether hf_ssl replaced a `forward`. `checkpoint_segments` does, and features stay equal."""
    return isinstance(forward, partial) and forward.func.__module__.startswith("hf_ssl.")


def _bytes(tensor: Tensor) -> Any:
    """Return the bytes of a tensor as an array, without a copy if it lies in the memory of the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _hash(parts: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def cached_features(
    config: EvaluationConfig,
    encoder: nn.Module,
    processor: Any,
    splits: Mapping[str, LabeledData],
    poolings: list[str],
    precision: str,
    device: torch.device,
    description: str | None,
) -> list[dict[str, Tensor]]:
    """Return the features of each split, from the cache if they are stored there.

    The processes of `joined_processes` share the extraction of the missing features.

    Args:
        splits: {"train" or "test": images}. Messages contain these names.
    """
    cache = FeatureCache.of(config)
    cached = [isinstance(images, LabeledImages) for images in splits.values()]
    fingerprint = None
    if cache is not None and any(cached):  # hashing the weights takes time
        if isinstance(encoder, PatchGrid):
            of_grid = (encoder.patch, encoder.stride, encoder.pooling)
            fingerprint = encoder_fingerprint(encoder.encoder, *of_grid)
        else:
            fingerprint = encoder_fingerprint(encoder)
    found = []
    for part, images in splits.items():
        words = None if description is None else f"{description}, {part} features"

        def extract(names: list[str], images: LabeledData = images, words: str | None = words) -> Any:
            def extract_batches(batches: Iterable[list[Tensor]]) -> dict[str, Tensor]:
                return extract_poolings(
                    encoder,
                    processor,
                    batches,
                    poolings=names,
                    device=device,
                    dtype=autocast_dtype(precision),
                    total=len(images),
                    description=words,
                    processes=process_count() if work_is_shared() else 1,
                )

            return extract_together(extract_batches, images, config.batch_size, names, device)

        key = feature_key(fingerprint, processor, images, precision, device)
        features, stored = read_or_extract(cache, key, images, poolings, extract)
        if stored and cache is not None and words is not None:
            notice(f"{words}: {len(images):,} images from the cache {cache.folder}")
        found.append(features)
    return found


def published_features(
    config: EvaluationConfig,
    encoder: nn.Module,
    processor: Any,
    splits: Mapping[str, LabeledData],
    device: torch.device,
    description: str | None,
) -> dict[str, Tensor]:
    """Return the evaluated feature (N, D) of each split, as `evaluate_encoder` extracts it."""
    first = next(iter(splits.values()))
    rule = inspect_encoder(encoder, processor, first.iter_batches(1), device).pooling
    pooling = rule if config.pooling == "auto" else config.pooling
    precision = chosen_precision(config, encoder, device)
    found = cached_features(config, encoder, processor, splits, [pooling], precision, device, description)
    return {part: features[pooling] for part, features in zip(splits, found, strict=True)}
