# SPDX-License-Identifier: Apache-2.0
"""Plots and table of a sweep: error bars, colors, curves of different lengths, and values of the axes."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from hf_ssl.cards.sweep_plots import draw, draw_curves
from hf_ssl.cards.sweep_text import Measured, _shared_settings, csv_text, page, words_of_error

SEEDS, IMAGES = "the standard deviation over seeds", "the standard error over the test images"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The saved figures."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, format: figures.append(figure))
    return figures


def measured(name: str, values: dict[str, Any], seed: int = 0, **numbers: float | None) -> Measured:
    """Return a run with an accuracy for each protocol."""
    about = {"text": "how", "standard_error": 0.01}
    protocols = [
        about | {"id": f"{key}-1", "key": key, "column": key, "value": value}
        for key, value in numbers.items()
    ]
    results: Any = {"trained": {"protocols": protocols, "statistics": {"rank_me": 2.5}}}
    return Measured(name, "", values, seed, {}, results, None, "photos")


def test_plot_and_page_say_what_the_error_bars_are(drawn: list[Figure]) -> None:
    one, two = measured("x 1", {"x": 1}, a=0.5), measured("x 2", {"x": 2}, a=0.6)
    again = [measured(run.name, run.values, 1, a=0.7) for run in (one, two)]
    for runs, words in (
        ([one, two], IMAGES),
        ([one, two, *again], SEEDS),
        ([one, two, again[0]], f"{SEEDS}; for a single run, the standard error over images"),
    ):
        draw(runs, {"x": [1, 2]}, Path("plot.png"))
        assert drawn[-1].get_suptitle() == f"Error bars: {words}"
        assert f"error bars: {words}](sweep.png)" in page("title", "", runs, {})
        assert words_of_error([sum(each.name == run.name for each in runs) for run in runs]) == words


def test_a_combination_has_one_color_in_all_panels(drawn: list[Figure]) -> None:
    """The first combination has no number in the first panel, and neither has an arm outside of the axis."""
    runs = [
        measured(f"{size} {rate}", {"views.size": size, "x.rate": rate}, a=None if size == 16 else 0.5, b=0.5)
        for size in (16, 32, 64)
        for rate in (1, 2)
    ]
    runs += [measured("published", {}, a=None, b=0.3), measured("other", {}, a=0.2, b=0.4)]
    draw(runs, {"x.rate": [1, 2], "views.size": [16, 32, 64]}, Path("plot.png"))
    first, second = (
        {
            label: getattr(handle, "lines", [handle])[0].get_color()
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        for panel in drawn[0].axes
    )
    assert set(first) == {"size 32", "size 64", "other"} and set(second) == {*first, "size 16", "published"}
    assert first == {label: second[label] for label in first} and len(set(second.values())) == 5
    [legend] = drawn[0].legends
    assert {text.get_text() for text in legend.get_texts()} == set(second)


def test_lines_have_the_names_of_their_runs(drawn: list[Figure]) -> None:
    """Keys that end with the same word are written out, and values are those of the recipe."""
    values = [{"x": x, "views.size": size, "method.size": None} for x in (1, 2) for size in (8, 9)]
    draw([measured(str(each), each, a=0.5) for each in values], {"x": [1, 2]}, Path("plot.png"))
    _, labels = drawn[0].axes[0].get_legend_handles_labels()
    assert labels == ["views.size 8, method.size null", "views.size 9, method.size null"]


def test_a_mean_curve_is_dotted_where_some_seeds_have_ended(drawn: list[Figure]) -> None:
    """A mean of other seeds would look like a change during the training."""

    def run(seed: int, *values: float | None) -> Measured:
        history = [{"step": 10 * place, "knn": value} for place, value in enumerate(values)]
        return Measured("simclr", "", {}, seed, {}, {}, None, "photos", history)

    assert draw_curves([run(0, 0.1, 0.3, 0.9), run(1, 0.3, 0.5), run(2)], ["knn"], Path("curves.png"))
    common, rest = drawn[-1].axes[0].lines
    assert list(common.get_xdata()) == [0, 10] and list(common.get_ydata()) == pytest.approx([0.2, 0.4])
    assert list(rest.get_xdata()) == [10, 20] and list(rest.get_ydata()) == pytest.approx([0.4, 0.9])
    assert rest.get_linestyle() == ":" and common.get_color() == rest.get_color()
    assert not draw_curves([run(0, 0.1, 0.3), run(1, 0.3, 0.5)], ["knn"], Path("curves.png"))
    assert len(drawn[-1].axes[0].lines) == 1


def test_the_table_has_the_values_of_a_recipe() -> None:
    """An axis may have values of several types; null is a value, and not a missing one."""
    runs = [measured(str(value), {"x": value}, a=0.5) for value in (None, True, "auto", [1, 2], 0.1)]
    rows = list(csv.DictReader(io.StringIO(csv_text([*runs, measured("other", {}, a=0.5)], ["x"]))))
    assert [row["x"] for row in rows] == ["null", "true", "auto", "[1, 2]", "0.1", ""]
    [row] = csv.DictReader(io.StringIO(csv_text([measured("unlabeled", {})], [])))
    assert (row["value"], row["training_seconds"], row["rank_me"]) == ("", "", "2.5")


def test_a_further_column_leaves_out_numbers_that_are_not_finite() -> None:
    history = [{"step": 1, "knn": 0.5}, {"step": 2, "knn": None}]
    runs = [
        Measured("simclr", "", {}, seed, {}, {}, None, "photos", history[: seed + 1]) for seed in range(2)
    ]
    row = page("title", "", runs, {}, ["knn"]).split("| simclr |")[1].split("\n")[0]
    assert row == " - | 0.5 | - | 2 |"


def test_alarms_name_their_runs() -> None:
    """The alarm of one seed does not mean that all seeds collapsed."""
    runs = [replace(measured("x", {}, seed, a=0.5), alarm=f"rank {seed}") for seed in range(2)]
    lines = page("title", "", [*runs, measured("x", {}, 2, a=0.5)], {}).splitlines()
    alarms = [line for line in lines if line.startswith("- Alarm")]
    assert [line.partition(" in ")[2] for line in alarms] == ["x, seed 0: rank 0.", "x, seed 1: rank 1."]


def test_the_page_lists_settings_of_the_evaluation_also_beside_a_supervised_run() -> None:
    """Such a run records only the settings of its training, and a published encoder those of its own run."""
    protocols = "evaluation.protocols=[knn]"
    runs = [
        replace(measured("simclr", {}, a=0.5), recipe="own", overrides=(protocols, "training.max_steps=2")),
        replace(measured("labels", {}, a=0.5), recipe="own", overrides=("training.num_train_epochs=3",)),
        replace(
            measured("published", {}, a=0.5), recipe="other", overrides=("evaluation.protocols=[linear]",),
            settings=("encoder: own/seed-0",),
        ),
    ]  # fmt: skip
    assert _shared_settings(runs) == [protocols]
    assert _shared_settings(runs[:1]) == [protocols, "training.max_steps=2"]
