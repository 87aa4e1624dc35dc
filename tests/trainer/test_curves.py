# SPDX-License-Identifier: Apache-2.0
from PIL import Image

from hf_ssl.trainer.curves import draw_curves


def test_a_run_shorter_than_its_first_record_leaves_no_picture_and_no_error(tmp_path):
    draw_curves([{"step": 3, "train_runtime": 1.0}], tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_drawn(tmp_path):
    draw_curves([{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)], tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[1] > 200
