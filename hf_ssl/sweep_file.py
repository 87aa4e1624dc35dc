# SPDX-License-Identifier: Apache-2.0
"""Reads a sweep, a grid of settings with several seeds, from the command or from a study file (layer 5).

A study is a YAML file with the sections `study`, `settings`, `grid` and `arms`. `Study` and `Arm` explain the
keys. `settings` are overrides for all runs. `grid` contains lists of values. Each arm is trained with each
combination of these values.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_ssl.data.config import MISSING, DataConfig
from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.recipe import Recipe, load_recipe
from hf_ssl.recipe.source import ENDINGS, apply_overrides, read_yaml
from hf_ssl.resources import recipe_files, study_files
from hf_ssl.sections import to_dataclass
from hf_ssl.views.preset import ViewPreset

SECTIONS = ("study", "settings", "grid", "arms")
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
        return output / name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        title, question: see `Study`; the question is "" for a sweep of the command.
        axes: {"section.key": values} of the grid.
        runs: all runs, in their order: all seeds of the first combination come first.
        plan: the settings that all runs share, for the check of an existing folder.
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
    # A list in an override is an axis if the recipe expects a single value for this key.
    lists = [text for text in overrides if _value(text).__class__ is list]
    fixed = _texts(settings) + [text for text in overrides if text not in lists]
    base = load_recipe(recipes[first], [*fixed, *_texts(arms[first].settings)])
    for text in lists:
        key, values = text.partition("=")[0], _value(text)
        if takes_list(base, key) and not (values and all(isinstance(each, list) for each in values)):
            fixed.append(text)
        else:
            grid[key] = values
    _check_axes(grid, fixed, arms)
    shared = {
        "recipes": recipes,
        "overrides": fixed,
        "arms": {arm: each.settings for arm, each in arms.items()},
    }
    runs = []
    baselines: set[str] = set()
    for arm, each in arms.items():
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            own = [*fixed, *_texts(each.settings), *_texts(chosen)]
            key = _baseline(load_recipe(recipes[arm], own))  # reports mistakes before the first run
            for seed in range(count):
                is_first = key not in baselines
                baselines.add(key)
                more = (
                    [] if _sets(own, "evaluation.baselines") or is_first else ["evaluation.baselines=false"]
                )
                runs.append(Run(arm, chosen, seed, recipes[arm], [*own, *more, f"training.seed={seed}"]))
    return Sweep(study.title, study.question, grid, runs, shared)


def _parts(name: str) -> tuple[Study, dict[str, Any], dict[str, list[Any]], dict[str, Arm]]:
    """Return the sections of a study file, or those of a study with only a recipe."""
    known = study_files()
    path = known.get(name, Path(name))
    is_file = path.suffix in ENDINGS and path.is_file()
    if name not in known and not (is_file and "study:" in path.read_text(encoding="utf-8", errors="replace")):
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
    given = {
        *grid,
        *(text.partition("=")[0] for text in fixed),
        *(key for arm in arms.values() for key in arm.settings),
    }
    for key, option in _OWN.items():
        if key in given:
            raise UserError(f"{key}: expected no value, because each run has its own, got one; use {option}")


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


def _value(override: str) -> Any:
    """Return the value of an override in YAML."""
    section, _, rest = override.partition(".")
    key = rest.partition("=")[0]
    found: Any = apply_overrides({}, [override], (section,))[section] if key else None
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _texts(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as overrides. JSON is YAML."""
    return [f"{key}={_written(value)}" for key, value in settings.items()]


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sets(overrides: Sequence[str], key: str) -> bool:
    return any(text.partition("=")[0] == key for text in overrides)


def _baseline(recipe: Recipe) -> str:
    """Return a text that is equal for runs whose baselines, random weights and raw pixels, are equal."""
    plain = recipe.to_dict()
    views = {key: plain["views"].get(key) for key in ("size", "enlarge", "mean", "std", "interpolation")}
    return json.dumps(
        [plain["backbone"], plain["data"], views, plain["evaluation"]], sort_keys=True, default=str
    )
