# SPDX-License-Identifier: Apache-2.0
"""Pictures of evaluation results: the k curve of k-NN, accuracy of probes per epoch, detections (layer 1)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_ssl.evaluation.results import EncoderResult, ProtocolResult, find_results, standard_error
from hf_ssl.files import replaced_file

K_CURVE, PROBE_EPOCHS, DETECTIONS = "knn_curve.png", "probe_epochs.png", "detections.png"
CAPTIONS = {
    K_CURVE: "Accuracy of weighted k-NN on test images for each k. The ring marks the k and the temperature "
    "that were selected on held-out training images; it is not on the curve if the temperature "
    "differs. The bands show one standard error.",
    PROBE_EPOCHS: "Accuracy of the final probes on training images (dashed) and on test images after each "
    "epoch. No epoch was selected.",
    DETECTIONS: "Boxes in test images: the objects (dashed, white) and the detections with a score of at "
    "least 0.5 (one color for each class).",
}
"""Name of each picture -> its caption."""
COLORS = (
    "#332288", "#cc6677", "#117733", "#ddaa33", "#88ccee",
    "#882255", "#44aa99", "#999933", "#aa4499", "#666666",
)  # fmt: skip
"""Paul Tol's "muted" colors, with a darker yellow and gray. Color-blind readers can distinguish them."""


def write_plots(
    folder: Path, results: Mapping[str, EncoderResult], names: Mapping[str, str], test: Any = None
) -> list[str]:
    """Write the pictures of results and return their names. Pictures of earlier results are removed.

    Args:
        folder: existing folder for the pictures of `CAPTIONS`.
        results: the results by encoder: "trained", "raw_pixels", ...
        names: names of the encoders in the legends; a missing name is the key itself.
        test: the test images, a `LabeledImages`. Without them, `DETECTIONS` is not drawn.
    """
    written = []
    draw: dict[str, Callable[..., Any]] = {
        K_CURVE: k_curve,
        PROBE_EPOCHS: probe_epochs,
        DETECTIONS: partial(detections, test=test),
    }
    for picture, function in draw.items():
        figure = function({names.get(key, key): result for key, result in results.items()})
        if figure is None:
            (folder / picture).unlink(missing_ok=True)
            continue
        with replaced_file(folder / picture) as staging:
            figure.savefig(staging, format="png")
        written.append(picture)
    return written


