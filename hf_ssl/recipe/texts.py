# SPDX-License-Identifier: Apache-2.0
"""Keeps texts as they are typed: YAML reads 2024_05_01 and 007 as numbers, 12:30 as 750, and `on` as true.

A field that holds only texts takes the text itself. Fields that also accept numbers, or true and false, take
the value that YAML reads. In these fields, a number in base 8 or 60 is an error: YAML reads 0100 as 64 and
1:30 as 90.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

import yaml

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.recipe.publish import PublishConfig
from hf_ssl.views.preset import ViewPreset

_CLASSES = {"data": DataConfig, "views": ViewPreset, "evaluation": EvaluationConfig, "publish": PublishConfig}
_NAMES = {"method": ("name",), "backbone": ("model_type", "init_from")}
_NAMED = ("arms", "groups", "entries")  # sections that contain {name: keys}
_YAML_STARTS = ("[", "{", '"', "'")
_LOADER = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # OmegaConf uses libyaml too, which accepts more
_OCTAL = re.compile(r"[-+]?0[0-7_]+")
_NULL = ("", "~", "null", "Null", "NULL")


def holds_texts(key: str, classes: Mapping[str, type] | None = None) -> bool:
    """Return whether a key such as `data.name` takes only texts: one, a list of texts, or texts by name.

    Args:
        key: the key with its section. In suites and studies, it begins with the place of the section, as in
            `entries.flowers.data.name` or `arms.large.settings.data.name`.
        classes: {section: its class} of the further sections of suites and studies.
    """
    section, *path = key.split(".")
    if section in ("settings", "grid"):
        return holds_texts(".".join(path), classes)
    if section in _NAMED and len(path) > 1:
        if path[1] in ("data", "evaluation", "settings"):
            return holds_texts(".".join(path[1:]), classes)
        path = path[1:]
    if section in _NAMES:
        return len(path) == 1 and path[0] in _NAMES[section]
    cls = _class_of(section, path, classes or {})
    while cls is not None and path:
        annotation = _hints(cls).get(path.pop(0))
        if not path or _is_mapping(annotation):
            return _is_text(annotation)
        cls = next((each for each in _options(annotation) if dataclasses.is_dataclass(each)), None)
    return False


def typed_text(text: str) -> str | None:
    """Return the text of a value on the command line; None if YAML must read it: quotes, a list, or null."""
    text = text.strip()
    return None if text in _NULL or text.startswith(_YAML_STARTS) else text


def as_typed(
    value: Any, text: str, where: Sequence[str] = (), classes: Mapping[str, type] | None = None
) -> Any:
    """Return a value that YAML read, with the texts of the fields that hold texts.

    Args:
        value: the value.
        text: its YAML.
        where: the keys that lead to the value.
        classes: see `holds_texts`.

    Raises:
        UserError: a field for numbers has a number in base 8 or 60.
    """
    return _replaced(value, yaml.load(text, _LOADER), tuple(where), classes)


def _replaced(value: Any, written: Any, path: tuple[str, ...], classes: Mapping[str, type] | None) -> Any:
    """Return `value` with some items of `written`, which has the same form and contains only texts."""
    same = isinstance(value, dict | list) and isinstance(written, type(value)) and len(value) == len(written)
    if same and isinstance(value, dict):
        pairs = zip(value.items(), written.items(), strict=True)
        keyed = ((key if isinstance(key, str) else text, item, of) for (key, item), (text, of) in pairs)
        return {key: _replaced(item, of, (*path, key), classes) for key, item, of in keyed}
    if same:
        return [_replaced(item, of, path, classes) for item, of in zip(value, written, strict=True)]
    if not isinstance(value, bool | int | float) or not isinstance(written, str):
        return value
    key = ".".join(path)
    if holds_texts(key, classes):
        return written
    if ":" in written or (_OCTAL.fullmatch(written) and value != int(written)):
        raise UserError(
            f"{key}: expected a decimal number, got {written}, which YAML reads as {value}; write it without "
            "a leading zero or a colon"
        )
    return value


def _class_of(section: str, path: list[str], classes: Mapping[str, type]) -> Any:
    """Return the class of a section, or of the settings of a protocol, whose path is then shortened."""
    if section == "training":  # imported here, because it imports torch
        from hf_ssl.trainer.arguments import SSLTrainingArguments

        return SSLTrainingArguments
    if section == "evaluation" and path[:1] == ["settings"] and len(path) > 2:
        from hf_ssl.evaluation.protocols import PROTOCOLS, load_protocol

        name = path[1]
        del path[:2]
        return load_protocol(name).Config if name in PROTOCOLS else None
    return classes.get(section, _CLASSES.get(section))


@lru_cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _options(annotation: Any) -> tuple[Any, ...]:
    return (annotation, *typing.get_args(annotation))


def _is_mapping(annotation: Any) -> bool:
    return any(dict in (each, typing.get_origin(each)) for each in _options(annotation))


def _is_text(annotation: Any) -> bool:
    """Return whether an annotation contains only texts, such as `str | None` or `list[str]`.

    Choices that are enumerations do not count, because YAML may write "no" as false there.
    """
    items = [each for each in typing.get_args(annotation) if each not in (types.NoneType, ...)]
    if typing.get_origin(annotation) is not None or isinstance(annotation, types.UnionType):
        return bool(items) and all(map(_is_text, items))
    return isinstance(annotation, type) and issubclass(annotation, str) and not issubclass(annotation, Enum)
