# SPDX-License-Identifier: Apache-2.0
"""The page and the table of a sweep. All functions are pure (layer 3)."""

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hf_ssl.cards.short_texts import joined
from hf_ssl.cards.text import ENCODERS, duration, markdown_row, written
from hf_ssl.errors import counted
from hf_ssl.evaluation.config import MEASUREMENTS
from hf_ssl.evaluation.protocols import PROTOCOLS
from hf_ssl.evaluation.results import (
    ACCURACY,
    EncoderResult,
    ProtocolResult,
    in_percent,
    is_measured,
    metric_of,
)

BASELINES = ("untrained", "start", "raw_pixels")
_VERSIONS = ("hf_ssl", "torch", "transformers")
_OF_EVALUATION = "evaluation."  # start of keys
_OF_A_RUN = ("training.output_dir", "training.seed", "training.disable_tqdm")


@dataclass(frozen=True)
class Measured:
    """A finished run.

    Attributes:
        name: name of the combination, which all seeds share.
        arm, values, seed: see `hf_ssl.study.Run`.
        training: facts of the training; {} for an encoder that was only evaluated.
        results: the results by encoder.
        alarm: message of the collapse alarm, if any.
        images: name of the test images.
        history: measurements of the monitor with their `step`, in order.
        settings: the overrides that only this combination has, without seed, images and folders.
        machine: the hardware in words.
        recipe, overrides: of the run; "" and () if they are not known.
        versions: versions of hf_ssl and of important libraries, and the date.
    """

    name: str
    arm: str
    values: dict[str, Any]
    seed: int
    training: dict[str, Any]
    results: dict[str, EncoderResult]
    alarm: str | None
    images: str
    history: list[dict[str, Any]] = field(default_factory=list)
    settings: tuple[str, ...] = ()
    machine: str = ""
    recipe: str = ""
    overrides: tuple[str, ...] = ()
    versions: str = ""

    @classmethod
    def of(
        cls, name: str, arm: str, values: dict[str, Any], seed: int, entry: dict[str, Any],
        history: list[dict[str, Any]], settings: tuple[str, ...] = (),
    ) -> "Measured":  # fmt: skip
        """Return the run with this entry (`hf_ssl.cards.facts_files.result_entry`)."""
        evaluation = entry["evaluation"]
        images = entry["data"]["name"] if evaluation is None else evaluation["name"]
        training, results = entry["training"] or {}, entry["results"]
        place = entry["environment"]
        machine = f"{place['device']}, {counted(place['cores'], 'core')}"
        if place.get("threads") is not None:
            machine += f", {counted(place['threads'], 'thread')} in each run"
        packages = {"hf_ssl": entry["hf_ssl_version"], **place["packages"]}
        versions = ", ".join(f"{name} {packages[name]}" for name in _VERSIONS if name in packages)
        versions += f" ({entry['date'][:10]})"
        own = entry.get("recipe") or "", tuple(entry.get("overrides") or ())
        about = images, history, settings, machine, *own, versions
        return cls(name, arm, values, seed, training, results, entry["collapse"], *about)

    @property
    def seconds(self) -> float | None:
        """Duration of the training; None without a training."""
        return self.training.get("seconds")

    def further(self, column: str) -> float | None:
        """Return the number of a further column: a key of `COLUMNS`, or the last value of a measurement."""
        if column in COLUMNS:
            return COLUMNS[column][1](self)
        return next((each[column] for each in reversed(self.history) if column in each), None)

    def numbers(self, encoder: str = "trained") -> dict[str, ProtocolResult]:
        """Return {id and key: number} of an encoder."""
        result = self.results.get(encoder)
        return {} if result is None else {f"{each['id']} {each['key']}": each for each in result["protocols"]}


def _evaluation_seconds(run: Measured) -> float | None:
    seconds = run.results["trained"]["seconds"] if "trained" in run.results else {}
    return sum(seconds.values()) if seconds else None


COLUMNS: dict[str, tuple[str, Callable[[Measured], float | None]]] = {
    "memory": ("peak memory, GiB", lambda run: run.training.get("peak_memory_gib")),
    "steps": ("steps", lambda run: run.training.get("steps")),
    "evaluation_seconds": ("evaluation, s", _evaluation_seconds),
}
"""Further column of a study -> its heading and its number."""


