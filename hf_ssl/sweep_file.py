# SPDX-License-Identifier: Apache-2.0
"""Reads a sweep, a grid of settings with several seeds, from the command or from a study file (layer 5).

A study is a YAML file with the sections `study`, `settings`, `grid` and `arms`. `Study` and `Arm` explain the
keys. `settings` are overrides for all runs. `grid` contains lists of values. Each arm runs with each
combination of these values. Keys without an effect on an arm are left out, such as `training.max_steps` for
an arm that only evaluates an encoder.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hf_ssl.cards.text import quoted, written
from hf_ssl.data.config import DataConfig
from hf_ssl.effects import NOTHING, effect
from hf_ssl.errors import UserError, check_keys, check_name
from hf_ssl.evaluation.config import MEASUREMENTS, EvaluationConfig
from hf_ssl.recipe import Recipe, load_recipe
from hf_ssl.recipe.source import ENDINGS, apply_overrides, read_yaml
from hf_ssl.resources import recipe_files, study_files
from hf_ssl.sections import to_dataclass
from hf_ssl.study import (
    EVALUATE,
    PRETRAIN,
    SUPERVISE,
    Arm,
    Run,
    Study,
    Sweep,
    check_arm,
    has_effect,
    hashed,
    key_of,
    keys_of_arm,
    overrides_of_arms,
    start_of,
)  # fmt: skip
from hf_ssl.views.preset import ViewPreset

SECTIONS = ("study", "settings", "grid", "arms")
_OWN = {"training.seed": "--seeds", "training.output_dir": "--output"}
"""Key that each run sets itself -> the option to use instead."""


def load_sweep(name: str, overrides: Sequence[str] = (), seeds: int | None = None) -> Sweep:
    """Return a sweep.

    Args:
        name: a recipe, or a study: a name of `training/studies`, or a YAML file with the section `study`.
        overrides: `section.key=value` for all runs. A list of values for a key that takes one value is an
            axis of the grid, and so is a list of lists for a key that takes a list. `arms.NAME.section.key`
            sets a value for one arm, and `arms.NAME.encoder` its encoder.
        seeds: number of seeds; None: 1, or that of the study.

    Raises:
        UserError: the recipe or the study does not exist, a key or a value is wrong in any run, a list is
            empty, or the grid and the arms contain a single combination.
    """
    study, settings, grid, arms = _parts(name)
    last = overrides_of_arms(arms, [text for text in overrides if text.startswith("arms.")])
    overrides = [text for text in overrides if not text.startswith("arms.")]
    count = study.seeds if seeds is None else seeds
    if count < 1:
        key = "--seeds" if seeds is not None else "study.seeds"
        raise UserError(f"{key}: expected a positive number, got {count}; use 1 or more")
    recipes = {arm: _recipe_of(arm, each, study) for arm, each in arms.items()}
    first = next(iter(arms))
    lists = {text: value for text in overrides if isinstance(value := _value(text), list)}
    # A recipe may need a value that only an axis has, such as data.path=[one,two].
    some = [f"{key_of(text)}={quoted(value[0])}" for text, value in lists.items() if value]
    own = [*_texts(settings), *_texts(arms[first].settings)]
    own += _texts({key: values[0] for key, values in grid.items() if values})
    others = [text for text in overrides if text not in lists]
    base = _base(recipes[first], own, [*others, *last[first]], some)
    fixed: list[str] = []
    for text in overrides:  # as in other commands, the last one of equal keys counts
        key = key_of(text)
        grid.pop(key, None)
        fixed = [each for each in fixed if key_of(each) != key]
        # A list is an axis if the recipe expects a single value for this key.
        if text in lists and (not takes_list(base, key) or _are_lists(lists[text])):
            grid[key] = lists[text]
        else:
            fixed.append(text)
    _check_axes(grid, [*_texts(settings), *fixed, *(text for own in last.values() for text in own)], arms)
    plan: dict[str, Any] = {}
    runs: list[Run] = []
    baselines: set[str] = set()  # those that a run measures
    for name, arm in arms.items():
        check_arm(name, arm, arms, last[name])
        different: dict[str, Any] = {}
        axes = {key: values for key, values in grid.items() if has_effect(arm.command, key)}
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            common = [*_texts(settings), *_texts(arm.settings), *_texts(chosen), *fixed]
            own = [text for text in common if has_effect(arm.command, key_of(text))] + last[name]
            if arm.start is not None:
                own = [text for text in own if key_of(text).partition(".")[0] != "backbone"]
            recipe = _checked(name, recipes[name], own, arm)  # reports mistakes before the first run
            plan.setdefault(name, keys_of_arm(arm) | {"grid": sorted(axes)} | _settings(recipe, grid))
            if arm.start is None:
                _check_different(different, recipe, chosen)
            pixels, weights = _baselines(recipe)
            for seed in range(1 if arm.command == EVALUATE else count):
                more = [] if arm.command == EVALUATE else [f"training.seed={seed}"]
                done = (weights if arm.command == PRETRAIN else pixels) in baselines
                if arm.start is not None or done:
                    given = _sets(own, "evaluation.baselines")
                    more = more if given else ["evaluation.baselines=false", *more]
                elif recipe.evaluation.baselines:
                    baselines |= {pixels, weights} if arm.command == PRETRAIN else {pixels}
                start = start_of(runs, arm, chosen, seed)
                shown = tuple(f"{key}={written(value)}" for key, value in (arm.settings | chosen).items())
                about = arm.command, arm.encoder, start, shown
                runs.append(Run(name, chosen, seed, recipes[name], [*own, *more], *about))
    _check_folders(runs)
    from hf_ssl.cards.sweep_text import COLUMNS  # loads torch, after the checks above

    for key, names, known in (
        ("columns", study.columns, [*COLUMNS, *MEASUREMENTS]), ("curves", study.curves, MEASUREMENTS)
    ):  # fmt: skip
        for each in names:
            check_name(f"study.{key}", each, known, "a column" if key == "columns" else "a measurement")
    return Sweep(study, grid, runs, plan)


def _check_different(different: dict[str, Any], recipe: Recipe, chosen: Mapping[str, Any]) -> None:
    """Raise UserError if two combinations of an arm have equal settings; add this one to `different`."""
    settings = json.dumps(recipe.to_dict(), sort_keys=True, default=str)
    other = different.setdefault(settings, chosen)
    if other is not chosen:
        raise UserError(
            f"sweep: expected runs with different settings, got equal ones for {written(other)} and "
            f"{written(chosen)}; remove the setting that replaces these values, or one of these values"
        )


def _checked(name: str, recipe_name: str, overrides: Sequence[str], arm: Arm) -> Recipe:
    """Return the recipe of an arm. Mistakes that its command would report later raise an error now."""
    try:
        recipe = load_recipe(recipe_name, overrides)
        if arm.command == SUPERVISE:
            from hf_ssl.supervised import used, with_settings

            with_settings(load_recipe(recipe_name, used(overrides)))
    except UserError as error:
        raise (UserError(f"arm {name}: {error}") if name else error) from error
    return recipe


def needed_keys(name: str) -> list[str]:
    """Return `arms.NAME.section.key` for the keys that the command must set for single arms of a study."""
    _, _, _, arms = _parts(name)
    return [f"arms.{arm}.{key}" for arm, each in arms.items() for key in each.needs]


def _parts(name: str) -> tuple[Study, dict[str, Any], dict[str, list[Any]], dict[str, Arm]]:
    """Return the sections of a study file, or those of a study with only a recipe."""
    known = study_files()
    path = known.get(name, Path(name))
    is_file = path.suffix in ENDINGS and path.is_file()
    if name not in known and not (is_file and _is_study(path)):
        if name not in recipe_files() and not is_file:
            check_name("sweep", name, [*recipe_files(), *known], "a recipe, a study or a YAML file")
        return Study(f"Sweep of {Path(name).stem}", "", name), {}, {}, {"": Arm()}
    plain = read_yaml(path, SECTIONS, {"study": Study, "arms": Arm})
    check_keys(plain["study"], [each.name for each in fields(Study)], "study")
    for key in ("title", "question"):  # the message of `to_dataclass` is about recipes and their overrides
        if plain["study"].get(key) is None:
            raise UserError(f"study.{key}: expected a text in {path}, got none; add {key} to study")
    study = to_dataclass(Study, plain["study"], "study")
    for arm, values in plain["arms"].items():
        if not isinstance(values, dict | None):
            raise UserError(
                f"arms.{arm}: expected keys and values in {path}, got {values!r}; use {{}} for an arm with "
                "the settings of the study"
            )
    arms = {str(arm): to_dataclass(Arm, of or {}, f"arms.{arm}") for arm, of in plain["arms"].items()}
    for key, values in plain["grid"].items():
        if not isinstance(values, list):
            raise UserError(
                f"grid.{key}: expected a list of values in {path}, got {values!r}; write [VALUE, VALUE], or "
                "move it to settings"
            )
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
            advice = "remove equal values" if values else f"write {key}=[VALUE,VALUE]"
            raise UserError(f"{key}: expected one or more different values, got {values}; {advice}")
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
        if name in found:
            found[name] = hashed(found[name])
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


def _value(override: str) -> Any:
    """Return the value of an override `section.key=value` in YAML; None for a whole section."""
    section, dot, name = key_of(override).partition(".")
    found: Any = apply_overrides({}, [override], (section,))[section] if dot else None
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _texts(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as overrides."""
    return [f"{key}={quoted(value)}" for key, value in settings.items()]


def _sets(overrides: Sequence[str], key: str) -> bool:
    return key in map(key_of, overrides)


def _baselines(recipe: Recipe) -> tuple[str, str]:
    """Return texts that are equal for runs with equal raw pixels, and with equal encoders before training."""
    plain = recipe.to_dict()
    views = {key: plain["views"].get(key) for key in ("size", "enlarge", "mean", "std", "interpolation")}
    pixels = [plain["data"], views, plain["evaluation"]]
    # CMC divides the encoder into narrow ones.
    method = recipe.method["name"] if recipe.model_class.takes_image_columns else ""
    parts = pixels, [method, plain["backbone"], *pixels]
    first, second = (json.dumps(each, sort_keys=True, default=str) for each in parts)
    return first, second
