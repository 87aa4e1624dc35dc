# SPDX-License-Identifier: Apache-2.0
"""Names the rows of a comparison by the properties in which their runs differ."""

import json
from collections.abc import Sequence
from typing import Any

import yaml

from hf_ssl.cards.facts_files import LEFT_OUT
from hf_ssl.cards.short_texts import distinguished
from hf_ssl.cards.text import ENCODERS
from hf_ssl.effects import NOTHING, WEIGHTS, effect
from hf_ssl.errors import counted
from hf_ssl.methods import METHODS

# Keys of `evaluation` that have no effect on the weights of a supervised run. Its other keys can have one.
_OF_TEST = ("path", "test_split", "max_test_images")


def row_labels(names: Sequence[str], entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return a different text for each row: the method, and further properties if rows have the same method.

    Args:
        names: for each row, the key of its numbers in `entry["results"]`: "trained", "start", "untrained" or
            "raw_pixels".
        entries: for each row, the entry of its first run.
    """
    settings = [_differing_settings(entry, entries) for entry in entries]
    return distinguished([_label_parts(*each) for each in zip(names, entries, settings, strict=True)])


def _label_parts(name: str, entry: dict[str, Any], settings: str) -> list[str]:
    """Return the method and the properties that can distinguish the run from others of this method."""
    backbone, data, training = entry["backbone"], entry["data"], entry["training"]
    network = [backbone["class_name"].removesuffix("Model"), f"{backbone['parameters']:,} parameters"]
    if name in ("untrained", "raw_pixels"):  # they do not depend on the training
        network = network if name == "untrained" else ["", ""]
        return [ENCODERS[name], *network, f"on {entry['evaluation']['name']}", *[""] * 6]
    pooling = f"pooling {pooling_of(entry)}"
    if training is None:
        weights = (entry["weights"] or "unknown")[:8]
        return [entry["model"], *network, f"weights {weights}", pooling, *[""] * 5]
    method = METHODS[entry["method"]].title if entry["method"] in METHODS else entry["method"]
    return [
        f"{ENCODERS[name]} of {method}" if name == "start" else method,
        *network,
        f"on {data['name']}",
        pooling,
        counted(training["steps"], "step"),
        f"recipe {entry['recipe']}",
        ", ".join(weight_overrides(entry)),
        settings,
        f"revision {data['revision'][:8]}, batch size {training['batch_size']}, {training['precision']}",
    ]


def _differing_settings(entry: dict[str, Any], entries: Sequence[dict[str, Any]]) -> str:
    """Return the settings in which a run differs from other runs of its recipe."""
    given = [each.get("settings") for each in entries if each["recipe"] == entry["recipe"]]
    own, others = entry.get("settings"), [each for each in given if each is not None]
    if own is None:  # of an older version
        return "settings not recorded" if others else ""
    keys = sorted(
        key for key in set().union(own, *others) if any(each.get(key) != own.get(key) for each in others)
    )
    return ", ".join(f"{key} {json.dumps(own[key]) if key in own else 'default'}" for key in keys)


def weight_overrides(entry: dict[str, Any]) -> list[str]:
    """Return the overrides that distinguish a run from others of its recipe."""
    return [
        text
        for override in entry["overrides"]
        for text in _single_keys(override)
        if _distinguishes(text.partition("=")[0], entry["method"])
    ]


def _distinguishes(key: str, method: str | None) -> bool:
    """Return whether a setting distinguishes the runs of a recipe.

    Supervised runs train with the settings of `evaluation`, so these settings distinguish them.
    """
    section, _, name = key.partition(".")
    if method == "supervised" and section == "evaluation":
        is_folder = name.startswith("settings.") and name.endswith(".folder")
        return effect(key) != NOTHING and name not in _OF_TEST and not is_folder
    return key not in LEFT_OUT and effect(key) == WEIGHTS


def _single_keys(override: str) -> list[str]:
    """Return an override with one text for each key: "data={a: 1, b: 2}" sets two keys."""
    section, _, value = override.partition("=")
    values = yaml.safe_load(value) if "." not in section else None
    if not isinstance(values, dict):
        return [override]
    return [f"{section}.{key}={each}" for key, each in values.items()]


def pooling_of(entry: dict[str, Any]) -> str | None:
    """Return the pooling of the evaluated features. One encoder with several poolings has several rows."""
    pooling: str | None = entry["results"].get("trained", {}).get("pooling")
    return pooling