def groups_of(runs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Return the runs of each combination, which differ only in the seed."""
    found: dict[str, list[Measured]] = {}
    for run in runs:
        found.setdefault(run.name, []).append(run)
    return found


def columns_of(runs: Sequence[Measured]) -> dict[str, str]:
    """Return {id and key: heading} of all numbers, in the order of the first run that has them."""
    found: dict[str, str] = {}
    for run in runs:
        for key, number in run.numbers().items():
            found.setdefault(key, number["column"])
    return found


def _mean(numbers: Sequence[ProtocolResult], runs: int) -> str:
    """Return a mean in percent with its error (see `error_of`).

    The text names the number of values if some of the runs have none.
    """
    if not numbers:
        return "-"
    error = error_of(numbers)
    deviation = "" if error is None else f" ± {in_percent(error)}"
    share = f" ({len(numbers)} of {runs})" if len(numbers) < runs else ""
    return in_percent(statistics.mean(each["value"] for each in numbers)) + deviation + share


def error_of(numbers: Sequence[ProtocolResult]) -> float | None:
    """Return the standard deviation (n - 1) over seeds, or the standard error over images of a single run."""
    if len(numbers) > 1:
        return statistics.stdev(each["value"] for each in numbers)
    error = numbers[0]["standard_error"]
    return error if is_measured(error) else None


def words_of_error(numbers: Iterable[int]) -> str:
    """Return what `error_of` is for means of so many values: "the standard deviation over seeds"."""
    single, several = [number == 1 for number in numbers], "the standard deviation over seeds"
    if not all(single):
        return f"{several}; for a single run, the standard error over images" if any(single) else several
    return "the standard error over the test images"


def page(
    title: str,
    question: str,
    runs: Sequence[Measured],
    failed: Mapping[str, str],
    further: Sequence[str] = (),
    ranks: bool = False,
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return the page of a sweep in Markdown: question, plot, table and missing runs.

    Args:
        title, question: of the study.
        runs: the finished runs.
        failed: {name of a run without a result: reason}.
        further, ranks: see `columns` and `ranks` of `hf_ssl.study.Study`.
        pictures: {further file: caption}.
    """
    columns = columns_of(runs)
    images = ", ".join(dict.fromkeys(run.images for run in runs))
    lines = [f"# {title}", "", *([question, ""] if question else [])]
    lines += _table(runs, columns, further)
    lines += _ranks_table(runs) if ranks else []
    lines += _seconds_table(runs) if "evaluation_seconds" in further else []
    lines += ["", f"{_about(runs, images)} `sweep.csv` has all runs. The protocols are described below, with "
              "ranges where rows differ. `hf-ssl compare FOLDER` tests the differences.", ""]  # fmt: skip
    error = words_of_error(map(len, groups_of(runs).values()))
    shown = {"sweep.png": f"Accuracy of each combination; error bars: {error}"} if columns else {}
    lines += [line for file, words in (shown | {**pictures}).items() for line in (f"![{words}]({file})", "")]
    lines += _notes(runs)
    lines += _origin(runs)
    lines += [f"- Missing: {name}: {reason.rstrip('.')}." for name, reason in failed.items()]
    settings = {name: group[0].settings for name, group in groups_of(runs).items() if group[0].settings}
    if settings:
        lines += ["", "Settings besides those of the recipe:", ""]
        lines += [f"- {name}: {', '.join(f'`{text}`' for text in own)}." for name, own in settings.items()]
    machines = dict.fromkeys(run.machine for run in runs if run.machine)
    if machines:
        words = "; ".join(machines)
        lines += ["", f"Machine: {words}. All times are longer if other programs or runs use the machine."]
    return "\n".join(lines) + "\n"


def _table(runs: Sequence[Measured], columns: Mapping[str, str], further: Sequence[str]) -> list[str]:
    """Return the main table in Markdown: a row for each combination, then the baselines."""
    headings = [COLUMNS[key][0] if key in COLUMNS else heading_of(key) for key in further]
    heading = ["", *columns.values(), "RankMe", *headings, "training", "runs"]
    lines = [markdown_row(heading), "|---|" + "---:|" * (len(heading) - 1)]
    for name, group in groups_of(runs).items():
        cells = [_mean(finite_numbers(group, key), len(group)) for key in columns]
        cells.append(_rank(group, "trained"))
        for key in further:
            found = [value for run in group if is_measured(value := run.further(key))]
            cells.append(f"{statistics.mean(found):.4g}" if found else "-")
        seconds = [run.seconds for run in group if run.seconds is not None]
        cells.append(duration(statistics.mean(seconds)) if seconds else "-")
        lines.append(markdown_row([name, *cells, str(len(group))]))
    for encoder in BASELINES:
        having = groups_of([run for run in runs if run.numbers(encoder)])
        alike: dict[tuple[str, ...], list[str]] = {}  # raw pixels are the same for all encoders
        for name, group in having.items():
            cells = [_mean(finite_numbers(group, key, encoder), len(group)) for key in columns]
            cells += [_rank(group, encoder), *["-"] * (len(further) + 1), str(len(group))]
            alike.setdefault(tuple(cells), []).append(name)
        for same, names in alike.items():
            words = ENCODERS[encoder] + (f" ({', '.join(names)})" if len(alike) > 1 else "")
            lines.append(markdown_row([words, *same]))
    return lines


def _about(runs: Sequence[Measured], images: str) -> str:
    """Return sentences about the numbers of the main table."""
    metrics = {metric_of(number) for run in runs for number in run.numbers().values()}
    if not metrics:
        return "The data have no labels, so there is no accuracy."
    words = "Accuracy" if metrics <= {ACCURACY} else "Results"
    return (
        f"{words} in percent on {images}; mean ± standard deviation over seeds. For a single run, ± is the "
        "standard error over the test images. RankMe is the effective rank of the features."
    )


def _origin(runs: Sequence[Measured]) -> list[str]:
    """Return list items with the recipes, the settings of all runs, the seeds and the versions."""
    recipes = dict.fromkeys(run.recipe for run in runs if run.recipe)
    lines = [f"- Recipe: {', '.join(f'`{name}`' for name in recipes)}."] if recipes else []
    shared = _shared_settings(runs)
    lines += [f"- Settings of all runs: {', '.join(f'`{text}`' for text in shared)}."] if shared else []
    lines.append(f"- Seeds: {', '.join(map(str, sorted({run.seed for run in runs})))}.")
    precisions = sorted({run.training["precision"] for run in runs if run.training.get("precision")})
    lines += [f"- Precision of the trainings: {', '.join(precisions)}."] if precisions else []
    versions = dict.fromkeys(run.versions for run in runs if run.versions)
    return [*lines, *([f"- Made with {'; '.join(versions)}."] if versions else [])]


def _shared_settings(runs: Sequence[Measured]) -> list[str]:
    """Return the overrides that all runs of the sweep have, without folders, seeds and those of an arm.

    Supervised runs have the same settings of the evaluation, but record only those of their training.
    Encoders that are only evaluated were trained elsewhere.
    """
    given = [
        dict(text.split("=", 1) for text in run.overrides)
        for run in runs
        if run.recipe and not any(text.startswith("encoder: ") for text in run.settings)
    ]
    measured = [each for each in given if any(key.startswith(_OF_EVALUATION) for key in each)]
    shown = {text.split("=", 1)[0] for run in runs for text in run.settings}
    return [
        f"{key}={value}"
        for key, value in (*measured, *given, {})[0].items()
        if key not in shown
        and key not in _OF_A_RUN
        and not key.endswith(".path")
        and all(each.get(key) == value for each in (measured if key.startswith(_OF_EVALUATION) else given))
    ]


def _notes(runs: Sequence[Measured]) -> list[str]:
    """Return list items with the protocols, the alarms of the monitor, and what was not measured."""
    texts: dict[str, list[str]] = {}
    for number in (number for run in runs for number in run.numbers().values()):
        texts.setdefault(number["column"], []).append(number["text"])
    lines = [f"- {column}: {joined(found)}." for column, found in texts.items()]
    alarms = [(f"{run.name}, seed {run.seed}", run.alarm) for run in runs if run.alarm is not None]
    lines += [f"- Alarm of the monitor in {name}: {text.rstrip('.')}." for name, text in alarms]
    reasons: dict[str, list[str]] = {}
    for run in runs:
        for reason in run.results["trained"].get("skipped", ()) if "trained" in run.results else ():
            names = reasons.setdefault(reason, [])
            names += [] if run.name in names else [run.name]
    everywhere = len(groups_of(runs))
    for reason, names in reasons.items():
        place = "" if len(names) == everywhere else f" in {', '.join(names)}"
        lines.append(f"- Not measured{place}: {reason}.")
    return lines


def finite_numbers(runs: Sequence[Measured], key: str, encoder: str = "trained") -> list[ProtocolResult]:
    """Return the numbers of some runs that are finite."""
    numbers = [run.numbers(encoder).get(key) for run in runs]
    return [each for each in numbers if each is not None and is_measured(each["value"])]


def _rank(runs: Sequence[Measured], encoder: str) -> str:
    results = [run.results[encoder] for run in runs if encoder in run.results]
    ranks = [each["statistics"]["rank_me"] for each in results]
    return f"{statistics.mean(ranks):.1f}" if ranks else "-"


def heading_of(measurement: str) -> str:
    """Return the words for a measurement of the monitor."""
    return MEASUREMENTS[measurement].text if measurement in MEASUREMENTS else measurement.replace("_", " ")


def columns_to_compare(runs: Sequence[Measured]) -> dict[str, str]:
    """Return `columns_of` without numbers that only one of several combinations has."""
    groups = groups_of(runs)
    return {
        key: heading
        for key, heading in columns_of(runs).items()
        if len(groups) == 1 or sum(bool(finite_numbers(group, key)) for group in groups.values()) > 1
    }


def _ranks_table(runs: Sequence[Measured]) -> list[str]:
    """Return the rank of each combination in each column in Markdown. Equal means have the same rank."""
    groups, columns = groups_of(runs), columns_to_compare(runs)
    means: dict[str, dict[str, float]] = {}
    for key in columns:
        values = {
            name: [each["value"] for each in finite_numbers(group, key)] for name, group in groups.items()
        }
        means[key] = {name: statistics.mean(found) for name, found in values.items() if found}
    lines = ["", "Ranks (1: highest mean)", "", markdown_row(["", *columns.values()])]
    lines.append("|---|" + "---:|" * len(columns))
    for name in groups:
        cells = []
        for each in means.values():
            better = sum(value > each[name] for value in each.values()) if name in each else None
            cells.append("-" if better is None else str(better + 1))
        lines.append(markdown_row([name, *cells]))
    return lines


def _seconds_table(runs: Sequence[Measured]) -> list[str]:
    """Return the mean seconds of each protocol and of the extraction of features in Markdown."""
    timed = {
        name: [run.results["trained"]["seconds"] for run in group if "trained" in run.results]
        for name, group in groups_of(runs).items()
    }
    names = list(dict.fromkeys(key for group in timed.values() for each in group for key in each))
    titles = [PROTOCOLS[key].title if key in PROTOCOLS else key for key in names]
    titles = ["extraction of features" if key == "features" else key for key in titles]
    heading = COLUMNS["evaluation_seconds"][0]
    about = f'Seconds of each part of the evaluation; their sum is the column "{heading}".'
    lines = ["", about, "", markdown_row(["", *titles])]
    lines.append("|---|" + "---:|" * len(names))
    for name, group in timed.items():
        found = [[each[key] for each in group if key in each] for key in names]
        cells = [f"{statistics.mean(each):.1f}" if each else "-" for each in found]
        lines.append(markdown_row([name, *cells]))
    return lines


def csv_text(runs: Sequence[Measured], axes: Sequence[str]) -> str:
    """Return one line for each number of each run. The numbers of one protocol share its seconds."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        [
            "name",
            "arm",
            *axes,
            "seed",
            "encoder",
            "protocol",
            "column",
            "id",
            "value",
            "standard_error",
            "protocol_seconds",
            "training_seconds",
            "rank_me",
        ]
    )
    for run in runs:
        places = [written(run.values[key]) if key in run.values else "" for key in axes]
        about = [run.name, run.arm, *places, run.seed]
        for encoder, result in run.results.items():
            seconds = run.seconds if encoder == "trained" else None
            for number in run.numbers(encoder).values():
                costs = result.get("seconds", {}).get(number.get("protocol", "")), seconds
                values = number["value"], number["standard_error"], *costs, result["statistics"]["rank_me"]
                texts = ["" if each is None else f"{each:.6g}" for each in values]
                names = number.get("protocol", ""), number["column"], number["id"]
                writer.writerow([*about, encoder, *names, *texts])
        if not run.numbers():
            rank = run.results["trained"]["statistics"]["rank_me"] if "trained" in run.results else None
            last = ["" if each is None else f"{each:.6g}" for each in (run.seconds, rank)]
            writer.writerow([*about, "trained", *[""] * 6, *last])
    return stream.getvalue()
