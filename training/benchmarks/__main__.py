# SPDX-License-Identifier: Apache-2.0
"""Compares hf_ssl with other libraries: `python -m training.benchmarks [ROW ...] [--output FOLDER]`.

Run `pip install -c constraints.txt ".[bench]"` first. Both sides of a row run alternately. The table contains
the median and the quartiles of the ratios of neighboring runs. The program writes NAME.json with machine and
versions, NAME.png and NAME.md. NAME is cpu or the type of the accelerator. If you measure only some rows,
they replace the same rows of an existing record.
"""

import argparse
import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from hf_ssl.allocation import kept_memory
from hf_ssl.cards import environment
from hf_ssl.evaluation import fastest_device
from hf_ssl.precision import fastest_precision
from training.benchmarks import evaluating, losses, steps, views
from training.benchmarks.overhead import trainer_overhead
from training.benchmarks.pairs import compare
from training.benchmarks.peak import peak_mib
from training.benchmarks.report import RESULTS, write_report
from training.benchmarks.row import Row

ROWS = {row.name: row for module in (views, losses, steps, evaluating) for row in module.ROWS}
OVERHEAD = "trainer"


def main() -> None:
    arguments = _parser().parse_args()
    for name in ("lightly", "transformers", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    if arguments.peak:
        row, side = arguments.peak
        print(peak_mib(ROWS[row], side, torch.device(arguments.device)))
        return
    unknown = set(arguments.rows) - {*ROWS, OVERHEAD}
    if unknown:
        raise SystemExit(
            f"ROW: expected some of {', '.join([*ROWS, OVERHEAD])}, got {', '.join(sorted(unknown))}"
        )
    device = torch.device(arguments.device)

    def keep(name: str, record: dict[str, Any]) -> None:
        shown = {key: value for key, value in record.items() if isinstance(value, float)}
        print(
            f"{name}: " + json.dumps({key: float(f"{value:.3g}") for key, value in shown.items()}), flush=True
        )
        write_report(arguments.output, device, environment(device), {name: record})

    precision, names = fastest_precision(device.type).name, []
    for name in arguments.rows or [*ROWS, OVERHEAD]:
        row = ROWS.get(name)
        if row is not None and row.precision not in (None, precision):
            print(f"{name}: not measured, because auto chooses {precision} on this device", flush=True)
        elif device.type == "cpu" or (row is not None and row.accelerator):
            names.append(name)
    if len(names) > 1:
        for name in names:  # in an own process, because a row can change the allocator for later ones
            subprocess.run(_command(arguments, name), check=True)
    elif names == [OVERHEAD]:
        keep(OVERHEAD, {"title": "overhead of SSLTrainer per step", **trainer_overhead()})
    elif names:
        keep(names[0], measure(ROWS[names[0]], device, arguments.repeats))


def measure(row: Row, device: torch.device, repeats: int | None) -> dict[str, Any]:
    """Return the record of one row.

    Times are measured in this process. Memory is measured in a new process for each side.
    """
    threads = torch.get_num_threads()
    clock = (
        row.clock if device.type == "cpu" else "wall"
    )  # the CPU time of a process excludes the accelerator
    torch.set_num_threads(row.threads or threads)
    try:
        # SSLTrainer keeps freed memory during training. The other library gets the same advantage.
        with kept_memory(device.type if row.unit == "step" else "none"):
            timing = compare(row.build(device), repeats or row.repeats, clock, device)
    finally:
        torch.set_num_threads(threads)
    record = {
        "title": row.title,
        "peer": row.peer,
        "aim": row.aim,
        "unit": row.unit,
        "threads": row.threads or threads,
        "clock": clock,
        **timing.summary(),
    }
    if row.memory_aim is not None:
        ours, peer = (_peak_elsewhere(row, side, device) for side in ("ours", "peer"))
        record |= {
            "memory_aim": row.memory_aim,
            "ours_mib": ours,
            "peer_mib": peer,
            "memory_ratio": peer / ours,
        }
    return record


def _command(arguments: argparse.Namespace, row: str) -> list[str]:
    """Return the command that measures one row with the same options."""
    options = ["--device", arguments.device, "--output", str(arguments.output)]
    repeats = [] if arguments.repeats is None else ["--repeats", str(arguments.repeats)]
    return [sys.executable, "-m", "training.benchmarks", row, *options, *repeats]


def _peak_elsewhere(row: Row, side: str, device: torch.device) -> float:
    """Return the peak memory of one side in MiB, measured in a new process."""
    command = [sys.executable, "-m", "training.benchmarks", "--device", str(device), "--peak", row.name, side]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m training.benchmarks", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "rows", nargs="*", metavar="ROW", help=f"one of {', '.join([*ROWS, OVERHEAD])}; default: all"
    )
    parser.add_argument(
        "--device", default=str(fastest_device()), help="cpu, cuda, ... (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, help="number of pairs; default: the number of each row")
    parser.add_argument("--output", type=Path, default=RESULTS, help="output folder of the record")
    parser.add_argument("--peak", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
