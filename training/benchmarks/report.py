# SPDX-License-Identifier: Apache-2.0
"""Writes the record of a benchmark as JSON, as a Markdown table and as a picture."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
REACHED, MISSED, AIM = "#2a7f62", "#c9822b", "#444444"


def write_report(
    folder: Path, device: torch.device, machine: Mapping[str, Any], rows: dict[str, Any]
) -> None:
    """Write `cpu.json`, `cpu.md` and `cpu.png`, or the same files for another device type.

    Rows of an earlier record that were not measured again do not change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{device.type}.json"
    record = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    today = datetime.now(UTC).date().isoformat()
    for name, row in rows.items():
        record["rows"][name] = {**row, "date": today}
    record["machine"] = {**machine, "packages": machine["packages"] | _peers()}
    file.write_text(json.dumps(record, indent=2) + "\n")
    file.with_suffix(".md").write_text(table(record))
    draw(record, file.with_suffix(".png"))


def _peers() -> dict[str, str]:
    import lightly

    return {"lightly": lightly.__version__}


def table(record: dict[str, Any]) -> str:
    """Return the rows as a Markdown table: the ratio with its quartiles, and the target."""
    lines = ["| task | compared with | speedup (quartiles), or memory ratio | target |", "|---|---|---|---|"]
    for name, row in record["rows"].items():
        if name == "trainer":
            lines.append(
                f"| {row['title']} | plain training loop | {row['extra_milliseconds']:.2f} ms "
                f"({row['extra_low']:.2f} to {row['extra_high']:.2f}); "
                f"monitor: {100 * row['monitor_share']:.1f} % of the training time | "
                f"{row['aim_milliseconds']:g} ms, which is 2 % of a 50 ms step |"
            )
            continue
        lines.append(
            f"| {row['title']} | {row['peer']} | {number(row['ratio'])} ({number(row['ratio_low'])} to "
            f"{number(row['ratio_high'])}) | {row['aim']:g} |"
        )
        if "memory_ratio" in row:
            lines.append(
                f"| peak memory of the row above | {row['peer']} | 1/{number(row['memory_ratio'])} "
                f"({row['ours_mib']:.0f} against {row['peer_mib']:.0f} MiB) | 1/{row['memory_aim']:g} |"
            )
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n".join([*lines, "", f"{machine['device']}, {machine['cores']} cores; {versions}.", ""])


def number(value: float) -> str:
    """Return the value with three digits, for example 11.8, 4.93 or 168."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(record: dict[str, Any], file: Path) -> None:
    """Draw one bar per row on a logarithmic axis, with a mark at its target."""
    from matplotlib.figure import Figure

    rows = [row for row in reversed(list(record["rows"].values())) if "ratio" in row]
    if not rows:  # only the overhead was measured
        return
    figure = Figure(figsize=(10.5, 0.34 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        ratio, low, high, aim = row["ratio"], row["ratio_low"], row["ratio_high"], row["aim"]
        axes.barh(place, ratio - 1, left=1, color=REACHED if ratio >= aim else MISSED, height=0.62)
        axes.plot([low, high], [place, place], color="black", linewidth=1)
        axes.plot([aim, aim], [place - 0.4, place + 0.4], color=AIM, linewidth=2)
        axes.text(max(ratio, high, aim) * 1.06, place, f"{number(ratio)}x", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows], fontsize=9)
    axes.set_xscale("log")
    least = min(
        1.0, 0.8 * min(row["ratio_low"] for row in rows)
    )  # a row below 1 is slower than the other library
    axes.set_xlim(least, 2 * max(row["ratio"] for row in rows))
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50) if tick >= least]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("speed relative to the other library; vertical mark: target")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=110)
