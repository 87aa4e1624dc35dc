# SPDX-License-Identifier: Apache-2.0
"""From a recipe's name, its file and the command line to plain nested values; nothing is typed or checked
here but sections."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hf_ssl.errors import UserError
from hf_ssl.recipe.sections import one_line, suggestion
from hf_ssl.resources import recipe_files

SECTIONS = ("method", "backbone", "data", "views", "training", "evaluation", "publish")
ENDINGS = (".yaml", ".yml")


def find_recipe(name_or_path: str) -> tuple[str, Path]:
    """Name and file of a recipe; raises `UserError` with the nearest name if there is none."""
    known = recipe_files()
    if name_or_path in known:
        return name_or_path, known[name_or_path]
    path = Path(name_or_path)
    if path.suffix in ENDINGS and path.is_file():
        return path.stem, path
    name = name_or_path.removesuffix(path.suffix) if path.suffix in ENDINGS else name_or_path
    what = "no such recipe file" if path.suffix in ENDINGS else "unknown recipe"
    hint = suggestion(name, known)
    hint += "" if hint.endswith("?") else "; hf-ssl recipes lists them"
    raise UserError(f"{what} {name_or_path}: {hint}")


def read_yaml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a recipe file; those that it does not have are empty."""
    try:
        tree = OmegaConf.create(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise UserError(f"{path}{_line(error)} is not valid YAML: {_problem(error)}") from error
    except OSError as error:
        raise UserError(f"cannot read recipe {path}: {error.strerror}") from error
    plain = OmegaConf.to_container(tree)
    if not isinstance(plain, dict):
        raise UserError(f"{path}: expected the sections {', '.join(SECTIONS)}, got {type(plain).__name__}")
    return _sections(plain, SECTIONS, str(path))


def apply_overrides(
    plain: dict[str, dict[str, Any]], overrides: Sequence[str], sections: Sequence[str] = SECTIONS
) -> dict[str, dict[str, Any]]:
    """`plain` with every `section.key=value` written into it; `section={...}` replaces the section."""
    tree = OmegaConf.create(plain)
    for override in overrides:
        key, equals, _ = override.partition("=")
        section, dot, rest = key.partition(".")
        if not equals or not section or not (dot or section in sections):
            raise UserError(
                f"expected section.key=value with a section of {', '.join(sections)}, got {override!r}"
            )
        if section not in sections:
            raise UserError(f"unknown section {section} in {override!r}: {suggestion(section, sections)}")
        _refuse_interpolation(override, key)
        try:
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            if not (rest if dot else OmegaConf.is_dict(value)):
                raise UserError(f"expected {section}.key=value or {section}={{key: value}}, got {override!r}")
            OmegaConf.update(tree, key, value, merge=False, force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"cannot read {override!r}: {_problem(error)}") from error
    changed: Any = OmegaConf.to_container(tree)
    return _sections(changed, sections, "the command")


def _sections(plain: dict[Any, Any], sections: Sequence[str], where: str) -> dict[str, dict[str, Any]]:
    """Every section as a dict; raises `UserError` for one that is unknown or holds something else."""
    for section, values in plain.items():
        if section not in sections:
            raise UserError(f"unknown section {section} in {where}: {suggestion(str(section), sections)}")
        if not isinstance(values, dict | None):
            raise UserError(f"{section} in {where}: expected keys and values, got {values!r}")
        _refuse_interpolation(values or {}, str(section))
    return {section: plain.get(section) or {} for section in sections}


def _refuse_interpolation(value: Any, key: str) -> None:
    """OmegaConf would fill in `${oc.env:HF_TOKEN}`; a stranger's recipe must not put our secrets on a
    card."""
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_interpolation(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            _refuse_interpolation(item, key)
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{key}: recipes have no interpolation, got {value!r}")


def _line(error: Exception) -> str:
    """ ", line 3" where a YAML error knows its place."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    return "" if mark is None else f", line {mark.line + 1},"


def _problem(error: Exception) -> str:
    """What a YAML error complains about, without the excerpt that it adds."""
    return str(error.problem) if isinstance(error, yaml.MarkedYAMLError) else one_line(error)
