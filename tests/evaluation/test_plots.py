# SPDX-License-Identifier: Apache-2.0
"""The pictures of evaluation results show the numbers of the results."""

import copy

import pytest
import torch
from messages import missing

from hf_ssl.evaluation import evaluate_features
from hf_ssl.evaluation.plots import K_CURVE, PROBE_EPOCHS, k_curve, probe_epochs, write_plots


@pytest.fixture(scope="module")
def result() -> dict:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(360) % 3
    features = torch.eye(3, 12)[labels] + torch.randn(360, 12, generator=generator)
    settings = {"protocols": ["knn", "linear"], "settings": {"linear": {"epochs": 3}}}
    return evaluate_features(settings, features[:240], labels[:240], features[240:], labels[240:])


def lines(axes) -> dict[str, tuple[list, list]]:
    """Return the labeled lines of a panel."""
    found = {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}
    return {label: (list(line.get_xdata()), list(line.get_ydata())) for label, line in found.items()}


def test_the_k_curve_shows_every_encoder_and_the_selected_k(result) -> None:
    other = copy.deepcopy(result)
    for cell in other["protocols"][0]["details"]["grid"]:
        cell["accuracy"] /= 2
    figure = k_curve({"trained": result, "raw pixels": other})
    (axes,), (legend,) = figure.axes, figure.legends
    shown = lines(axes)
    names = [text.get_text().partition(";")[0] for text in legend.get_texts()]
    assert names == ["trained", "raw pixels", "selected k and temperature"]
    main, selected = result["protocols"][:2]
    grid = {
        cell["neighbors"]: cell["accuracy"] for cell in main["details"]["grid"] if cell["temperature"] == 0.07
    }
    assert shown["trained"] == (list(grid), list(grid.values()))
    assert shown["raw pixels"][1] == [value / 2 for value in grid.values()]
    assert {5, 10, 20, 50, 100, 200} <= set(grid)
    ring = next(line for line in axes.get_lines() if line.get_markersize() > 5)
    k = selected["selection"]["neighbors"]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([k], [selected["value"]])
    assert axes.get_xscale() == "log" and not missing(axes.get_title(), 0.07, "standard error")


def test_the_ring_has_the_accuracy_of_the_selected_temperature(result) -> None:
    """The curve has the main temperature, so the ring is beside it if another one was selected."""
    changed = copy.deepcopy(result)
    changed["protocols"][1] |= {"value": 0.123, "selection": {"neighbors": 5, "temperature": 0.1}}
    (axes,) = k_curve({"trained": changed}).axes
    ring = next(line for line in axes.get_lines() if line.get_markersize() > 5)
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([5], [0.123])
    assert any("another temperature" in name for name in lines(axes))


def test_the_legend_of_the_k_curve_covers_no_curve(result) -> None:
    figure = k_curve({f"encoder {number}": result for number in range(7)})
    figure.draw_without_rendering()
    (axes,), (legend,) = figure.axes, figure.legends
    assert not axes.get_tightbbox().overlaps(legend.get_window_extent())


def test_probes_per_epoch_show_both_splits(result) -> None:
    without = copy.deepcopy(result)
    without["protocols"] = [each for each in without["protocols"] if each["protocol"] == "knn"]
    figure = probe_epochs({"trained": result, "raw pixels": without})
    (axes,) = figure.axes
    assert axes.get_title() == "trained"
    train, test = axes.get_lines()
    curves = result["protocols"][-1]["details"]["epochs"]
    assert (list(train.get_ydata()), list(test.get_ydata())) == (curves["train"], curves["test"])
    assert (train.get_linestyle(), test.get_linestyle()) == ("--", "-")
    assert list(test.get_xdata()) == pytest.approx([100 / 3, 200 / 3, 100])
    assert lines(axes).keys() == {"linear probe"}


def test_only_pictures_with_numbers_are_written_and_earlier_ones_are_removed(result, tmp_path) -> None:
    assert write_plots(tmp_path, {"trained": result}, {"trained": "this encoder"}) == [K_CURVE, PROBE_EPOCHS]
    for name in (K_CURVE, PROBE_EPOCHS):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    knn = result | {"protocols": result["protocols"][:1]}
    assert write_plots(tmp_path, {"trained": knn}, {}) == [K_CURVE]
    assert not (tmp_path / PROBE_EPOCHS).exists()
    old = copy.deepcopy(knn)  # of version 0.1, without a grid of accuracies
    old["protocols"][0]["details"]["grid"] = [{"neighbors": 20}]
    assert write_plots(tmp_path, {"trained": old}, {}) == []
    assert write_plots(tmp_path, {}, {}) == [] and not list(tmp_path.iterdir())
