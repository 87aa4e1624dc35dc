# SPDX-License-Identifier: Apache-2.0
"""Encoders are measured where that is fast."""

from pathlib import Path

import pytest
import torch

from hf_ssl import run
from hf_ssl.data import DataConfig
from hf_ssl.evaluation import EvaluationConfig, fastest_device
from hf_ssl.space import build, build_space


class AskedFor(Exception):
    """Ends a command where it would begin to compute, with the device."""


def test_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert fastest_device() == torch.device("cpu")


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    device = torch.device("meta")  # every torch has it, and weights can lie there
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: device)
    return device


def test_evaluate_computes_on_the_accelerator(
    finished_run: Path, accelerator: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, device: torch.device, **options: object) -> None:
        raise AskedFor(device)

    monkeypatch.setattr(run, "evaluate_encoder", stop)
    for streaming in (False, True):  # the data of an evaluation are read without streaming
        data = DataConfig(path="digits", streaming=streaming)
        with pytest.raises(AskedFor, match="meta"):
            run.evaluate(str(finished_run), data, EvaluationConfig())


def test_a_gallery_is_embedded_on_the_accelerator(
    finished_run: Path, accelerator: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(encoder: torch.nn.Module, *arguments: object, **options: object) -> None:
        raise AskedFor({each.device for each in encoder.parameters()})

    monkeypatch.setattr(build, "embed_gallery", stop)
    with pytest.raises(AskedFor, match="meta"):
        build_space(str(finished_run), tmp_path / "space", DataConfig(path="digits"), images=5)
