# SPDX-License-Identifier: Apache-2.0
"""Reads a sweep, a grid of settings with several seeds, from the command or from a study file (layer 5).

A study is a YAML file with the sections `study`, `settings`, `grid` and `arms`. `Study` and `Arm` explain the
keys. `settings` are overrides for all runs. `grid` contains lists of values. Each arm runs with each
combination of these values. Keys without an effect on an arm are left out, such as `training.max_steps` for
an arm that only evaluates an encoder.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hf_ssl.cards.sweep_text import COLUMNS
from hf_ssl.data.config import MISSING, DataConfig
from hf_ssl.effects import NOTHING, effect
from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation.config import MEASUREMENTS, EvaluationConfig
from hf_ssl.recipe import Recipe, load_recipe
from hf_ssl.recipe.source import ENDINGS, apply_overrides, read_yaml
from hf_ssl.resources import recipe_files, study_files
from hf_ssl.sections import to_dataclass
from hf_ssl.views.preset import ViewPreset

SECTIONS = ("study", "settings", "grid", "arms")
_LONGEST = 120  # characters of the name of a folder
_OWN = {"training.seed": "--seeds", "training.output_dir": "--output"}
"""Key that each run sets itself -> the option in its place."""
PRETRAIN, SUPERVISE, EVALUATE = COMMANDS = ("pretrain", "supervise", "evaluate")
"""Values of `Arm.command`."""


@dataclass
class Study:
    """The section `study`.

    Attributes:
        title: heading of the page.
        question: what the study asks, with its source.
        recipe: recipe of all runs, unless an arm has its own.
        seeds: number of seeds, which are 0, 1, ...; `--seeds` replaces it.
        columns: further columns of the table, keys of `hf_ssl.cards.sweep_text.COLUMNS`, or measurements of
            the monitor at the last step, such as `queue_age`.
        curves: measurements of the monitor that `curves.png` shows over the steps, such as `knn`.
        ranks: whether a table shows the rank of each combination in each column.
        k_curve: whether `k_curve.png` shows the k-NN accuracy over k (first seed of up to ten combinations).
    """

    title: str = MISSING
    question: str = MISSING
    recipe: str | None = None
    seeds: int = 1
    columns: list[str] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)
    ranks: bool = False
    k_curve: bool = False


@dataclass
class Arm:
    """A value of the section `arms`.

    Attributes:
        recipe: recipe of the runs of this arm; null: `study.recipe`.
        settings: {"section.key": value} for the runs of this arm.
        command: "pretrain", "supervise" (an encoder trained with labels, and evaluated like the others), or
            "evaluate" (an encoder that exists; it runs once, and not with each seed).
        encoder: folder or Hub id of the encoder that "evaluate" measures.
        start: name of an earlier arm. The run starts from the encoder of that arm with the same values of the
            grid and the same seed.
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = PRETRAIN
    encoder: str | None = None
    start: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        arm: name of the arm; "" if there are no arms.
        values: {"section.key": value} of the grid.
        seed: the seed.
        recipe: name or file of the recipe.
        overrides: all overrides of the recipe.
        command, encoder: see `Arm`.
        start: the run whose encoder this run starts from; None: from random weights, or as the recipe says.
    """

    arm: str
    values: dict[str, Any]
    seed: int
    recipe: str
    overrides: list[str]
    command: str = PRETRAIN
    encoder: str | None = None
    start: "Run | None" = None

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
        study: title, question and pictures. The question is "" for a sweep of the command.
        axes: {"section.key": values} of the grid.
        runs: all runs, in their order: all seeds of the first combination come first.
        plan: {arm: its settings without the grid}, for the check of an existing folder.
    """

    study: Study
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
            axis of the grid, and so is a list of lists for a key that takes a list. `arms.NAME.section.key`
            sets a value for one arm, and `arms.NAME.encoder` its encoder.
        seeds: number of seeds; None: 1, or that of the study.

    Raises:
        UserError: the recipe or the study does not exist, a key or a value is wrong in any run, a list is
            empty, or the grid and the arms contain a single combination.
    """
    study, settings, grid, arms = _parts(name)
    last = _of_arms(arms, [text for text in overrides if text.startswith("arms.")])
    overrides = [text for text in overrides if not text.startswith("arms.")]
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
    others = [text for text in overrides if text not in lists]
    base = _base(recipes[first], own, [*others, *last[first]], some)
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
    baselines: set[tuple[str, bool]] = set()  # (images and encoder, whether random weights are measured)
    for name, arm in arms.items():
        _check_arm(name, arm, arms, last[name])
        axes = {key: values for key, values in grid.items() if has_effect(arm.command, key)}
        for combination in itertools.product(*axes.values()):
            chosen = dict(zip(axes, combination, strict=True))
            common = [*_texts(settings), *_texts(arm.settings), *_texts(chosen), *fixed]
            own = [text for text in common if has_effect(arm.command, _key(text))] + last[name]
            recipe = _checked(recipes[name], own, arm)  # reports mistakes before the first run
            plan.setdefault(name, _settings(recipe, grid) | _of_arm(arm))
            trains, images = arm.command == PRETRAIN, _baseline(recipe)
            for seed in range(1 if arm.command == EVALUATE else count):
                more = [] if arm.command == EVALUATE else [f"training.seed={seed}"]
                done = (images, True) in baselines or ((images, False) in baselines and not trains)
                if (arm.start is not None or done) and not _sets(own, "evaluation.baselines"):
                    more.insert(0, "evaluation.baselines=false")
                baselines.add((images, trains))
                start = _start(runs, arm, chosen, seed)
                runs.append(
                    Run(name, chosen, seed, recipes[name], [*own, *more], arm.command, arm.encoder, start)
                )
    _check_folders(runs)
    for key, names, known in (
        ("columns", study.columns, [*COLUMNS, *MEASUREMENTS]), ("curves", study.curves, MEASUREMENTS)
    ):  # fmt: skip
        for each in names:
            check_name(f"study.{key}", each, known, "a column" if key == "columns" else "a measurement")
    return Sweep(study, grid, runs, plan)


def has_effect(command: str, key: str) -> bool:
    """Return whether `section.key` has an effect on an arm with this command."""
    if command == SUPERVISE:
        from hf_ssl.supervised import is_used

        return is_used(key) or key.startswith("evaluation.")
    return command == PRETRAIN or key.partition(".")[0] in ("data", "evaluation")


def _check_arm(name: str, arm: Arm, arms: Mapping[str, Arm], last: Sequence[str]) -> None:
    """Raise UserError for an unknown command, a key without an effect, and a start that is no earlier arm."""
    check_name(f"arms.{name}.command", arm.command, COMMANDS, ", ".join(COMMANDS))
    if (arm.encoder is None) == (arm.command == EVALUATE):
        got = "one" if arm.encoder is not None else "none"
        expected = "an encoder for evaluate, and only for it"
        raise UserError(f"arms.{name}.encoder: expected {expected}, got {got}; see arms.{name}.command")
    for key in (*arm.settings, *map(_key, last)):
        if not has_effect(arm.command, key):
            raise UserError(
                f"arms.{name}.settings: expected settings with an effect on {arm.command}, got {key}; "
                "remove it"
            )
    if arm.start is None:
        return
    earlier = list(arms)[: list(arms).index(name)]
    earlier = [each for each in earlier if arms[each].command != EVALUATE]
    check_name(f"arms.{name}.start", arm.start, earlier, "an earlier arm that trains")
    if arm.command != PRETRAIN:
        raise UserError(
            f"arms.{name}.start: expected the command pretrain, got {arm.command}; remove start or command"
        )


def _checked(name: str, overrides: Sequence[str], arm: Arm) -> Recipe:
    """Return the recipe of an arm. Mistakes that its command would report later raise an error now."""
    recipe = load_recipe(name, overrides)
    if arm.command == SUPERVISE:
        from hf_ssl.supervised import used, with_settings

        with_settings(load_recipe(name, used(overrides)))
    return recipe


def _start(runs: Sequence[Run], arm: Arm, values: Mapping[str, Any], seed: int) -> Run | None:
    """Return the run of `arm.start` with the same seed and the same values of the axes that it has."""
    for run in runs:
        if run.arm == arm.start and run.seed == seed and run.values.items() <= values.items():
            return run
    return None


def _of_arm(arm: Arm) -> dict[str, Any]:
    """Return the keys of an arm, besides its settings, that are not the default."""
    plain = {"command": arm.command, "encoder": arm.encoder, "start": arm.start}
    return {key: value for key, value in plain.items() if value not in (None, PRETRAIN)}


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


def _of_arms(arms: dict[str, Arm], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return {arm: `section.key=value`} of the overrides `arms.NAME.section.key=value`.

    `arms.NAME.encoder=value` replaces the encoder in `arms`.
    """
    found: dict[str, list[str]] = {name: [] for name in arms}
    for text in overrides:
        own = text.removeprefix("arms.")
        name = max((each for each in arms if own.startswith(f"{each}.")), key=len, default=None)
        if name is None:
            check_name("arms", own.partition(".")[0], arms, "an arm of this study")
            raise UserError(f"{text}: expected arms.NAME.KEY=VALUE, got no key; see hf-ssl sweep --help")
        own = own.removeprefix(f"{name}.")
        if _key(own) == "encoder":
            arms[name] = replace(arms[name], encoder=own.partition("=")[2])
        else:
            found[name].append(own)
    return found


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
