# SPDX-License-Identifier: Apache-2.0
"""Metrics for the `evaluate` library (layer 2).

Each folder contains one module of the library. The modules only convert inputs and call the functions of
`hf_ssl.evaluation`, so that the command and the modules have one definition of each metric.
"""

from pathlib import Path
from typing import Any

from hf_ssl.errors import check_name

METRICS = {
    "knn_accuracy": "Accuracy of weighted k-NN classification of features.",
    "linear_probe": "Accuracy of a linear classifier on frozen features.",
    "mean_per_class_accuracy": "Mean of the accuracies of the classes.",
    "mean_average_precision": "Mean average precision for images with several labels (11 points, VOC2007).",
    "rank_me": "Effective number of dimensions of features.",
    "lidar": "Effective number of dimensions that distinguish images, from several views of each image.",
}


def metric_folder(name: str) -> Path:
    """Return the folder of a module for `evaluate.load`, or raise UserError for an unknown name."""
    check_name("metric", name, METRICS, f"one of {', '.join(METRICS)}")
    return Path(__file__).parent / name


def load_metric(name: str, **options: Any) -> Any:
    """Return a metric as a module of the `evaluate` library, without network.

    The module has `compute`, `add`, `add_batch` and `evaluate.combine` of the library. It can also be called
    with the predictions of a `Trainer`: `Trainer(..., compute_metrics=load_metric("knn_accuracy"))`.

    Args:
        name: one of `METRICS`.
        options: settings of the metric, which `compute` can change (`neighbors=5`), and the arguments of
            `evaluate.load` (`num_process`, `process_id`, `experiment_id`, `keep_in_memory`, ...).

    Raises:
        UserError: the name or an option is unknown.
    """
    import evaluate  # it takes a second

    return evaluate.load(str(metric_folder(name)), **options)
