# SPDX-License-Identifier: Apache-2.0
"""Reads a sweep, a grid of settings with several seeds, from the command or from a study file (layer 5).

A study is a YAML file with the sections `study`, `settings`, `grid` and `arms`. `Study` and `Arm` explain the
keys. `settings` are overrides for all runs. `grid` contains lists of values. Each arm is trained with each
combination of these values.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hf_ssl.data.config import MISSING, DataConfig
from hf_ssl.effects import NOTHING, effect
from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.recipe import Recipe, load_recipe
from hf_ssl.recipe.source import ENDINGS, apply_overrides, read_yaml
from hf_ssl.resources import recipe_files, study_files
from hf_ssl.sections import to_dataclass
from hf_ssl.views.preset import ViewPreset

SECTIONS = ("study", "settings", "grid", "arms")
_LONGEST = 120  # characters of the name of a folder
_OWN = {"training.seed": "--seeds", "training.output_dir": "--output"}
"""Key that each run sets itself -> the option in its place."""


@dataclass
class Study:
    """The section `study`.

    Attributes:
        title: heading of the page.
        question: what the study asks, with its source.
        recipe: recipe of all runs, unless an arm has its own.
        seeds: number of seeds, which are 0, 1, ...; `--seeds` replaces it.
    """

    title: str = MISSING
    question: str = MISSING
    recipe: str | None = None
    seeds: int = 1


@dataclass
class Arm:
    """A value of the section `arms`.

    Attributes:
        recipe: recipe of the runs of this arm; null: `study.recipe`.
        settings: {"section.key": value} for the runs of this arm.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        arm: name of the arm; "" if there are no arms.
        values: {"section.key": value} of the grid.
        seed: the seed.
        recipe: name or file of the recipe.
        overrides: all overrides of the recipe.
    """

    arm: str
    values: dict[str, Any]
    seed: int
    recipe: str
    overrides: list[str]

    @property
    def name(self) -> str:
        """The arm and the values: "BYOL, batch_size 64"."""
        values = [f"{key.rpartition('.')[2]} {_written(value)}" for key, value in self.values.items()]
        return ", ".join(filter(None, [self.arm, *values])) or Path(self.recipe).stem

    def folder(self, output: Path) -> Path:
        """Return the output folder of the run."""
        name = "".join(each if each.isalnum() or each in ".-" else "_" for each in self.name)
        if len(name) > _LONGEST:
            name = f"{name[:_LONGEST]}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"
        return output / name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        title, question: see `Study`; the question is "" for a sweep of the command.
        axes: {"section.key": values} of the grid.
        runs: all runs, in their order: all seeds of the first combination come first.
        plan: {arm: its settings without the grid}, for the check of an existing folder.
    """

    title: str
    question: str
    axes: dict[str, list[Any]]
    runs: list[Run]
    plan: dict[str, Any]

    def run(self, number: int) -> Run:
        """Return a run by its number, from 1."""
        if not 1 <= number <= len(self.runs):
            raise UserError(
                f"--job: expected a number from 1 to {len(self.runs)}, got {number}; use --list-jobs"
            )
        return self.runs[number - 1]


