# SPDX-License-Identifier: Apache-2.0
"""Reads the tensors of a checkpoint without running code that the file contains."""

import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hf_ssl.errors import UserError, first_line

StateDict = dict[str, Tensor]
_DEEPEST = 6
_MOST_CLASSES = 100
_CLASS = re.compile(r"GLOBAL (\S+)")
_DAMAGED = ("unexpected EOF", "central directory", "corrupted", "Ran out of input", "underflow")
_TAR = 257  # position of the word "ustar"
_UNPACK = "unpack it, and convert the file in it"
_SAVE = "load it with the code that wrote it, and save the state dict of the model with torch.save"
_OTHER_FILES: list[tuple[bytes | str, str, str]] = [
    (b"\x1f\x8b", "a gzip file", _UNPACK),
    (b"\x93NUMPY", "an array of NumPy", _SAVE),
    (b"\x89HDF", "an HDF5 file", _SAVE),
    (r"\.msgpack$", "weights of Flax", _SAVE),
    (r"\.(index|meta|data-\d+-of-\d+)$", "a part of a checkpoint of TensorFlow", _SAVE),
    (b"version https://git-lfs", "a pointer of Git LFS", "run git lfs pull"),
    (b"{", "a JSON file", "use the file with the weights"),
    (b"<", "a web page", "download the checkpoint again"),
]
"""Start of the bytes, or the pattern of the file name -> what the file is, and what the user can do."""


class _Unread:
    """Stands for an object of a class that is not loaded. It ignores all values that the file gives it.

    Many full checkpoints contain such objects beside the weights: the arguments of the training, functions of
    the optimizer, or numbers of NumPy.
    """

    def __new__(cls, *values: Any) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(file: Path, entry: str) -> Mapping[str, Any]:
    """Return the content of a file of `torch.save` or safetensors: dicts of tensors and plain values.

    `torch.load` gets `weights_only=True`, so no code of the file runs. Empty objects (`_Unread`) replace the
    objects of other classes. Large files are read on demand.

    Args:
        file: the checkpoint.
        entry: keys of the dict with the weights, for messages: "state_dict".

    Raises:
        UserError: the file is missing, is damaged, is another file, or has only weights in such objects.
    """
    if file.is_dir():
        command = shlex.join(["hf-ssl", "evaluate", str(file)])
        raise UserError(f"{file}: expected a file, got a folder; an encoder needs only {command}")
    try:
        with file.open("rb") as stream:
            start = stream.read(_TAR + 5)
    except OSError as error:
        raise UserError(
            f"{file}: expected a readable file, got an error ({error.strerror}); check the path"
        ) from error
    if start[8:9] == b"{" or file.suffix == ".safetensors":
        return _read_safetensors(file)
    is_zip = zipfile.is_zipfile(file)
    _check_kind(file, start, is_zip)
    content = _loaded(file, entry, is_zip)
    if isinstance(content, _Unread):
        raise _object_error(file, type(content).__name__, ".state_dict()")
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise UserError(
            f"{file}: expected a dict of tensors, got a {type(content).__name__}; save a state dict instead"
        )
    objects = {key: value for key, value in content.items() if isinstance(value, _Unread)}
    if objects and not state_dicts(content):
        key, value = next(iter(objects.items()))
        raise _object_error(file, type(value).__name__, f"[{key!r}].state_dict()")
    return content


def _check_kind(file: Path, start: bytes, is_zip: bool) -> None:
    """Raise UserError for a file that `torch.save` did not write, with the next step."""
    kind = "an empty file" if not start else "another file"
    advice = "download the checkpoint again"
    if start.startswith((b"PK", b"\x80")):
        if start.startswith(b"PK") and not is_zip:
            raise _damaged(file)
        try:
            names = zipfile.ZipFile(file).namelist() if is_zip else []
        except zipfile.BadZipFile as error:
            raise _damaged(file) from error
        if not is_zip or any(name.endswith("data.pkl") for name in names):
            return
        is_arrays = all(name.endswith(".npy") for name in names)
        kind, advice = ("arrays of NumPy", _SAVE) if is_arrays else ("a zip archive", _UNPACK)
    elif start[_TAR:] == b"ustar":
        kind, advice = "a tar archive", _UNPACK
    for mark, name, step in _OTHER_FILES:
        found = start.startswith(mark) if isinstance(mark, bytes) else re.search(mark, file.name)
        if found:
            kind, advice = name, step
    raise UserError(f"{file}: expected a file of torch.save, got {kind}; {advice}")


def _loaded(file: Path, entry: str, is_zip: bool) -> Any:
    """Return the content of a file of `torch.save`, with `_Unread` for classes that torch does not allow."""
    classes: dict[str, Any] = {}
    while True:
        unread: Any = [(cls, name) for name, cls in classes.items()]
        try:
            with torch.serialization.safe_globals(unread), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the protocol of a pickle
                return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        except Exception as error:  # torch raises many types for damaged and other files
            found = _CLASS.search(str(error))
            # torch allows no name of some modules, such as `os`, and no items of another class than a dict.
            if found is None or found[1] in classes or len(classes) == _MOST_CLASSES:
                name = next(iter(classes), None)
                raise _load_error(file, error, name, entry) from error
            classes[found[1]] = type(found[1], (_Unread,), {})


def _read_safetensors(file: Path) -> StateDict:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: expected a complete safetensors file, got: {first_line(error)}; download it again"
        ) from error


def _damaged(file: Path) -> UserError:
    return UserError(
        f"{file}: expected a complete file, got a damaged one of {file.stat().st_size:,} bytes; download it "
        "again"
    )


def _load_error(file: Path, error: Exception, name: str | None, entry: str) -> UserError:
    """Return the message for an error of `torch.load`; `name` is the class that it did not load, if any."""
    if name is not None:
        return _object_error(file, name, "".join(f"[{key!r}]" for key in entry.split("/") if key))
    text = str(error)
    if isinstance(error, EOFError) or any(word in text for word in _DAMAGED):
        return _damaged(file)
    kind = "a TorchScript archive" if "TorchScript" in text else "another file"
    if isinstance(error, pickle.UnpicklingError):
        kind = "another pickle"
    return UserError(
        f"{file}: expected a file of torch.save with tensors, got {kind}; save the state dict of the model"
    )


def _object_error(file: Path, name: str, keys: str) -> UserError:
    """Return the message for a file whose weights need the class `name`, and Python code that saves them."""
    return UserError(
        f"{file}: expected tensors in dicts, got {name}, which could run code; only if you trust the file, "
        'save its weights: python -c "import torch; torch.save(torch.load('
        f"{str(file)!r}, weights_only=False){keys}, 'weights.pth')\""
    )


def state_dicts(content: Mapping[str, Any]) -> dict[str, StateDict]:
    """Return {its keys: dict of tensors} at any depth. The keys are "" for the file itself, or "a/b"."""
    found: dict[str, StateDict] = {}

    def visit(values: Mapping[Any, Any], path: tuple[str, ...]) -> None:
        tensors = {
            key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, Tensor)
        }
        if tensors:
            found["/".join(path)] = tensors
        for key, value in values.items():
            if isinstance(key, str) and isinstance(value, Mapping) and len(path) < _DEEPEST:
                visit(value, (*path, key))

    visit(content, ())
    return found