def k_curve(results: Mapping[str, EncoderResult]) -> Any:
    """Return a figure with the k-NN accuracy over k, or None if there are fewer than two values of k.

    The temperature is the main one of each result. A band shows one standard error.

    Args:
        results: the results by name of the encoder.
    """
    lines = {name: _cells(result) for name, result in results.items()}
    lines = {name: cells for name, cells in lines.items() if len(cells) > 1}
    if not lines:
        return None
    figure, (axes,) = _new_figure(1)
    has_ring, others = False, False  # others: a selected temperature is not that of the lines
    for number, (name, cells) in enumerate(lines.items()):
        color, line = color_of(number), line_of(number)
        images = results[name]["images"]["test"]
        counts, values = zip(*sorted(cells.items()), strict=True)
        errors = [standard_error(value, images) for value in values]
        low, high = (
            [value + sign * error for value, error in zip(values, errors, strict=True)] for sign in (-1, 1)
        )
        style: Any = {"linewidth": 1.4, "marker": "o", "markersize": 3}
        axes.plot(counts, values, label=name, color=color, linestyle=line, **style)
        axes.fill_between(counts, low, high, color=color, alpha=0.15, linewidth=0)
        for selected in find_results(results[name], "knn"):
            k = selected["selection"].get("neighbors")
            if k in cells:
                style = {"marker": "o", "markersize": 9, "linestyle": "none", "fillstyle": "none"}
                axes.plot(k, selected["value"], color=color, label="_", **style)
                has_ring, others = True, others or selected["value"] != cells[k]
    if has_ring:
        style = {"marker": "o", "markersize": 9, "linestyle": "none", "fillstyle": "none", "color": "black"}
        text = "selected k and temperature"
        axes.plot([], [], label=text + ("; beside its line: another temperature" if others else ""), **style)
    temperature = find_results(results[next(iter(lines))], "knn")[0]["details"]["temperature"]
    ticks = sorted({k for cells in lines.values() for k in cells})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{k:,}" if k in _spread(ticks) else "" for k in ticks])
    axes.minorticks_off()
    _label(axes, f"k-NN, temperature {temperature:g} (bands: one standard error)", "k")
    axes.get_legend().remove()  # the curves have no place for it that is always free
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.set_figheight(3.8 + 0.17 * -(-(len(lines) + has_ring) // 2))
    return figure


def _cells(result: EncoderResult) -> dict[int, float]:
    """Return {k: accuracy} of k-NN at the main temperature."""
    for each in find_results(result, "knn"):
        details = each["details"]
        return {
            cell["neighbors"]: cell["accuracy"]
            for cell in details.get("grid", ())
            if cell.get("temperature") == details["temperature"] and "accuracy" in cell
        }
    return {}


def _spread(ticks: Sequence[int]) -> list[int]:
    """Return the ascending values that are at least 1.6 times the one before. Their labels have room."""
    kept: list[int] = []
    for value in ticks:
        if not kept or value >= 1.6 * kept[-1]:
            kept.append(value)
    return kept


def probe_epochs(results: Mapping[str, EncoderResult]) -> Any:
    """Return a figure with one panel per encoder and the accuracies of its probes per epoch, or None.

    Args:
        results: the results by name of the encoder.
    """
    probes = {name: _probes(result) for name, result in results.items()}
    probes = {name: found for name, found in probes.items() if found}
    if not probes:
        return None
    figure, panels = _new_figure(len(probes))
    for (name, found), axes in zip(probes.items(), panels, strict=True):
        for probe, color in zip(found, COLORS, strict=False):
            curves = probe["details"]["epochs"]
            for split, style in (("train", "--"), ("test", "-")):
                values = curves[split]
                # The epochs of probes differ, so the axis is the share of the training.
                share = [100 * (number + 1) / len(values) for number in range(len(values))]
                label = probe["column"] if split == "test" else None
                axes.plot(share, values, style, color=color, linewidth=1.2, label=label)
        _label(axes, name, "share of the epochs in % (dashed: training images)")
    return figure


def _probes(result: EncoderResult) -> list[ProtocolResult]:
    return [each for each in result["protocols"] if each["details"].get("epochs")]


def detections(results: Mapping[str, EncoderResult], test: Any) -> Any:
    """Return a figure with one row of test images for each detector of the first encoder, or None.

    Args:
        results: the results by name of the encoder.
        test: the test images, a `LabeledImages`; None: no picture.
    """
    rows = [each for result in list(results.values())[:1] for each in find_results(result, "detection")]
    if not rows or test is None or not test.has_boxes:
        return None
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns, names = len(rows[0]["details"]["examples"]), rows[0]["details"]["classes"]
    figure = Figure(figsize=(2.2 * columns, 2.1 * len(rows) + 0.3), layout="constrained", dpi=110)
    panels = figure.subplots(len(rows), columns, squeeze=False)
    shown: set[int] = set()
    for result, line in zip(rows, panels, strict=True):
        for example, axes in zip(result["details"]["examples"], line, strict=True):
            axes.imshow(test[example["row"]].permute(1, 2, 0).numpy(), cmap="gray")
            axes.set_xticks([])
            axes.set_yticks([])
            for box in test.objects.images[example["row"]].boxes.tolist():
                _draw_box(axes, box, "white", "--")
            for *box, number, _ in example["boxes"]:
                _draw_box(axes, box, color_of(number), "-")
                shown.add(number)
        line[0].set_ylabel(result["column"], fontsize=8)
    found = [
        Patch(facecolor="none", edgecolor=color_of(number), label=f"detected: {names[number]}")
        for number in sorted(shown)[: len(COLORS)]
    ] or [Patch(facecolor="none", label="no detection with a score of 0.5")]
    objects = Patch(facecolor="lightgray", edgecolor="black", linestyle="--", label="objects (dashed, white)")
    legend = [objects, *found]
    options: Any = {"loc": "outside lower center", "ncols": 4, "fontsize": 8, "frameon": False}
    figure.legend(handles=legend, **options)
    return figure


def _draw_box(axes: Any, box: Sequence[float], color: str, style: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    axes.add_patch(
        Rectangle(
            (left, top),
            right - left,
            bottom - top,
            fill=False,
            edgecolor=color,
            linestyle=style,
            linewidth=0.9,
        )
    )


def color_of(number: int) -> str:
    """Return the color of a class or of a line in a plot."""
    return COLORS[number % len(COLORS)]


def line_of(number: int) -> str:
    """Return the style of a line in a plot. Ten lines with different colors share a style."""
    return ("-", "--", ":")[number // len(COLORS) % 3]


def _new_figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # pyplot would need global state

    figure = Figure(figsize=(5.2 * panels if panels > 1 else 6.2, 3.8), layout="constrained", dpi=110)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)
    return figure, list(axes[0])


def _label(axes: Any, title: str, horizontal: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(horizontal, fontsize=8)
    axes.set_ylabel("accuracy", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
