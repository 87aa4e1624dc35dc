# SPDX-License-Identifier: Apache-2.0
"""Measures LiDAR, alignment and alpha-ReQ of finished runs, for `training.correlations`.

`python -m training.quality_of_runs RUN ... --data imagenette160 --output FILE.json` reads the encoder and
`facts.json` in the output folder of each run. It writes one record per run, with the method, the accuracies
of the run and the new measurements. All encoders receive the same test images and the same augmentation
(`standard_preset` of the protocol `quality`), so the numbers are comparable between methods.
"""

import argparse
from pathlib import Path
from typing import Any

from hf_ssl.building import open_labeled_splits
from hf_ssl.data import DataConfig
from hf_ssl.evaluation import EvaluationConfig, evaluate_encoder, load_encoder
from hf_ssl.files import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of hf-ssl pretrain")
    parser.add_argument("--data", required=True, help="labeled images, in the form of data.path")
    parser.add_argument("--images", type=int, default=200, help="number of test images for LiDAR")
    parser.add_argument("--views", type=int, default=10, help="number of views of each image")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the records")
    arguments = parser.parse_args()
    config = EvaluationConfig(
        protocols=["quality"],
        settings={"quality": {"images": arguments.images, "views": arguments.views}},
        max_train_images=20,  # the measurements need only test images
        max_test_images=800,
        precision="float32",
        cache=False,
    )
    splits = open_labeled_splits(DataConfig(path=arguments.data, cache="memory"), config)
    records = []
    for run in arguments.runs:
        facts = read_json(run / "facts.json")
        encoder, processor = load_encoder(str(run))
        measured = evaluate_encoder(encoder, *splits, config, processor, description=str(run))
        records.append(record(facts, dict(measured)))
        write_json(arguments.output, records)
        print(run.name, records[-1]["results"]["trained"])


def record(facts: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Return the method, the accuracies and the new measurements of a run, in the form for `correlations`.

    Args:
        facts: the content of `facts.json`.
        measured: the result of `evaluate_encoder` with `statistics` and `quality`.
    """
    old = facts["results"]["trained"]
    method = facts["method"]
    trained = {key: old[key] for key in ("knn", "linear", "protocols") if old.get(key) is not None}
    for key in ("knn", "linear"):  # earlier versions stored a dict
        if isinstance(trained.get(key), dict):
            trained[key] = trained[key]["accuracy"]
    if "protocols" in trained:
        trained["protocols"] = [
            {key: number[key] for key in ("protocol", "value")} for number in trained["protocols"]
        ]
    trained |= {key: measured[key] for key in ("statistics", "quality")}
    return {
        "method": method["name"] if isinstance(method, dict) else method,
        "date": facts["date"],
        "results": {"trained": trained},
    }


if __name__ == "__main__":
    main()