def load_sweep(name: str, overrides: Sequence[str] = (), seeds: int | None = None) -> Sweep:
    """Return a sweep.

    Args:
        name: a recipe, or a study: a name of `training/studies`, or a YAML file with the section `study`.
        overrides: `section.key=value` for all runs. A list of values for a key that takes one value is an
            axis of the grid, and so is a list of lists for a key that takes a list.
        seeds: number of seeds; None: 1, or that of the study.

    Raises:
        UserError: the recipe or the study does not exist, a key or a value is wrong in any run, a list is
            empty, or the grid and the arms contain a single combination.
    """
    study, settings, grid, arms = _parts(name)
    count = study.seeds if seeds is None else seeds
    if count < 1:
        raise UserError(f"--seeds: expected a positive number, got {count}")
    recipes = {arm: _recipe_of(arm, each, study) for arm, each in arms.items()}
    first = next(iter(arms))
    lists = {text: value for text in overrides if isinstance(value := _value(text), list)}
    # A recipe may need a value that only an axis has, such as data.path=[one,two].
    some = [f"{_key(text)}={_quoted(value[0])}" for text, value in lists.items() if value]
    own = [*_texts(settings), *_texts(arms[first].settings)]
    own += _texts({key: values[0] for key, values in grid.items() if values})
    base = _base(recipes[first], own, [text for text in overrides if text not in lists], some)
    fixed: list[str] = []
    for text in overrides:  # as in other commands, the last one of equal keys counts
        key = _key(text)
        grid.pop(key, None)
        fixed = [each for each in fixed if _key(each) != key]
        # A list is an axis if the recipe expects a single value for this key.
        if text in lists and (not takes_list(base, key) or _are_lists(lists[text])):
            grid[key] = lists[text]
        else:
            fixed.append(text)
    _check_axes(grid, [*_texts(settings), *fixed], arms)
    plan: dict[str, Any] = {}
    runs: list[Run] = []
    baselines: set[str] = set()
    for arm, each in arms.items():
        for combination in itertools.product(*grid.values()):
            chosen = dict(zip(grid, combination, strict=True))
            own = [*_texts(settings), *_texts(each.settings), *_texts(chosen), *fixed]
            recipe = load_recipe(recipes[arm], own)  # reports mistakes before the first run
            plan.setdefault(arm, _settings(recipe, grid))
            key = _baseline(recipe)
            for seed in range(count):
                is_first = key not in baselines
                baselines.add(key)
                more = (
                    [] if _sets(own, "evaluation.baselines") or is_first else ["evaluation.baselines=false"]
                )
                runs.append(Run(arm, chosen, seed, recipes[arm], [*own, *more, f"training.seed={seed}"]))
    _check_folders(runs)
    return Sweep(study.title, study.question, grid, runs, plan)


def _parts(name: str) -> tuple[Study, dict[str, Any], dict[str, list[Any]], dict[str, Arm]]:
    """Return the sections of a study file, or those of a study with only a recipe."""
    known = study_files()
    path = known.get(name, Path(name))
    is_file = path.suffix in ENDINGS and path.is_file()
    if name not in known and not (is_file and _is_study(path)):
        if name not in recipe_files() and not is_file:
            check_name("sweep", name, [*recipe_files(), *known], "a recipe, a study or a YAML file")
        return Study(f"Sweep of {Path(name).stem}", "", name), {}, {}, {"": Arm()}
    plain = read_yaml(path, SECTIONS)
    study = to_dataclass(Study, plain["study"], "study")
    arms = {str(arm): to_dataclass(Arm, of or {}, f"arms.{arm}") for arm, of in plain["arms"].items()}
    for key, values in plain["grid"].items():
        if not isinstance(values, list):
            raise UserError(f"grid.{key}: expected a list of values in {path}, got {values!r}")
    return study, plain["settings"], dict(plain["grid"]), arms or {"": Arm()}


def _recipe_of(name: str, arm: Arm, study: Study) -> str:
    recipe = arm.recipe or study.recipe
    if recipe is None:
        raise UserError(
            f"study.recipe: expected a recipe for the arm {name!r}, got none; add arms.{name}.recipe"
        )
    return recipe


def _check_axes(grid: Mapping[str, list[Any]], fixed: Sequence[str], arms: Mapping[str, Arm]) -> None:
    """Raise UserError for an empty or repeated axis, for keys that runs set, and for a single combination."""
    for key, values in grid.items():
        texts = [json.dumps(value, sort_keys=True) for value in values]
        if not values or len(set(texts)) < len(texts):
            raise UserError(f"{key}: expected one or more different values, got {values}")
    if len(arms) == 1 and not grid:
        raise UserError(
            "sweep: expected a list of values for at least one key, got none; add, for example, "
            "training.batch_size=[64,128,256]"
        )
    texts = [*fixed, *(text for arm in arms.values() for text in _texts(arm.settings))]
    given = apply_overrides({}, texts)
    for key, option in _OWN.items():
        section, _, name = key.partition(".")
        if key in grid or name in given[section]:
            raise UserError(f"{key}: expected no value, because each run has its own, got one; use {option}")


def _is_study(path: Path) -> bool:
    """Return whether a YAML file has the section `study`. `read_yaml` reports mistakes later."""
    with suppress(yaml.YAMLError, OmegaConfBaseException):
        tree = OmegaConf.create(path.read_text(encoding="utf-8", errors="replace"))
        return OmegaConf.is_dict(tree) and "study" in tree
    return False


