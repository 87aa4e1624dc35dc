# SPDX-License-Identifier: Apache-2.0
"""Finds the finished runs of a sweep, and writes the files with their results (layer 5)."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_ssl.cards import read_facts
from hf_ssl.cards.card import CARD
from hf_ssl.cards.facts_files import FILE as FACTS
from hf_ssl.cards.facts_files import read_entries, result_entry
from hf_ssl.cards.privacy import encoder_name
from hf_ssl.cards.result_files import EVALUATION, SUPERVISED, read_results
from hf_ssl.cards.sweep_plots import draw, draw_curves
from hf_ssl.cards.sweep_text import BASELINES, Measured, csv_text, page
from hf_ssl.cards.text import ENCODERS
from hf_ssl.errors import UserError
from hf_ssl.evaluation.plots import k_curve
from hf_ssl.evaluation.results import EncoderResult
from hf_ssl.files import replaced_file, write_json, write_text
from hf_ssl.study import PRETRAIN, SUPERVISE, Run, Study, Sweep

RUNS, CURVES, K_CURVE = "runs.json", "curves.png", "k_curve.png"
_ERROR = "error.txt"
_PLACE = "sweep"
"""Key of an entry of `runs.json`: arm, name and seed of its run, and the measurements of the monitor."""

_KEYS = {"arm", "name", "seed", "history"}


class Finished:
    """The finished runs in the output folder of a sweep.

    A run has results in its folder, or in `runs.json` if its folder was deleted, for example because it is on
    another machine. Only a folder has the encoder from which another run can start.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        found = read_entries(output / RUNS) if (output / RUNS).exists() else []
        self.stored = {
            _key(entry[_PLACE]): entry for entry in found if _KEYS <= (entry.get(_PLACE) or {}).keys()
        }

    @property
    def arms(self) -> set[str]:
        """The arms of the runs in `runs.json`."""
        return {entry[_PLACE]["arm"] for entry in self.stored.values()}

    def __contains__(self, run: Run) -> bool:
        return has_results(run, self.output) or (run.name, run.seed) in self.stored

    def entries(self, sweep: Sweep) -> Iterator[tuple[Run, dict[str, Any]]]:
        """Yield the finished runs with their entries (`result_entry`), which also have the key "sweep"."""
        for run in sweep.runs:
            if has_results(run, self.output):
                entry, history = _read(run, run.folder(self.output))
                place = {"arm": run.arm, "name": run.name, "seed": run.seed, "history": history}
                yield run, entry | {_PLACE: place}
            elif run in self:
                yield run, self.stored[run.name, run.seed]

    def missing(self, sweep: Sweep) -> list[int]:
        """Return the numbers of the runs to make. Runs without a `start` come first.

        They are the runs without results, and those from whose encoders these runs start.
        """
        wanted = [run for run in sweep.runs if run not in self]
        for run in wanted:  # it becomes longer
            if run.start is not None and not has_results(run.start, self.output) and run.start not in wanted:
                wanted.append(run.start)
        numbers = [number for number, run in enumerate(sweep.runs, start=1) if run in wanted]
        return sorted(numbers, key=lambda number: _starts(sweep.run(number)))  # fewer runs wait for others


def _key(place: dict[str, Any]) -> tuple[str, int]:
    return place["name"], place["seed"]


def _starts(run: Run) -> int:
    """Return the number of runs that must be finished before this run, one after the other."""
    return 0 if run.start is None else 1 + _starts(run.start)


def has_results(run: Run, output: Path) -> bool:
    """Return whether the folder of a run has its results and its encoder.

    Pretraining writes the card last. A run that was killed between the facts and the card is not finished.
    """
    files = (FACTS, CARD) if run.command == PRETRAIN else (EVALUATION,)
    return all((run.folder(output) / name).exists() for name in files)


def error_file(folder: Path) -> Path:
    """Return the file with the reason of a failed run, beside its folder, which may not exist."""
    return folder.with_name(f"{folder.name}-{_ERROR}")


