# SPDX-License-Identifier: Apache-2.0
"""`hf-ssl supervise`: a reference encoder that is trained with labels, and that every protocol measures."""

import json
from pathlib import Path

import pytest
import torch
from messages import mentions
from transformers import AutoModel

from hf_ssl import supervised
from hf_ssl.cli import main
from hf_ssl.errors import UserError
from hf_ssl.evaluation import load_encoder
from hf_ssl.recipe import load_recipe

SMALL = ["evaluation.max_train_images=200", "evaluation.max_test_images=100"]
FINE = "evaluation.settings.fine_tune={epochs: 3, batch_size: 20, smallest_crop: 0.8, flip: 0.0}"


def test_the_encoder_is_exported_and_measured_as_every_other_one(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "reference"
    assert main(["supervise", "smoke/simclr", f"training.output_dir={folder}", *SMALL, FINE]) == 0
    record = json.loads((folder / supervised.RESULT).read_text())
    result = record["result"]
    assert result["value"] > 0.2, "the ten digits are learned, if badly"
    assert "from random weights" in result["text"] and "warmup 5 epochs" in result["text"]
    assert f"{100 * result['value']:.1f} %" in capsys.readouterr().out
    assert not (folder / supervised.CHECKPOINTS).exists()
    encoder, _ = load_encoder(str(folder))
    fresh = AutoModel.from_config(encoder.config)
    assert type(encoder) is type(fresh) and encoder.config.hidden_sizes == [8, 16]
    assert main(["evaluate", str(folder), "data.path=digits", *SMALL, "--protocols", "knn"]) == 0
    assert "20-NN" in capsys.readouterr().out
    with pytest.raises(UserError, match=mentions("training.output_dir")):
        supervised.supervise(load_recipe("smoke/simclr", [f"training.output_dir={folder}", *SMALL, FINE]))


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
    (checkpoints[-1] / "trainer_state.json").unlink()  # the last epoch was not completely written
    torch.testing.assert_close(train("interrupted"), whole, atol=0, rtol=0)


@pytest.mark.parametrize("setting", ["freeze: all", "fractions: [0.1]", "labels_per_class: [5]"])
def test_a_training_from_random_weights_has_all_parameters_and_labels(setting: str, tmp_path: Path) -> None:
    overrides = [f"training.output_dir={tmp_path}", f"evaluation.settings.fine_tune={{{setting}}}"]
    with pytest.raises(UserError, match=mentions("evaluation.settings.fine_tune", "random weights")):
        supervised.supervise(load_recipe("smoke/simclr", overrides))
    assert not list(tmp_path.iterdir())
