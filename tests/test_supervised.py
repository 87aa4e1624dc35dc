# SPDX-License-Identifier: Apache-2.0
"""`hf-ssl supervise`: a reference encoder that is trained with labels, and that every protocol measures."""

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from messages import mentions
from transformers import AutoModel

from hf_ssl import supervised
from hf_ssl.cards.comparison_text import latex, markdown
from hf_ssl.cards.result_files import EVALUATED, SUPERVISED
from hf_ssl.cli import main
from hf_ssl.comparing import compare_runs
from hf_ssl.errors import UserError
from hf_ssl.evaluation import load_encoder
from hf_ssl.precision import Precision
from hf_ssl.recipe import load_recipe

SMALL = ["evaluation.max_train_images=200", "evaluation.max_test_images=100"]
_SETTINGS = "epochs: 3, warmup_epochs: 1, batch_size: 20, smallest_crop: 0.8, flip: 0.0"
FINE = f"evaluation.settings.fine_tune={{{_SETTINGS}}}"


def test_the_encoder_is_exported_and_measured_as_every_other_one(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "reference"
    assert main(["supervise", "smoke/simclr", f"training.output_dir={folder}", *SMALL, FINE]) == 0
    record = json.loads((folder / SUPERVISED).read_text())
    result = record["result"]
    assert result["value"] > 0.2, "the ten digits are learned, if badly"
    assert "from random weights" in result["text"] and "warmup 1 epoch," in result["text"]
    assert f"{100 * result['value']:.1f} %" in capsys.readouterr().out
    assert not (folder / supervised.CHECKPOINTS).exists()
    encoder, _ = load_encoder(str(folder))
    fresh = AutoModel.from_config(encoder.config)
    assert type(encoder) is type(fresh) and encoder.config.hidden_sizes == [8, 16]
    assert main(["evaluate", str(folder), "data.path=digits", *SMALL, "--protocols", "knn"]) == 0
    assert "20-NN" in capsys.readouterr().out
    output = tmp_path / "evaluated"
    more = ["data.path=digits", *SMALL, "--protocols", "knn", "--output", str(output)]
    assert main(["evaluate", str(folder), *more]) == 0
    comparison = compare_runs([str(folder), str(output), str(tmp_path)], None, baselines=True)
    assert [row.label for row in comparison.rows] == ["supervised", "raw pixels"]
    row = comparison.rows[0]
    cells = {column.key: cell.values for column, cell in row.cells.items()}
    assert len(row.seeds) == 1 and cells["supervised"] == [result["value"]] and len(cells["knn_20"]) == 1
    assert str(tmp_path) not in (output / "results.json").read_text(), "no folder of this machine"
    with pytest.raises(UserError, match=mentions("training.output_dir")):
        supervised.supervise(load_recipe("smoke/simclr", [f"training.output_dir={folder}", *SMALL, FINE]))


KEYS = ["training.num_train_epochs=1", "training.batch_size=60", "training.learning_rate=0.25"]
KEYS += [
    "training.warmup_epochs=0",
    "training.optimizer=adamw",
    "training.seed=7",
    "training.precision=bfloat16",
]


def test_keys_of_the_training_have_an_effect(tmp_path: Path, capsys) -> None:
    output = f"training.output_dir={tmp_path / 'run'}"
    assert main(["supervise", "smoke/simclr", output, *SMALL, *KEYS]) == 0
    record = json.loads((tmp_path / "run" / SUPERVISED).read_text())
    assert record[EVALUATED]["training"]["steps"] == 3, "the last 20 of 200 images fill no batch"
    text = record["result"]["text"]
    assert all(part in text for part in ("1 epoch,", "batch size 60", "learning rate 0.25", "AdamW"))
    printed = capsys.readouterr().out
    assert "bfloat16, seed 7" in printed and "1 epoch," in printed


def test_an_excluded_precision_is_not_chosen(tmp_path: Path, monkeypatch) -> None:
    fast = Precision("bfloat16", "it is fast")
    monkeypatch.setattr("hf_ssl.trainer.machine_settings.fastest_precision", lambda device: fast)
    for override, expected in (("bf16=false", "float32"), ("precision=auto", "bfloat16")):
        recipe = load_recipe(
            "smoke/simclr",
            [f"training.output_dir={tmp_path}", "training.use_cpu=true", f"training.{override}"],
        )
        assert supervised._precision(recipe, recipe.training_arguments()) == expected


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.max_steps=3", ["training.max_steps", "training.num_train_epochs"]),
        ("training.save_steps=3", ["training.save_steps", "training.seed"]),
        ("evaluation.protocols=[knn]", ["evaluation.protocols", "hf-ssl evaluate"]),
        (
            "evaluation.settings.knn.neighbors=[3]",
            ["evaluation.settings.knn", "evaluation.settings.fine_tune"],
        ),
        ("evaluation.seed=3", ["evaluation.seed", "training.seed"]),
        ("method.temperature=0.1", ["method.temperature"]),
        ("views.blur=0.1", ["views.blur"]),
        ("publish.repo_id=a/b", ["publish.repo_id"]),
        ("data.max_images=50", ["data.max_images", "evaluation.max_train_images"]),
        ("data.split=test", ["data.split", "evaluation.train_split"]),
        (
            "training.label_smoothing_factor=0.1",
            ["label_smoothing_factor", "fine_tune.label_smoothing"],
        ),
        ("training.batch_size=9", ["training.batch_size", "evaluation.settings.fine_tune.batch_size"]),
    ],
)
def test_values_without_an_effect_end_in_one_sentence(
    override: str, parts: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=mentions(*parts)):
        supervised.supervise(load_recipe("smoke/simclr", [f"training.output_dir={folder}", FINE, override]))
    assert not folder.exists()