def _read(run: Run, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the entry of a run and the measurements of its monitor."""
    if run.command == PRETRAIN:
        facts = read_facts(folder)
        return result_entry(facts), list(facts["monitor"]["history"])
    [entry] = read_results(folder / EVALUATION)
    if run.command == SUPERVISE:  # the accuracy of its own classifier
        [own] = read_results(folder / SUPERVISED)
        entry["results"]["trained"]["protocols"] += own["results"]["trained"]["protocols"]
    return entry, []


def write_results(sweep: Sweep, output: Path) -> list[Measured]:
    """Write the files of all finished runs, and return their results.

    `runs.json` also keeps the runs that are not part of this sweep, such as those of further seeds.

    Raises:
        UserError: no run is finished.
    """
    finished = Finished(output)
    found = list(finished.entries(sweep))
    measured = [
        Measured.of(run.name, run.arm, run.values, run.seed, entry, entry[_PLACE]["history"], _settings(run))
        for run, entry in found
    ]
    if not measured:
        reasons = [error_file(run.folder(output)) for run in sweep.runs]
        texts = (file.read_text(encoding="utf-8").strip() for file in reasons if file.exists())
        reason = next(texts, "no run finished")
        raise UserError(f"sweep: expected a finished run, got none: {reason}")
    failed = {
        f"{run.name}, seed {run.seed}": _reason(run.folder(output))
        for run in sweep.runs if run not in finished
    }  # fmt: skip
    shown = {_key(entry[_PLACE]) for _, entry in found}
    others = [entry for key, entry in finished.stored.items() if key not in shown]
    plain: Any = [entry for _, entry in found] + others
    write_json(output / RUNS, plain)
    write_text(output / "sweep.csv", csv_text(measured, list(sweep.axes)))
    if any(run.numbers() for run in measured):
        with replaced_file(output / "sweep.png") as staging:
            draw(measured, sweep.axes, staging)
    pictures = _pictures(sweep.study, measured, output)
    study = sweep.study
    text = page(study.title, study.question, measured, failed, study.columns, study.ranks, pictures)
    write_text(output / "README.md", text)
    return measured


def _settings(run: Run) -> tuple[str, ...]:
    """Return the settings of a run for readers, with the encoder that it measures or starts from."""
    start = () if run.start is None else (f"start: {run.start.name}",)
    encoder = () if run.encoder is None else (f"encoder: {_name_of(run.encoder)}",)
    return *start, *encoder, *run.settings


def _name_of(encoder: str) -> str:
    """Return the name of an encoder. For a run of a sweep, such as "SimCLR/seed-0", it has two parts."""
    name = encoder_name(encoder)
    is_run = name != encoder and re.fullmatch(r"seed-\d+", name)
    return f"{Path(encoder).absolute().parent.name}/{name}" if is_run else name


def _pictures(study: Study, measured: Sequence[Measured], output: Path) -> dict[str, str]:
    """Draw the further pictures that the study asks for, and return {file: caption}."""
    found = {}
    history = [each for run in measured for each in run.history]
    names = [name for name in study.curves if any(name in each for each in history)]
    if names:
        with replaced_file(output / CURVES) as staging:
            has_rest = draw_curves(measured, names, staging)
        words = "; dotted: later steps, which only some of the seeds have" if has_rest else ""
        found[CURVES] = f"Measurements during training, means over seeds{words}"
    figure = k_curve(_first_results(measured)) if study.k_curve else None
    if figure is not None:
        with replaced_file(output / K_CURVE) as staging:
            figure.savefig(staging, format="png")
        found[K_CURVE] = "Accuracy of k-NN over k, first seed; bands show one standard error"
    return found


def _first_results(measured: Sequence[Measured]) -> dict[str, EncoderResult]:
    """Return the results of the first seed of each combination, and the first ones of each baseline."""
    found: dict[str, EncoderResult] = {}
    for run in measured:
        if "trained" in run.results:
            found.setdefault(run.name, run.results["trained"])
    for encoder in BASELINES:
        results = [run.results[encoder] for run in measured if encoder in run.results]
        if results:
            found[ENCODERS[encoder]] = results[0]
    return found


def _reason(folder: Path) -> str:
    file = error_file(folder)
    return file.read_text(encoding="utf-8").strip() if file.exists() else "it has not finished"
