# SPDX-License-Identifier: Apache-2.0
"""Pictures that hf_ssl writes do not become training images."""

import os

import PIL.Image
import pytest
from messages import mentions

from hf_ssl import comparing, suites, sweeps  # noqa: F401  their names of files are repeated below
from hf_ssl.cards.result_files import EVALUATION, SUPERVISED
from hf_ssl.data import DataConfig, open_source
from hf_ssl.data.own_folders import PLOTS, own_folder
from hf_ssl.errors import UserError
from hf_ssl.evaluation.maps import TITLES
from hf_ssl.evaluation.plots import DETECTIONS, K_CURVE, PROBE_EPOCHS
from hf_ssl.hub.publish import SPACE_FACTS
from hf_ssl.output_folder import IDENTITY
from hf_ssl.plotting import CONFUSION, PAGE, SHEET, TERMS

OUTPUTS = {
    "run": [IDENTITY, "views.png"],
    "downloaded run": ["facts.json", "config.json", "views.png"],
    "supervised": [SUPERVISED, "curves.png"],
    "space": [SPACE_FACTS, "app.py", "examples/0.jpg"],
    "sweep": [sweeps.PLAN, "sweep.csv", "sweep.png"],
    "comparison": ["comparison.md", "comparison.csv", "comparison.png"],
    "suite": ["suite.md", "suite.csv", "suite.png"],
    **{picture: [EVALUATION, picture] for picture in (K_CURVE, PROBE_EPOCHS, DETECTIONS)},
    "sheet": [PAGE, SHEET],
    "confusion": [PAGE, CONFUSION],
    "one plot": [CONFUSION],
    "some plots": [SHEET, K_CURVE, ".DS_Store"],
    "attention": ["mean.png", "rollout.png", "head_0.png"],
    "attention of several images": [
        "overview.png",
        "0/mean.png",
        "0/rollout.png",
        "1/mean.png",
        "1/rollout.png",
    ],
    "cache": ["blobs/0a1b.png", "refs/main", "snapshots/1/a.png"],
}


def write(root, names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            PIL.Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text("{}")
    return root


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("pattern", ["", "/**/*"])
def test_pictures_of_an_output_folder_are_not_read(kind, pattern, tmp_path, caplog):
    root = write(tmp_path / "photos", ["cats/a.png", "dogs/b.png"])
    write(root / "runs" / "mine", OUTPUTS[kind])
    source = open_source(DataConfig(path=f"{root}{pattern}"), labels=True)
    assert source.num_rows == 2
    assert source.dataset.features[source.label_column].names == ["cats", "dogs"]
    assert str(root / "runs" / "mine") in caplog.text


def test_photos_beside_such_pictures_are_read(tmp_path):
    root = write(tmp_path / "photos", [CONFUSION, "IMG_1.png", "a/overview.png", "a/0.png", "a/1/mean.png"])
    assert open_source(DataConfig(path=str(root))).num_rows == 5


def test_all_files_of_plots_are_known():
    maps = {f"{method}_{dimensions}d.png" for method in TITLES for dimensions in (2, 3)}
    assert maps | {PAGE, CONFUSION, SHEET, TERMS, K_CURVE} == PLOTS


def test_the_revision_does_not_change_when_a_run_writes_into_its_data(tmp_path):
    root = write(tmp_path / "photos", ["a.png", "b.png"])
    before = open_source(DataConfig(path=str(root)))
    write(root / "runs" / "mine", OUTPUTS["run"])
    after = open_source(DataConfig(path=str(root)))
    assert (after.num_rows, after.revision, after.identity) == (2, before.revision, before.identity)


def test_the_output_folder_of_a_run_is_no_folder_of_images(tmp_path):
    root = write(tmp_path / "mine", OUTPUTS["run"])
    with pytest.raises(UserError, match=mentions("data.path", root, "run")):
        open_source(DataConfig(path=str(root)))
    assert open_source(DataConfig(path=f"{root}/*.png")).num_rows == 1  # the user named these files


def test_a_cache_of_the_libraries_is_not_read(tmp_path, monkeypatch):
    root = write(tmp_path / "photos", ["a.png", "cache/b.png"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(root / "cache"))
    assert open_source(DataConfig(path=str(root))).num_rows == 1


def test_a_real_run_is_recognized(finished_run, tmp_path):
    names = os.listdir(finished_run)
    assert own_folder(str(finished_run), names) is not None
    published = [name for name in names if not name.startswith("_")]
    assert own_folder(str(finished_run), published) is not None
    for ordinary in (["a.png", "config.json"], ["results.json", "a.png"], ["overview.png"], []):
        assert own_folder(str(tmp_path), ordinary) is None
