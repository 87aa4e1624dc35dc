# SPDX-License-Identifier: Apache-2.0
"""Compares all methods with one small budget: `python -m training.compare data.path=FOLDER [KEY=VALUE ...]`.

The program trains every method of compare.yaml with several seeds. Each run has its own process. The program
evaluates each exported encoder as `hf-ssl pretrain` does. It writes NAME.json with the records of the runs,
NAME.md with the table, and NAME.png with the k-NN accuracy during training. Finished runs are not repeated.
"""

import argparse
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from hf_ssl.cards import read_facts
from hf_ssl.errors import check_name
from hf_ssl.evaluation import EncoderResult, find_results
from hf_ssl.files import newest_checkpoint, read_json
from hf_ssl.resources import usable_cores

HERE = Path(__file__).parent
PLAN = yaml.safe_load((HERE / "compare.yaml").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--methods", nargs="+", default=list(PLAN["methods"]), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--at-once", type=int, default=1, help="number of parallel runs, which share the cores"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument(
        "--output",
        type=Path,
        default=HERE / "results" / "compare",
        help="path of the results without an extension",
    )
    arguments = parser.parse_intermixed_args()
    for method in arguments.methods:
        check_name("--methods", method, PLAN["methods"], "methods in training/compare.yaml")
    write = partial(write_results, arguments.output, arguments.runs, arguments.methods, arguments.seeds)
    jobs = [
        (method, arguments.runs / f"{method}-{seed}", seed)
        for seed in range(arguments.seeds)
        for method in arguments.methods
    ]
    jobs = [job for job in jobs if not (job[1] / "facts.json").exists()]
    # Each run has a new process, so that its memory can be measured. The fork server imports everything once.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["hf_ssl.run", "hf_ssl.recipe"])
    threads = max(1, usable_cores() // arguments.at_once)
    with ProcessPoolExecutor(arguments.at_once, processes, max_tasks_per_child=1) as pool:
        runs = [
            pool.submit(train, method, folder, threads, [
                *arguments.overrides,
                f"training.output_dir={folder}",
                f"training.seed={seed}",
                f"evaluation.baselines={str(method == next(iter(PLAN['methods']))).lower()}",
                "training.disable_tqdm=true",
            ])
            for method, folder, seed in jobs
        ]  # fmt: skip
        for run in tqdm(as_completed(runs), "runs", total=len(runs)):
            run.result()
            write()
    write()


def train(method: str, folder: Path, threads: int, overrides: list[str]) -> None:
    """Make one run from a recipe file, which is written to the folder of the runs."""
    import torch

    from hf_ssl.recipe import load_recipe
    from hf_ssl.run import pretrain

    torch.set_num_threads(threads)
    file = folder.parent / f"{method}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(sections(method), sort_keys=False))
    pretrain(load_recipe(file, overrides))


def sections(method: str) -> dict[str, dict[str, Any]]:
    """Return the recipe of a method: the common values and the values of the method in compare.yaml."""
    own = PLAN["methods"].get(method) or {}
    common = {section: {**values, **own.get(section, {})} for section, values in PLAN["common"].items()}
    return {"method": {"name": method, **own.get("method", {})}, **common}


def write_results(output: Path, runs: Path, methods: list[str], seeds: int) -> None:
    """Write the records, the table and the picture of the finished runs. Records of other methods stay."""
    found = {
        method: [record for seed in range(seeds) if (record := read(runs / f"{method}-{seed}")) is not None]
        for method in methods
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    file = output.with_suffix(".json")
    for record in json.loads(file.read_text()) if file.exists() else []:
        if record["method"]["name"] not in methods:
            found.setdefault(record["method"]["name"], []).append(record)
    order = [*PLAN["methods"], *found]
    found = {method: found[method] for method in sorted(found, key=order.index)}
    records = [record for each in found.values() for record in each]
    file.write_text(json.dumps(records, indent=1) + "\n")
    output.with_suffix(".md").write_text(table(found))
    draw(found, output.with_suffix(".png"))


def read(folder: Path) -> dict[str, Any] | None:
    """Return the record of a run without the values that all runs share; None if the run is not finished."""
    if not (folder / "facts.json").exists():
        return None
    facts = read_facts(folder)
    history = read_json((newest_checkpoint(folder) or folder) / "trainer_state.json")["log_history"]
    return {
        "method": facts["method"],
        "overrides": [item for item in facts["recipe"]["overrides"] if not item.startswith(_PATHS)],
        "data": facts["data"],
        "training": facts["training"],
        "peak_memory_gib": max(record["memory_gib"] for record in history if "memory_gib" in record),
        "monitor": facts["monitor"],
        "environment": facts["environment"],
        "date": facts["date"],
        "results": {name: _numbers(result) for name, result in facts["results"].items()},
    }


def _numbers(result: EncoderResult) -> dict[str, Any]:
    """Return the two accuracies of an encoder and k; None for what was not measured."""
    knn, linear = (next(iter(find_results(result, protocol)), None) for protocol in ("knn", "linear"))
    return {
        "knn": knn and knn["value"],
        "neighbors": knn and knn["details"]["neighbors"],
        "linear": linear and linear["value"],
    }


_PATHS = ("data.path=", "training.output_dir=", "evaluation.path=")


def mean_and_spread(values: list[float]) -> str:
    """Return the mean and the standard deviation over seeds, for example "0.512 ± 0.004"."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table with a row for each method, for the untrained encoder and for raw pixels."""
    everything = [record for records in found.values() for record in records]
    lines = [
        f"| method | {knn_name(everything)} | linear probe | seconds | peak memory, GiB | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for records in found.values():
        if records:
            lines.append(
                f"| {records[0]['method']['title']} | {scores(records, 'trained')} | "
                f"{statistics.mean(record['training']['seconds'] for record in records):.0f} | "
                f"{statistics.mean(record['peak_memory_gib'] for record in records):.1f} | {len(records)} |"
            )
    for name, title in (("untrained", "untrained"), ("raw_pixels", "raw pixels")):
        with_baseline = [record for record in everything if name in record["results"]]
        if with_baseline:
            lines.append(f"| {title} | {scores(with_baseline, name)} | | | {len(with_baseline)} |")
    return "\n".join(lines) + "\n"


def knn_name(records: list[dict[str, Any]]) -> str:
    """Return "20-NN" with the k of all results; "k-NN" if they differ. Older records have k = 20."""
    counts = {result.get("neighbors", 20) for record in records for result in record["results"].values()}
    return f"{counts.pop() if len(counts) == 1 else 'k'}-NN"


def scores(records: list[dict[str, Any]], name: str) -> str:
    """Return the cells of the two accuracies, of k-NN and of the linear probe."""
    columns = []
    for measure in ("knn", "linear"):
        values = [record["results"][name][measure] for record in records]
        columns.append("" if None in values else mean_and_spread(values))
    return " | ".join(columns)


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the k-NN accuracy of the monitor, with a panel for each method and a line for each seed."""
    from matplotlib.figure import Figure

    shown = {method: records for method, records in found.items() if records}
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    baselines = [record["results"] for records in shown.values() for record in records]
    raw = [result["raw_pixels"]["knn"] for result in baselines if "raw_pixels" in result]
    for axes, records in zip(panels, shown.values(), strict=False):
        for record in records:
            history = [entry for entry in record["monitor"]["history"] if entry.get("knn") is not None]
            if history:
                axes.plot(
                    [e["step"] for e in history], [e["knn"] for e in history], marker="o", markersize=2.5
                )
            axes.plot(record["training"]["steps"], record["results"]["trained"]["knn"], "k*", markersize=6)
        if raw:
            axes.axhline(statistics.mean(raw), color="gray", linestyle=":", linewidth=1)
        axes.set_title(records[0]["method"]["title"], fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.suptitle(
        f"{knn_name([record for records in shown.values() for record in records])} accuracy during training "
        "(stars: exported encoder, all images; dotted: raw pixels)",
        fontsize=9,
    )
    figure.supxlabel("step", fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
