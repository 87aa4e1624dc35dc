# SPDX-License-Identifier: Apache-2.0
"""Converts plain values to typed settings, and raises an error with one sentence for a mistake.

`as_setting` and `check_finite` apply to the values of all settings: sections of recipes, dataclasses and
training arguments in Python, and configs of methods.

OmegaConf checks our dataclasses, and `@strict` of huggingface_hub checks the configs of transformers. Their
messages do not contain the key, the expected type and the given value. So this module checks one key at a
time and writes the message itself. It imports OmegaConf only when a section is read, because that is slow.
"""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from enum import Enum, EnumType
from functools import lru_cache
from numbers import Real
from typing import Any, TypeVar

from hf_ssl.errors import UserError, check_keys, one_line
from hf_ssl.names import renamed_keys, warn_deprecated

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}
_TRUTH = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
MISSING = "???"  # OmegaConf's mark for a value that the user must give
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}

Section = TypeVar("Section")


def to_dataclass(cls: type, values: dict[str, Any], where: str) -> Any:
    """Return an instance of a dataclass.

    Args:
        cls: the dataclass.
        values: values of its fields.
        where: name of the section.

    Raises:
        UserError: a key is unknown or missing, or a value has the wrong type.
    """
    from omegaconf import OmegaConf

    config = _merged(cls, values, where)
    for key in OmegaConf.missing_keys(config):
        raise UserError(
            f"{where}.{key}: expected a value, got none; add {where}.{key}=VALUE to the command, or the key "
            "to the recipe"
        )
    return OmegaConf.to_object(config)


def as_section(cls: type[Section], given: Any, where: str) -> Section:
    """Return a new instance of a dataclass, with values of the right types, for an argument in Python.

    Args:
        cls: the dataclass. Its required fields may be missing.
        given: an instance, a dict of its fields, or None for the defaults.
        where: name of the section.

    Raises:
        UserError: `given` is something else, a key is unknown, or a value has the wrong type.
    """
    if isinstance(given, cls):
        given = {name: value for name, value in vars(given).items() if value != MISSING}
    elif not isinstance(given, Mapping | None):
        raise UserError(
            f"{where}: expected {cls.__name__} or a dict of its fields, got {type(given).__name__}; use "
            f"{cls.__name__}(...)"
        )
    values = dict(given or {})
    for old, new in renamed_keys(where).items():
        if old in values:
            warn_deprecated(f"{where}.{old} is deprecated; use {where}.{new}")
            values[new] = values.pop(old)
    return cls(**convert_values(cls, values, where))


def convert_values(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `values`, converted to the types of their fields as `as_setting` describes.

    Arguments and errors are those of `to_dataclass`, but no instance is created.
    """
    from omegaconf import OmegaConf

    config = _merged(cls, values, where)
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, list(values)))
    return plain


def _merged(cls: type, values: dict[str, Any], where: str) -> Any:
    """Return the OmegaConf config of a dataclass, after each value was merged into it separately."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.structured(cls)
    for path, value, annotation in _leaves(cls, values, where):
        options = (annotation, *typing.get_args(annotation))
        has_no = any(isinstance(enum, EnumType) and "NO" in enum.__members__ for enum in options)
        # YAML reads `no` as False
        nested = "no" if value is False and has_no else as_setting(value, annotation)
        key = ".".join((where, *path))
        check_finite(key, nested)
        if not _is_plain(nested, annotation):
            raise UserError(wrong_type(key, annotation, value))
        for name in reversed(path):
            nested = {name: nested}
        try:
            config.merge_with(nested)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise UserError(wrong_type(key, annotation, value)) from error
    return config


def _leaves(cls: type, values: dict[str, Any], where: str) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield the path, the value and the type annotation of every field in `values`, also in nested ones.

    Raises:
        UserError: `cls` does not have a key.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.init and not field.name.startswith("_")]
    check_keys(values, names, where)
    for name, value in values.items():
        inner = _dataclass_of(hints[name])
        if inner is not None and isinstance(value, dict):
            for path, leaf, annotation in _leaves(inner, value, f"{where}.{name}"):
                yield (name, *path), leaf, annotation
        else:
            yield (name,), value, hints[name]


def default_values(cls: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass by name, without the fields that have no default."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
        if field.default is not field.default_factory  # both are MISSING
    }


