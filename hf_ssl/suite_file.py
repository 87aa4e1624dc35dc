# SPDX-License-Identifier: Apache-2.0
"""Reads the file of a suite, checks it, and lists its jobs (layer 5).

A suite is a YAML file with the sections `suite`, `groups`, `data`, `evaluation` and `entries`. An entry is a
data set with its metric. A group is a list of protocols, such as those with a frozen encoder. Each pair of
entry and group is a job.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hf_ssl.cards.suite_text import COLUMNS
from hf_ssl.data import DataConfig
from hf_ssl.effects import NOTHING, effect
from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.evaluation.protocols import PROTOCOLS, load_protocol
from hf_ssl.recipe import read_sections
from hf_ssl.recipe.source import ENDINGS, apply_overrides, read_yaml
from hf_ssl.resources import suite_files
from hf_ssl.sections import MISSING, default_values, to_dataclass

SECTIONS = ("suite", "groups", "data", "evaluation", "entries")


@dataclass
class Heading:
    """The section `suite`.

    Attributes:
        title: heading of the table.
        root: folder of the data sets. `data.path` of each entry is relative to it. null: `data.path` is used
            as it is. `--root` replaces this value.
    """

    title: str = MISSING
    root: str | None = None


@dataclass
class Group:
    """A value of the section `groups`.

    Attributes:
        protocols: names of `PROTOCOLS`.
        settings: settings of the protocols, as in `evaluation.settings`.
    """

    protocols: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class Entry:
    """A value of the section `entries`: one data set.

    Attributes:
        metric: the metric in the table, a key of `COLUMNS`.
        data, evaluation: keys of these sections. They replace the same keys of the whole suite.
        groups: names of the groups to run; null: all groups.
        instead: {protocol of a group: protocol that replaces it}, such as {logistic_regression: multi_label}.
    """

    metric: str = "top_1"
    data: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    groups: list[str] | None = None
    instead: dict[str, str] = field(default_factory=dict)


_CLASSES = {"suite": Heading, "groups": Group, "entries": Entry}


@dataclass(frozen=True)
class Job:
    """The protocols of one group on one data set.

    Attributes:
        entry, group: names in the suite.
        metric: see `Entry`.
        protocols: {protocol of the group: protocol that runs}.
        data, evaluation: all settings.
        settings: {key: value} of the settings that determine the numbers. Paths are relative to the root.
    """

    entry: str
    group: str
    metric: str
    protocols: dict[str, str]
    data: DataConfig
    evaluation: EvaluationConfig
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.entry}, {self.group}"

    def file(self, output: Path) -> Path:
        """Return the file of the result."""
        return output / self.entry / f"{self.group}.json"


@dataclass(frozen=True)
class Suite:
    """A checked suite: its name, its title, and all jobs in their order."""

    name: str
    title: str
    jobs: list[Job]

    def job(self, number: int) -> Job:
        """Return a job by its number, from 1."""
        if not 1 <= number <= len(self.jobs):
            raise UserError(
                f"--job: expected a number from 1 to {len(self.jobs)}, got {number}; use --list-jobs"
            )
        return self.jobs[number - 1]


def load_suite(name_or_path: str, overrides: Sequence[str] = (), root: str | None = None) -> Suite:
    """Return a suite.

    Args:
        name_or_path: a file of `training/suites` without its extension, or a path.
        overrides: `data.key=value` and `evaluation.key=value` apply to all entries. `entries.NAME...` and
            `groups.NAME...` change one of them. `evaluation.protocols=[...]` keeps only these protocols.
        root: folder of the data sets; None: `suite.root`.

    Raises:
        UserError: the suite does not exist, or contains a mistake.
    """
    known = suite_files()
    path = known.get(name_or_path, Path(name_or_path))
    if name_or_path not in known and not (path.suffix in ENDINGS and path.is_file()):
        check_name("--suite", name_or_path, known, "a YAML file or a known suite")
    of_jobs = [text for text in overrides if text.startswith(("data.", "evaluation."))]
    others = [text for text in overrides if text not in of_jobs]
    plain = apply_overrides(read_yaml(path, SECTIONS, _CLASSES), others, SECTIONS, _CLASSES)
    _check_parts(plain)
    if root is not None:
        plain["suite"]["root"] = root
    if plain["suite"].get("root") == MISSING:
        raise UserError(
            f"--root: expected the folder of the data sets of {path.stem}, got none; add --root FOLDER"
        )
    heading: Heading = to_dataclass(Heading, plain["suite"], "suite")
    groups = {name: to_dataclass(Group, of, f"groups.{name}") for name, of in plain["groups"].items()}
    entries = {name: to_dataclass(Entry, of, f"entries.{name}") for name, of in plain["entries"].items()}
    known_protocols = [each for group in groups.values() for each in group.protocols]
    known_protocols += [each for entry in entries.values() for each in entry.instead.values()]
    _check_overrides(of_jobs, list(groups), list(entries), known_protocols)
    jobs = []
    for name, entry in entries.items():
        check_name(f"entries.{name}.metric", entry.metric, COLUMNS, "a known metric")
        if entry.groups == []:
            raise UserError(
                f"entries.{name}.groups: expected names of groups, got []; use null for all groups"
            )
        for group in groups if entry.groups is None else entry.groups:
            check_name(f"entries.{name}.groups", group, groups, "a group of the suite")
            job = _job(plain, (name, entry), (group, groups[group]), of_jobs, heading.root)
            if job.protocols:
                jobs.append(job)
    if not jobs:
        raise UserError(f"entries: expected a data set with protocols in {path}, got none; add one")
    return Suite(path.stem, heading.title, jobs)


def _job(
    plain: dict[str, dict[str, Any]],
    named_entry: tuple[str, Entry],
    named_group: tuple[str, Group],
    overrides: Sequence[str],
    root: str | None,
) -> Job:
    (name, entry), (group_name, group) = named_entry, named_group
    protocols = {each: entry.instead.get(each, each) for each in group.protocols}
    given = {
        "data": _merged(plain["data"], entry.data),
        "evaluation": _merged(
            plain["evaluation"],
            {"settings": group.settings},
            entry.evaluation,
            {"protocols": list(dict.fromkeys(protocols.values()))},
        ),
    }
    try:
        data, evaluation = read_sections(overrides, given)
    except UserError as error:
        raise UserError(f"entries.{name}: {error}") from error
    if evaluation.path is not None:
        raise UserError(
            f"evaluation.path: expected no value, because each data set has its own path, got "
            f"{evaluation.path}; use entries.{name}.data.path={evaluation.path}"
        )
    chosen = evaluation.protocols
    protocols = {each: run for each, run in protocols.items() if each in chosen or run in chosen}
    run = list(dict.fromkeys(protocols.values()))
    own = {each: values for each, values in evaluation.settings.items() if each in run}
    evaluation = replace(evaluation, protocols=run, settings=own)
    settings = {"metric": entry.metric} | _differences(data, evaluation)
    if root is not None:
        # An absolute path is never a data set on the Hub.
        data = replace(data, path=str((Path(root).expanduser() / data.path).absolute()))
    return Job(name, group_name, entry.metric, protocols, data, evaluation, settings)


def _merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return one nested mapping with the keys of all. A later value replaces an earlier value."""
    merged: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = _merged(merged[key], value) if both else value
    return merged