def _base(recipe: str, own: list[str], fixed: list[str], some: list[str]) -> Recipe:
    """Return the recipe of the first arm, which shows which keys take a list.

    Args:
        recipe: name or file.
        own: the settings of the study and of the arm.
        fixed: the settings of the command.
        some: the first value of each list of the command. They are used only if the recipe needs them.
    """
    try:
        return load_recipe(recipe, [*own, *fixed])
    except UserError:
        return load_recipe(recipe, [*own, *fixed, *some])


def _are_lists(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(each, list) for each in values)


def _settings(recipe: Recipe, grid: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that change weights or numbers, without the keys of the grid.

    The whole path of the data is a hash, because the file of the sweep may be published.
    """
    found: dict[str, Any] = {}
    for section, values in recipe.to_dict().items():
        for key, value in values.items() if isinstance(values, dict) else ():
            name = f"{section}.{key}"
            given = any(each == name or each.startswith(f"{name}.") for each in grid)
            if not given and section not in grid and effect(name) != NOTHING and name not in _OWN:
                found[name] = value
    for name in ("data.path", "evaluation.path", "backbone.init_from"):
        if found.get(name) is not None:
            place = os.path.abspath(found[name]) if os.path.exists(found[name]) else str(found[name])
            found[name] = f"{Path(place).name} ({hashlib.sha256(place.encode()).hexdigest()[:8]})"
    return found


def _check_folders(runs: Sequence[Run]) -> None:
    """Raise UserError if two runs would have the same folder, or a folder outside of the output folder."""
    found: dict[str, Run] = {}
    for run in runs:
        place = str(run.folder(Path())).casefold()
        if place in found or Path(place).parent.name in ("", ".."):
            raise UserError(
                f"arms: expected names that differ in letters and digits, got {run.name!r} and "
                f"{found.get(place, run).name!r}; rename an arm"
            )
        found[place] = run


def takes_list(recipe: Recipe, key: str) -> bool:
    """Return whether a recipe expects a list or a mapping for `section.key`.

    The current value decides. If it is null, the declared type of the field does.
    """
    section, _, name = key.partition(".")
    value = recipe.to_dict().get(section, {})
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is not None:
        return isinstance(value, list | tuple | dict)
    from hf_ssl.trainer.arguments import SSLTrainingArguments

    classes: dict[str, Any] = {
        "data": DataConfig, "views": ViewPreset, "training": SSLTrainingArguments,
        "evaluation": EvaluationConfig, "method": recipe.config_class,
    }  # fmt: skip
    if section not in classes:
        return False
    types = {item.name: str(item.type) for item in fields(classes[section])}
    return any(word in types.get(name, "") for word in ("list", "tuple", "Sequence", "dict"))


def _key(override: str) -> str:
    return override.partition("=")[0]


def _value(override: str) -> Any:
    """Return the value of an override `section.key=value` in YAML; None for a whole section."""
    section, dot, name = _key(override).partition(".")
    found: Any = apply_overrides({}, [override], (section,))[section] if dot else None
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _texts(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as overrides."""
    return [f"{key}={_quoted(value)}" for key, value in settings.items()]


def _quoted(value: Any) -> str:
    """Return a value in YAML. JSON is YAML, and keeps texts such as "off" and "1"."""
    return json.dumps(value, ensure_ascii=False)


def _written(value: Any) -> str:
    """Return a value for readers."""
    return value if isinstance(value, str) else _quoted(value)


def _sets(overrides: Sequence[str], key: str) -> bool:
    return key in map(_key, overrides)


def _baseline(recipe: Recipe) -> str:
    """Return a text that is equal for runs whose baselines, random weights and raw pixels, are equal."""
    plain = recipe.to_dict()
    views = {key: plain["views"].get(key) for key in ("size", "enlarge", "mean", "std", "interpolation")}
    # CMC divides the encoder into narrow ones.
    method = recipe.method["name"] if recipe.model_class.takes_image_columns else ""
    parts = [method, plain["backbone"], plain["data"], views, plain["evaluation"]]
    return json.dumps(parts, sort_keys=True, default=str)