def _dataclass_of(annotation: Any) -> type | None:
    """Return the dataclass in an annotation such as `ViewOverrides | None`, or None."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and dataclasses.is_dataclass(option):
            return option
    return None


def transformers_config(cls: type, values: dict[str, Any], where: str, **parts: Any) -> Any:
    """Return an instance of a transformers config.

    `as_setting` converts the values, because `@strict` alone would raise an error for 1 as a float. An
    unknown key raises an error, although `PreTrainedConfig` accepts it without a message.

    Args:
        cls: the config class.
        values: values of a section of the recipe.
        where: name of the section.
        **parts: further values, from other sections of the recipe.

    Raises:
        UserError: a key is unknown, a value has the wrong type, or a validator of the class rejects it.
    """
    from huggingface_hub.errors import StrictDataclassError

    annotations = config_fields(cls, without=parts)
    check_keys(values, annotations, where)
    settings = {key: as_setting(value, annotations[key]) for key, value in values.items()}
    for key, value in settings.items():
        check_finite(f"{where}.{key}", value)
    try:
        return cls(**settings, **parts)
    except StrictDataclassError as error:
        field = re.search(r"error for field '(\w+)'", str(error))
        if field is not None and field[1] in values:
            sentence = wrong_type(f"{where}.{field[1]}", annotations[field[1]], values[field[1]])
            raise UserError(sentence) from error
        raise UserError(_prefixed(where, error.__cause__ or error)) from error
    except ValueError as error:
        raise UserError(_prefixed(where, error)) from error


def config_fields(cls: Any, without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the names and annotations of the fields of a transformers config that a recipe may set.

    The result omits the fields that every config inherits from `PreTrainedConfig`.
    """
    from transformers import PreTrainedConfig

    common = {field.name for field in dataclasses.fields(PreTrainedConfig)} | set(without)
    return {
        field.name: field.type
        for field in dataclasses.fields(cls)
        if field.name not in common and not field.name.startswith("_")
    }


def as_setting(value: Any, annotation: Any) -> Any:
    """Return a value, converted to the type of its field if this is possible without loss.

    - Field for numbers: 1 becomes 1.0, "1e-3" becomes 1e-3, and 4.0 and "4" become 4.
    - Field for true or false: 1, 0 and the words true, yes, on, false, no and off become True or False.
    - Field for text: 5 becomes "5", because YAML reads the text 5 as a number.


    Other values, and values of another type, stay as they are.

    Args:
        value: the value, or a list of values.
        annotation: the type of the field, or its source text.
    """
    if isinstance(value, list | tuple):
        return type(value)(as_setting(item, annotation) for item in value)
    kinds = _kinds(str(annotation))
    if kinds == {"bool"}:
        if isinstance(value, str):
            return _TRUTH.get(value.lower(), value)
        return bool(value) if isinstance(value, Real) and value in (0, 1) else value
    if isinstance(value, str) and kinds in ({"int"}, {"float"}):
        with suppress(ValueError):
            value = float(value)  # YAML reads 1e-3 as a text
    if isinstance(value, Real) and not isinstance(value, bool):
        if "float" in kinds and "int" not in kinds:
            return float(value)
        if kinds == {"int"} and not isinstance(value, int) and float(value).is_integer():
            return int(float(value))
        if kinds == {"str"} and math.isfinite(value):
            return str(value)
    return value


@lru_cache
def _kinds(annotation: str) -> frozenset[str]:
    """Return the names of the plain types in the source text of an annotation."""
    return frozenset(re.findall(r"\w+", annotation)) & {"int", "float", "str", "bool", "dict"}


def check_finite(key: str, value: Any) -> None:
    """Raise UserError for a setting that is, or contains at any depth, an infinite number or NaN."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            check_finite(f"{key}.{name}", item)
    elif isinstance(value, list | tuple):
        for item in value:
            check_finite(key, item)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}: expected a finite number, got {value}")


def _is_plain(value: Any, annotation: Any) -> bool:
    """Return whether a value needs no conversion that only OmegaConf makes (5 to True, True to "True")."""
    kinds = _kinds(str(annotation))
    items = value if isinstance(value, list | tuple) else [value]
    if kinds == {"bool"}:
        return all(isinstance(item, bool | None) for item in items)
    return kinds != {"str"} or not any(isinstance(item, bool) for item in items)


def _prefixed(where: str, error: BaseException) -> str:
    """Return the message of a validator. The section comes first, unless the message contains its key."""
    sentence = one_line(error)
    return sentence if sentence.startswith((f"{where}.", f"{where}:")) else f"{where}: {sentence}"


def wrong_type(key: str, annotation: Any, value: Any) -> str:
    """Return the message about a value with the wrong type."""
    return f"{key}: expected {describe(annotation)}, got {value!r}"


def describe(annotation: Any) -> str:
    """Return a type in plain English, for example "2 numbers" for `tuple[float, float]`."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        options = sorted(arguments, key=lambda option: option is types.NoneType)
        return " or ".join(dict.fromkeys(describe(option) for option in options))
    if origin in (list, tuple):
        items = _PLURALS.get(arguments[0], "values")
        return (
            f"{len(arguments)} {items}" if origin is tuple and ... not in arguments else f"a list of {items}"
        )
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(str(member.value) for member in annotation)
    if dict in (origin, annotation) or dataclasses.is_dataclass(annotation):
        return "a mapping of keys to values"
    return str(annotation)
