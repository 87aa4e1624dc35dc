# SPDX-License-Identifier: Apache-2.0
"""Correlates measurements without labels with accuracies: `python -m training.correlations FILE.json ...`.

The files are those of `training.compare`, or results files of `hf-ssl pretrain`. The program prints a table
in Markdown with Spearman's rank correlation over all runs, and over the means of the methods. Runs of one
method are not independent, so the correlation over the means is the more reliable number.

The records of `training.compare` contain the measurements of the monitor, among them RankMe of the encoder.
They contain neither alpha-ReQ nor LiDAR. Results files contain alpha-ReQ, and LiDAR if the protocol `quality`
was run. `training.quality_of_runs` measures both for finished runs. The last column of the table contains the
number of runs and their methods, because some methods may lack a measurement.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from hf_ssl.files import read_json, write_text

MEASUREMENTS = {
    "rank_me": "RankMe of the encoder",
    "embedding_rank": "RankMe of the embeddings, centered",
    "feature_std": "standard deviation of the features",
    "embedding_std": "standard deviation of the embeddings",
    "alignment": "alignment of the embeddings",
    "uniformity": "uniformity of the embeddings",
    "statistics.rank_me": "RankMe of the test features",
    "statistics.alpha_req": "alpha-ReQ of the test features",
    "statistics.uniformity": "uniformity of the test features",
    "quality.lidar": "LiDAR of the test images",
    "quality.alignment": "alignment of the test features",
}
ACCURACIES = {"knn": "k-NN", "linear": "linear probe"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="file of the table")
    arguments = parser.parse_args()
    text = table([record for file in arguments.files for record in read_json(file)])
    print(text, end="")
    if arguments.output is not None:
        write_text(arguments.output, text)


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the table of all measurements that at least three runs have."""
    rows = [row_of(record) for record in records]
    headings = " | ".join(f"{name}: over runs | over methods" for name in ACCURACIES.values())
    lines = [
        f"| measurement | {headings} | runs |",
        "|---|" + "---:|" * (2 * len(ACCURACIES) + 1),
    ]
    for key, name in MEASUREMENTS.items():
        known = [row for row in rows if key in row]
        if len(known) < 3:
            continue
        cells = [
            _text(rank_correlation(pairs))
            for accuracy in ACCURACIES
            for pairs in (pairs_of(known, key, accuracy), means_of(known, key, accuracy))
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {_covered(known)} |")
    return "\n".join(lines) + "\n"


def _covered(rows: Sequence[dict[str, Any]]) -> str:
    """Return the number of runs, and the names of the methods or, if there are many, their number."""
    names = sorted({row["method"] for row in rows})
    return f"{len(rows)} ({', '.join(names) if len(names) <= 5 else f'{len(names)} methods'})"


def _text(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else "-"


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the method, the accuracies and the measurements of the exported encoder of a run."""
    method, trained = record["method"], record["results"].get("trained", {})
    row: dict[str, Any] = {"method": method["name"] if isinstance(method, dict) else method}
    history = record.get("monitor", {}).get("history", [])
    row |= {key: value for key, value in (history[-1] if history else {}).items() if key in MEASUREMENTS}
    for section in ("statistics", "quality"):
        row |= {f"{section}.{key}": value for key, value in trained.get(section, {}).items()}
    for number in trained.get("protocols", ()):
        row.setdefault(number["protocol"], number["value"])
    row |= {key: trained[key] for key in ACCURACIES if isinstance(trained.get(key), float)}
    return {key: value for key, value in row.items() if value is not None}


def pairs_of(rows: Sequence[dict[str, Any]], key: str, accuracy: str) -> list[tuple[float, float]]:
    """Return (measurement, accuracy) of each run that has both."""
    return [(row[key], row[accuracy]) for row in rows if accuracy in row and key in row]


def means_of(rows: Sequence[dict[str, Any]], key: str, accuracy: str) -> list[tuple[float, float]]:
    """Return the means of `pairs_of` for each method."""
    means = []
    for method in sorted({row["method"] for row in rows}):
        pairs = pairs_of([row for row in rows if row["method"] == method], key, accuracy)
        if pairs:
            means.append((statistics.mean(x for x, _ in pairs), statistics.mean(y for _, y in pairs)))
    return means


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Return Spearman's correlation; NaN for fewer than 3 pairs or equal values."""
    first, second = {x for x, _ in pairs}, {y for _, y in pairs}
    if len(pairs) < 3 or len(first) < 2 or len(second) < 2:
        return math.nan
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


if __name__ == "__main__":
    main()
