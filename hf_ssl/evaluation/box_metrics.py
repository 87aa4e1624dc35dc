# SPDX-License-Identifier: Apache-2.0
"""Average precision of boxes as in COCO, by torchmetrics and pycocotools (layer 1).

Legend: N images, D detections of an image, O objects of an image, K classes.
"""

import io
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ssl.data.boxes import ImageObjects
from hf_ssl.evaluation.bootstrap import SAMPLES, bootstrap_error
from hf_ssl.resources import require


class Detections(NamedTuple):
    """The detections in an image.

    Attributes:
        boxes: (D, 4) float32, [x1, y1, x2, y2] in pixels.
        classes: (D,) int64 class numbers.
        scores: (D,) float32.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor


class BoxScores(NamedTuple):
    """Average precisions (AP) in [0, 1], with at most 100 detections for each image.

    Attributes:
        ap: mean AP over the IoU thresholds 0.50, 0.55, ..., 0.95 and over the classes with objects.
        ap50, ap75: mean AP over these classes, at the IoU thresholds 0.50 and 0.75.
        classes: {class number: mean AP over the IoU thresholds}, for each class with objects.
    """

    ap: float
    ap50: float
    ap75: float
    classes: dict[int, float]


def require_packages() -> None:
    """Raise UserError if the packages of the extra `detection` are not installed."""
    modules = {"torchmetrics": "torchmetrics.detection", "pycocotools": "pycocotools.cocoeval"}
    require("detection", "detection", modules)


def box_scores(found: Sequence[Detections], truth: Sequence[ImageObjects]) -> BoxScores:
    """Return the average precisions of the detections of N images.

    Args:
        found: the detections of each image.
        truth: the objects of each image. At least one image has an object.
    """
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(
        "xywh",
        # Those of pycocotools. torchmetrics rounds them to float32, and a recall of 0.6 is then below 0.6.
        iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
        rec_thresholds=np.linspace(0, 1, 101).tolist(),
        class_metrics=True,
        backend="pycocotools",
        sync_on_compute=False,  # every process has the detections of all images
    )
    metric.warn_on_many_detections = False
    metric.update(
        [{"boxes": _with_sizes(each.boxes), "scores": each.scores, "labels": each.classes} for each in found],
        [
            {
                "boxes": _with_sizes(torch.from_numpy(each.boxes)),
                "labels": torch.from_numpy(each.classes),
                "iscrowd": torch.from_numpy(each.crowd).long(),
            }
            for each in truth
        ],
    )
    values = metric.compute()
    numbers, of_classes = values["classes"].reshape(-1).tolist(), values["map_per_class"].reshape(-1).tolist()
    by_class = {number: value for number, value in zip(numbers, of_classes, strict=True) if value >= 0}
    return BoxScores(float(values["map"]), float(values["map_50"]), float(values["map_75"]), by_class)


def average_precision_error(
    found: Sequence[Detections], truth: Sequence[ImageObjects], seed: int, samples: int = SAMPLES
) -> float:
    """Return the bootstrap standard error of AP: its standard deviation over samples of the N images.

    Images are sampled with replacement. pycocotools matches the detections of each image only once. All
    samples use these matches.

    Args:
        found, truth: see `box_scores`.
        seed: seed of the samples.
        samples: number of samples.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):  # it prints its progress
        objects, detections = COCO(), COCO()
        objects.dataset = coco_data(truth, found)
        objects.createIndex()
        detections.dataset = objects.dataset | {"annotations": coco_annotations(found)}
        detections.createIndex()
        evaluator = COCOeval(objects, detections, "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluator.params.maxDets = [100]
        evaluator.evaluate()
        matches = evaluator.evalImgs
        order = np.arange(len(matches)).reshape(-1, len(truth))  # classes, images

        def value(rows: np.ndarray) -> float:
            evaluator.evalImgs = [matches[number] for number in order[:, rows].reshape(-1)]
            evaluator.accumulate()
            precision = evaluator.eval["precision"]
            return precision[precision > -1].mean() if (precision > -1).any() else math.nan

        return bootstrap_error(value, len(truth), seed, samples)


def coco_data(truth: Sequence[ImageObjects], found: Sequence[Detections]) -> dict[str, Any]:
    """Return objects in the layout of COCO's annotation files."""
    classes = {int(number) for each in truth for number in each.classes}
    classes |= {int(number) for each in found for number in each.classes}
    annotations: list[dict[str, Any]] = []
    for image, each in enumerate(truth):
        boxes = _with_sizes(torch.from_numpy(each.boxes)).tolist()
        for box, number, crowd in zip(boxes, each.classes.tolist(), each.crowd.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image, "category_id": number, "bbox": box,
                    "area": box[2] * box[3], "iscrowd": int(crowd),
                }
            )  # fmt: skip
    return {
        "images": [{"id": image} for image in range(len(truth))],
        "categories": [{"id": number} for number in sorted(classes)],
        "annotations": annotations,
    }


def coco_annotations(found: Sequence[Detections]) -> list[dict[str, Any]]:
    """Return detections in the layout of COCO's result files."""
    results: list[dict[str, Any]] = []
    for image, each in enumerate(found):
        boxes = _with_sizes(each.boxes).tolist()
        for box, number, score in zip(boxes, each.classes.tolist(), each.scores.tolist(), strict=True):
            results.append(
                {
                    "id": len(results) + 1, "image_id": image, "category_id": number, "bbox": box,
                    "area": box[2] * box[3], "iscrowd": 0, "score": score,
                }
            )  # fmt: skip
    return results


def _with_sizes(boxes: Tensor) -> Tensor:
    """Return boxes [x, y, width, height] for [x1, y1, x2, y2]."""
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
