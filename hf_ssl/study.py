# SPDX-License-Identifier: Apache-2.0
"""The parts of a study: its arms and its runs (layer 5).

`hf_ssl.sweep_file` reads them, and `hf_ssl.sweeps` makes the runs.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_ssl.cards.text import words_of
from hf_ssl.errors import UserError, check_name
from hf_ssl.sections import MISSING

PRETRAIN, SUPERVISE, EVALUATE = COMMANDS = ("pretrain", "supervise", "evaluate")
"""Values of `Arm.command`."""
_LONGEST = 120  # characters of the name of a folder


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
        settings: {"section.key": value} for the runs of this arm. {"method": {...}} replaces the section.
        command: "pretrain", "supervise" (an encoder trained with labels, and evaluated like the others), or
            "evaluate" (an encoder that exists; it runs once, and not with each seed).
        encoder: folder or Hub id of the encoder that "evaluate" measures.
        start: name of an earlier arm. The run starts from the encoder of that arm with the same values of the
            grid and the same seed. Settings of `backbone` have no effect.
        needs: keys that the command must set for this arm alone (`arms.NAME.section.key=value`).
    """

    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = PRETRAIN
    encoder: str | None = None
    start: str | None = None
    needs: list[str] = field(default_factory=list)


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
        settings: the overrides of arm and grid, for readers.
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
    settings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The arm and the values: "BYOL, batch_size 64".

        A key is shortened to its last word, unless two keys end with the same word.
        """
        return ", ".join(filter(None, [self.arm, *words_of(self.values).values()])) or Path(self.recipe).stem

    def folder(self, output: Path) -> Path:
        """Return the output folder of the run."""
        name = folder_name(self.name)
        if len(self.name) > _LONGEST:
            name = f"{name}-{hashlib.sha256(self.name.encode()).hexdigest()[:8]}"
        return output / name / f"seed-{self.seed}"


@dataclass(frozen=True)
class Sweep:
    """A checked sweep.

    Attributes:
        study: title, question and pictures. The question is "" for a sweep of the command.
        axes: {"section.key": values} of the grid.
        runs: all runs, in their order: all seeds of the first combination come first.
        plan: {arm: its settings without the grid, and the keys of the grid}, for the check of an existing
            folder.
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


def has_effect(command: str, key: str) -> bool:
    """Return whether `section.key` has an effect on an arm with this command."""
    if command == SUPERVISE:
        from hf_ssl.supervised import is_used

        return is_used(key) or key.startswith("evaluation.")
    return command == PRETRAIN or key.partition(".")[0] in ("data", "evaluation")


def check_arm(name: str, arm: Arm, arms: Mapping[str, Arm], last: Sequence[str]) -> None:
    """Raise UserError for an unknown command, a key without an effect, and a start that is no earlier arm."""
    check_name(f"arms.{name}.command", arm.command, COMMANDS, ", ".join(COMMANDS))
    if (arm.encoder is None) == (arm.command == EVALUATE):
        got = "one" if arm.encoder is not None else "none"
        expected = "an encoder for evaluate, and only for it"
        raise UserError(
            f"arms.{name}.encoder: expected {expected}, got {got} for {arm.command}; edit the study"
        )
    for key in arm.needs:
        if key not in map(key_of, last):
            raise UserError(f"arms.{name}.{key}: expected a value, got none; add arms.{name}.{key}=...")
    for key in (*arm.settings, *map(key_of, last)):
        if not has_effect(arm.command, key):
            raise UserError(
                f"arms.{name}.settings: expected settings with an effect on {arm.command}, got {key}; "
                "remove it"
            )
    if arm.start is None:
        return
    earlier = list(arms)[: list(arms).index(name)]
    earlier = [each for each in earlier if arms[each].command != EVALUATE]
    if arm.start in list(arms)[list(arms).index(name) :]:
        advice = f"move {arm.start} before {name}" if arm.start != name else "give another arm"
        raise UserError(f"arms.{name}.start: expected an earlier arm, got {arm.start}; {advice}")
    check_name(f"arms.{name}.start", arm.start, earlier, "an earlier arm that trains")
    if arm.command != PRETRAIN:
        raise UserError(
            f"arms.{name}.start: expected the command pretrain, got {arm.command}; remove start or command"
        )


def start_of(runs: Sequence[Run], arm: Arm, values: Mapping[str, Any], seed: int) -> Run | None:
    """Return the run of `arm.start` with the same seed and the same values of the axes that it has."""
    for run in runs:
        if run.arm == arm.start and run.seed == seed and run.values.items() <= values.items():
            return run
    return None


def keys_of_arm(arm: Arm) -> dict[str, Any]:
    """Return the keys of an arm besides its settings. The whole path of a local encoder is a hash."""
    return {"command": arm.command, "encoder": hashed(arm.encoder), "start": arm.start}


def overrides_of_arms(arms: dict[str, Arm], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return {arm: `section.key=value`} of the overrides `arms.NAME.section.key=value`.

    `arms.NAME.encoder=value` replaces the encoder in `arms`.
    """
    found: dict[str, list[str]] = {name: [] for name in arms}
    for text in overrides:
        own = text.removeprefix("arms.")
        name = max((each for each in arms if own.startswith(f"{each}.")), key=len, default=None)
        if name is None:
            check_name("arms", key_of(own).partition(".")[0], arms, "an arm of this study")
            raise UserError(f"{text}: expected arms.NAME.section.key=value, got no section and key; add them")
        own = own.removeprefix(f"{name}.")
        if "." not in key_of(own) and key_of(own) != "encoder":
            raise UserError(
                f"{text}: expected arms.{name}.section.key=value or arms.{name}.encoder=FOLDER, got "
                f"{key_of(own)}; other keys of an arm belong to the file of the study"
            )
        if key_of(own) == "encoder":
            arms[name] = replace(arms[name], encoder=own.partition("=")[2])
        else:
            found[name].append(own)
    return found


def folder_name(name: str) -> str:
    """Return the start of the name of a folder for a run or an arm: letters, digits, points and dashes."""
    return "".join(each if each.isalnum() or each in ".-" else "_" for each in name)[:_LONGEST]


def hashed(path: Any) -> str | None:
    """Return the last part of a path or a Hub id, and a hash of the whole; None for None."""
    if path is None:
        return None
    place = os.path.abspath(path) if os.path.exists(path) else str(path)
    return f"{Path(place).name} ({hashlib.sha256(place.encode()).hexdigest()[:8]})"


def key_of(override: str) -> str:
    return override.partition("=")[0]
