# SPDX-License-Identifier: Apache-2.0
"""Reads a recipe file and overrides as plain nested values. It checks only the names of the sections."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hf_ssl.errors import UserError, check_name, one_line, suggestion
from hf_ssl.names import RENAMED_KEYS, warn_deprecated
from hf_ssl.recipe.texts import as_typed, holds_texts, typed_text
from hf_ssl.resources import recipe_files

SECTIONS = ("method", "backbone", "data", "views", "training", "evaluation", "publish")
ENDINGS = (".yaml", ".yml")
_REPLACES = {
    "training.learning_rate": ("base_learning_rate", "learning_rate_rule"),
    "training.base_learning_rate": ("learning_rate",),
    "training.warmup_steps": ("warmup_epochs",),
    "training.warmup_epochs": ("warmup_steps",),
    "training.num_train_epochs": ("max_steps",),
    "training.precision": ("bf16", "fp16"),
}
"""Key -> other keys of its section for this setting. The training arguments would use only one of them."""


def find_recipe(name_or_path: str) -> tuple[str, Path]:
    """Return the name and the file of a recipe.

    Raises:
        UserError: there is no such recipe. The message gives the most similar name.
    """
    known = recipe_files()
    if name_or_path in known:
        return name_or_path, known[name_or_path]
    path = Path(name_or_path)
    if path.suffix in ENDINGS and path.is_file():
        return path.stem, path
    name = name_or_path.removesuffix(path.suffix) if path.suffix in ENDINGS else name_or_path
    what = "an existing YAML file" if path.suffix in ENDINGS else "the name of a recipe"
    hint = suggestion(name, known)
    hint += "" if hint.endswith("?") else "; hf-ssl recipes lists them"
    raise UserError(f"recipe: expected {what}, got {name_or_path}; {hint}")


def read_yaml(
    path: Path, sections: Sequence[str] = SECTIONS, classes: Mapping[str, type] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe file, or of a file with other sections. Missing sections are empty.

    Args:
        path: the file.
        sections: names of the allowed sections.
        classes: the classes of sections that a recipe does not have. Their texts are kept as they are written
            (`hf_ssl.recipe.texts`).

    Raises:
        UserError: the file cannot be read, is not valid YAML, or contains something other than sections.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}{_line(error)}: expected valid YAML, got an error: {_problem(error)}"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: expected a readable recipe, got an error: {error.strerror}") from error
    plain = OmegaConf.to_container(tree)
    if not isinstance(plain, dict):
        raise UserError(f"{path}: expected the sections {', '.join(sections)}, got {type(plain).__name__}")
    return _sections(as_typed(plain, text, classes=classes), sections, str(path))


def is_overridden(overrides: Sequence[str], key: str) -> bool:
    """Return whether `section.key` is among the overrides `section.key=value` of the user."""
    section, _, name = key.partition(".")
    return name in apply_overrides({}, overrides)[section]


def apply_overrides(
    plain: dict[str, dict[str, Any]],
    overrides: Sequence[str],
    sections: Sequence[str] = SECTIONS,
    classes: Mapping[str, type] | None = None,
) -> dict[str, dict[str, Any]]:
    """Return `plain` with all overrides, and with the current names of renamed keys.

    The last override of a setting counts, also if several keys set it (`_REPLACES`). For example,
    `training.learning_rate=0.1` removes the key `training.base_learning_rate` of the recipe.

    Args:
        plain: the sections.
        overrides: `section.key=value`; `section={...}` replaces the section.
        sections: names of the allowed sections.
        classes: see `read_yaml`.

    Raises:
        UserError: an override has a wrong form or an unknown section.
    """
    tree = OmegaConf.create(plain)
    _replace_renamed(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, rest = key.partition(".")
        if not equals or not section or not (dot or section in sections):
            raise UserError(
                f"expected section.key=value with a section of {', '.join(sections)}, got {override!r}"
                + _advice(override, sections)
            )
        _reject_interpolation(override, key)
        try:
            value = _override_value(override, key, text, classes)
            if not (rest if dot else OmegaConf.is_dict(value)):
                raise UserError(f"expected {section}.key=value or {section}={{key: value}}, got {override!r}")
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
            _replace_renamed(tree)
            for other in _REPLACES.get(key, ()):
                tree[section].pop(other, None)
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{key}: expected a value in YAML, got {override!r}: {_problem(error)}"
            ) from error
    changed: Any = OmegaConf.to_container(tree)
    return _sections(changed, sections, "the command")


def _advice(override: str, sections: Sequence[str]) -> str:
    """Return the end of a message about an override of a wrong form: the text to type, if it is known."""
    key, equals, _ = override.partition("=")
    if equals:
        return f"; write SECTION.{override}" if key and "." not in key else ""
    if key.partition(".")[0] in sections:
        return f"; write {key}=VALUE without spaces"
    return f"; for images, write data.path={override}" if "data" in sections else ""


def _override_value(override: str, key: str, text: str, classes: Mapping[str, type] | None) -> Any:
    """Return the value of an override. A field that holds texts takes the text as it is typed."""
    typed = typed_text(text)
    if typed is not None and holds_texts(key, classes):
        return typed
    value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.create(as_typed(OmegaConf.to_container(value), text, key.split("."), classes))
    return as_typed(value, text, key.split("."), classes) if isinstance(value, int | float) else value


def _replace_renamed(tree: DictConfig) -> None:
    """Move the values of deprecated keys to their replacements, with a FutureWarning for each."""
    for old, new in RENAMED_KEYS.items():
        section, _, key = old.rpartition(".")
        values = OmegaConf.select(tree, section)
        if OmegaConf.is_dict(values) and key in values:
            warn_deprecated(f"{old} is deprecated; use {new}")
            OmegaConf.update(tree, new, values.pop(key), merge=False, force_add=True)


def _sections(plain: dict[Any, Any], sections: Sequence[str], where: str) -> dict[str, dict[str, Any]]:
    """Return every section as a dict.

    Raises:
        UserError: a section is unknown or contains something other than keys and values.
    """
    for section, values in plain.items():
        check_name(str(section), section, sections, f"a known section in {where}")
        if not isinstance(values, dict | None):
            raise UserError(f"{section}: expected keys and values in {where}, got {values!r}")
        _reject_interpolation(values or {}, str(section))
    return {section: plain.get(section) or {} for section in sections}


def _reject_interpolation(value: Any, key: str) -> None:
    """Raise `UserError` for a value with an interpolation, at any depth.

    OmegaConf would replace `${oc.env:HF_TOKEN}` by the token. A recipe from another author could then publish
    the user's secrets on a card.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            _reject_interpolation(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            _reject_interpolation(item, key)
    elif isinstance(value, str) and "${" in value:
        raise UserError(
            f"{key}: expected a value without interpolation, got {value!r}; write the value itself"
        )


def _line(error: Exception) -> str:
    """Return the line of a YAML error, for example ", line 3", or "" if the line is unknown."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return "" if mark is None else f", line {mark.line + 1}"


def _problem(error: Exception) -> str:
    """Return the problem of a YAML error without the excerpt of the file."""
    return str(error.problem) if isinstance(error, yaml.MarkedYAMLError) else one_line(error)
