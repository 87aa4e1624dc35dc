# SPDX-License-Identifier: Apache-2.0
"""Finds mistakes in the file and the overrides of a suite that would otherwise have no effect (layer 5)."""

import re
from collections.abc import Sequence
from typing import Any

from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation.protocols import PROTOCOLS
from hf_ssl.recipe.source import apply_overrides


def check_parts(plain: dict[str, dict[str, Any]]) -> None:
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
    for name, values in plain["entries"].items():
        for protocol in values.get("instead") or {}:
            check_name(f"entries.{name}.instead", protocol, PROTOCOLS, "known protocols")


def check_overrides(
    overrides: Sequence[str], groups: Sequence[str], entries: Sequence[str], known: Sequence[str]
) -> None:
    """Raise UserError for a path for all data sets, and for protocols or settings of protocols of no group.

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