def test_an_interrupted_training_resumes(tmp_path: Path, monkeypatch) -> None:
    def train(name: str) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        supervised.supervise(load_recipe("smoke/simclr", [f"training.output_dir={folder}", *SMALL, FINE]))
        return AutoModel.from_pretrained(folder).state_dict()

    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(supervised, "export_encoder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train("interrupted")
    checkpoints = sorted((tmp_path / "interrupted" / supervised.CHECKPOINTS).glob("*/checkpoint-*"))
    assert len(checkpoints) == 2
    (checkpoints[-1] / "complete").unlink()  # the last checkpoint was not completely written
    (checkpoints[-1] / "trainer_state.json").write_text('{"epoch')
    torch.testing.assert_close(train("interrupted"), whole, atol=0, rtol=0)


@pytest.mark.parametrize("setting", ["freeze: all", "fractions: [0.1]", "labels_per_class: [5]"])
def test_a_training_from_random_weights_has_all_parameters_and_labels(setting: str, tmp_path: Path) -> None:
    overrides = [f"training.output_dir={tmp_path}", f"evaluation.settings.fine_tune={{{setting}}}"]
    with pytest.raises(UserError, match=mentions("evaluation.settings.fine_tune", "random weights")):
        supervised.supervise(load_recipe("smoke/simclr", overrides))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_checkpoints_of_an_own_folder_are_outside_of_the_encoder(inside: str, tmp_path: Path) -> None:
    """Otherwise, an interrupted training would not resume, and the checkpoints would be published."""
    output = tmp_path / "run"
    folder = f"evaluation.settings.fine_tune={{epochs: 1, warmup_epochs: 0, folder: '{output / inside}'}}"
    with pytest.raises(UserError, match=mentions("fine_tune.folder", "training.output_dir", "null")):
        supervised.supervise(load_recipe("smoke/simclr", [f"training.output_dir={output}", *SMALL, folder]))
    assert not output.exists()


def test_images_with_several_labels_give_the_mean_average_precision(tmp_path: Path, capsys) -> None:
    """A bright square at the left, at the right, or both: each image has one or two labels."""
    random = np.random.default_rng(0)
    kinds = {"image": datasets.Image(), "labels": datasets.List(datasets.ClassLabel(names=["left", "right"]))}
    for split, count in (("train", 90), ("test", 30)):
        rows: dict[str, list] = {"image": [], "labels": []}
        for number in range(count):
            labels = [[0], [1], [0, 1]][number % 3]
            pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            for label in labels:
                pixels[8:24, 16 * label + 2 : 16 * label + 14] = 220
            rows["image"].append(PIL.Image.fromarray(pixels))
            rows["labels"].append(labels)
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
        table.to_parquet(tmp_path / "data" / f"{split}.parquet")
    folder = tmp_path / "run"
    settings = "epochs: 6, warmup_epochs: 0, batch_size: 10, smallest_crop: 1, flip: 0"
    fine = f"evaluation.settings.fine_tune={{{settings}}}"
    where = [f"data.path={tmp_path / 'data'}", "data.label_column=labels"]
    overrides = [*where, f"training.output_dir={folder}", fine]
    assert main(["supervise", "smoke/simclr", *overrides]) == 0
    result = json.loads((folder / SUPERVISED).read_text())["result"]
    assert result["metric"] == "mean_average_precision" and result["column"] == "supervised, mAP"
    assert "binary cross entropy" in result["text"] and result["value"] > 0.9
    assert "mean average precision of the classifier on 30 images" in capsys.readouterr().out
    comparison = compare_runs([str(folder)], None)
    assert "Numbers in percent" in markdown(comparison) and "numbers in percent" in latex(comparison)