def _differences(data: DataConfig, evaluation: EvaluationConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults and can change a number, and protocol versions."""
    found: dict[str, Any] = {}
    for section, values in (("data", data), ("evaluation", evaluation)):
        defaults = default_values(type(values))
        for each in fields(values):
            value = getattr(values, each.name)
            key = f"{section}.{each.name}"
            if value != defaults.get(each.name) and each.name != "settings" and effect(key) != NOTHING:
                found[key] = value
    for name in evaluation.protocols:
        found[f"version of {name}"] = load_protocol(name).VERSION
        for key, value in evaluation.settings.get(name, {}).items():
            if key != "folder":
                found[f"evaluation.settings.{name}.{key}"] = value
    return found


def _check_parts(plain: dict[str, dict[str, Any]]) -> None:
    """Raise UserError for a group or an entry without keys, with an invalid name, or with unused protocols.

    Args:
        plain: the sections of the suite.
    """
    for section in ("groups", "entries"):
        for name, values in plain[section].items():
            is_name = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w.-]*", name)
            if not isinstance(values, dict) or not is_name:
                raise UserError(
                    f"{section}: expected names of letters and digits with keys, got {name!r}: {values!r}"
                )
    settings = {"": plain["evaluation"]} | {
        f"entries.{name}.": values.get("evaluation") or {} for name, values in plain["entries"].items()
    }
    for where, values in settings.items():
        if isinstance(values, dict) and "protocols" in values:
            raise UserError(
                f"{where}evaluation.protocols: expected no value in the file, because the groups name the "
                f"protocols, got {values['protocols']}; use groups.NAME.protocols"
            )
    known = {protocol for values in plain["groups"].values() for protocol in values.get("protocols") or []}
    for name, values in plain["entries"].items():
        for protocol in values.get("instead") or {}:
            check_name(f"entries.{name}.instead", protocol, PROTOCOLS, "known protocols")
            check_name(f"entries.{name}.instead", protocol, known, "protocols of the groups")


def _check_overrides(
    overrides: Sequence[str], groups: Sequence[str], entries: Sequence[str], known: Sequence[str]
) -> None:
    """Raise UserError if an override sets one path for several data sets, or names an unknown protocol.

    An unknown protocol is one that no group of the suite contains.

    Args:
        overrides: the overrides for all entries.
        groups: names of the groups.
        entries: names of the entries.
        known: the protocols of the suite.
    """
    sections = apply_overrides({}, overrides, ("data", "evaluation"))
    given, path = sections["evaluation"], sections["data"].get("path")
    if path is not None and len(entries) > 1:
        raise UserError(
            f"data.path: expected a path for one data set, got {path} for all {len(entries)}; use "
            f"entries.{entries[0]}.data.path={path}"
        )
    chosen, settings = given.get("protocols", []), given.get("settings") or {}
    named = [("--protocols", name) for name in (chosen if isinstance(chosen, list) else [chosen])]
    if isinstance(settings, dict):
        named += [(f"evaluation.settings.{name}", name) for name in settings]
    for where, name in named:
        if name not in known:
            raise UserError(
                f"{where}: expected protocols of the suite, {', '.join(dict.fromkeys(known))}, got {name}; "
                f"to run others, use groups.{next(iter(groups), 'NAME')}.protocols=[...]"
            )
