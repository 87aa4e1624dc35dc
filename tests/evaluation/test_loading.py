# SPDX-License-Identifier: Apache-2.0
"""Encoders are measured where that is fast."""

from pathlib import Path

import pytest
import torch

from hf_ssl.evaluation import load_encoder


@pytest.mark.parametrize("accelerator", [None, torch.device("meta")])
def test_the_encoder_lies_on_the_accelerator_if_there_is_one(
    finished_run: Path, accelerator: torch.device | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: accelerator)
    encoder, _ = load_encoder(str(finished_run))
    assert {each.device for each in encoder.parameters()} == {accelerator or torch.device("cpu")}
    assert not encoder.training
