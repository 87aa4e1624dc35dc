# SPDX-License-Identifier: Apache-2.0
import pytest
from PIL import Image

from hf_ssl.trainer.logs import draw_curves, select_panels

MONITORED = {
    f"eval_{name}": 0.5
    for name in (
        "knn",
        "rank_me",
        "embedding_rank",
        "embedding_std",
        "feature_std",
        "alignment",
        "uniformity",
    )
}


def test_a_run_shorter_than_its_first_record_leaves_no_picture_and_no_error(tmp_path):
    draw_curves([{"step": 3, "train_runtime": 1.0}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_drawn(tmp_path):
    draw_curves([{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[1] > 200


def test_eight_panels_are_drawn_for_every_method():
    logged = {
        "loss": 2.0,
        "learning_rate": 0.1,
        "images_per_second": 9,
        "grad_norm": 1.0,
        "term_nt_xent": 2.0,
    }
    history = [{"step": 0, "eval_loss": 2.0, **MONITORED}, {"step": 1, "epoch": 0.5, **logged}]
    panels = select_panels(history)
    assert len(panels) == 8
    assert ("effective rank", ("eval_embedding_rank", "eval_rank_me")) in panels


@pytest.mark.parametrize(
    ("measured", "panels"),
    [
        (("queue_age", "queue_filled"), [("eval_queue_age",), ("eval_queue_filled",)]),
        (("prototypes_used", "prototype_entropy"), [("eval_prototype_entropy", "eval_prototypes_used")]),
        (("off_diagonal_correlation",), [("eval_off_diagonal_correlation",)]),
        (("predictor_rank",), [("eval_predictor_rank",)]),
        (("surprise", "awe"), [("eval_awe",), ("eval_surprise",)]),
    ],
)
def test_what_a_method_measures_is_drawn_though_no_table_names_it(measured, panels):
    record = {"step": 0, "eval_loss": 2.0, "eval_note": "text", **{f"eval_{name}": 0.5 for name in measured}}
    assert [keys for _, keys in select_panels([record])] == panels


def test_a_panel_is_named_after_a_measurement_that_no_table_names():
    assert select_panels([{"step": 0, "eval_mask_share": 0.5}]) == [("mask share", ("eval_mask_share",))]


def test_ranks_share_an_axis():
    panels = select_panels([{"step": 0, **MONITORED, "eval_predictor_rank": 3.0}])
    assert ("effective rank", ("eval_embedding_rank", "eval_rank_me", "eval_predictor_rank")) in panels


def test_terms_are_drawn_together_where_there_are_several():
    assert select_panels([{"step": 1, "term_b": 1.0, "term_a": 2.0}]) == [
        ("terms of the loss", ("term_a", "term_b"))
    ]
    assert select_panels([{"step": 1, "term_a": 2.0}]) == []


def test_a_new_measurement_makes_the_picture_larger(tmp_path):
    four = {"eval_knn": 0.5, "eval_alignment": 0.5, "eval_uniformity": 0.5, "eval_rank_me": 0.5}
    heights = []
    for number, measured in enumerate(({}, {"eval_surprise": 1.0})):
        path = tmp_path / f"{number}.png"
        draw_curves([{"step": step, **four, **measured} for step in (0, 5)], path)
        heights.append(Image.open(path).size[1])
    assert heights[1] == 2 * heights[0]
