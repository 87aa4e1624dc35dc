# SPDX-License-Identifier: Apache-2.0
"""The precision that `auto` selects."""

import itertools
import time

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from messages import mentions

from hf_ssl import precision
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.modeling.configuration import BankConfig
from hf_ssl.trainer.arguments import SSLTrainingArguments


@pytest.fixture(autouse=True)
def forgotten():
    """Clears the stored result, so that each test measures."""
    precision.fastest_precision.cache_clear()
    yield
    precision.fastest_precision.cache_clear()


@pytest.mark.parametrize(
    ("float32", "bfloat16", "chosen"), [(2.0, 1.0, "bfloat16"), (1.0, 6.0, "float32"), (1.1, 1.0, "float32")]
)
def test_half_precision_must_be_clearly_faster(monkeypatch, float32, bfloat16, chosen):
    monkeypatch.setattr(precision, "_seconds", lambda device: (float32, bfloat16))
    found = precision.fastest_precision("cpu")
    assert found.name == chosen
    assert f"{float32 / bfloat16:.2g} times" in found.reason


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        ((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16"), ((7, 0), "float16"),
        ((6, 1), "float32"),
    ],
)  # fmt: skip
def test_on_cuda_the_compute_capability_determines_the_precision(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = precision.fastest_precision("cuda")
    assert found.name == chosen
    assert "{}.{}".format(*capability) in found.reason


@pytest.mark.skipif(time.get_clock_info("process_time").resolution > 1e-5, reason="the clock is too coarse")
def test_other_programs_do_not_change_the_choice_for_a_cpu(monkeypatch):
    """Waiting for a core takes time, but no time of the process."""
    numbers = itertools.count()
    monkeypatch.setattr(precision, "_REPEATS", 2)
    monkeypatch.setattr(time, "process_time", lambda: 1000.0 * next(numbers))
    assert precision._seconds("cpu") == (1000.0, 1000.0)


def test_the_measurement_does_not_change_the_random_state_and_grad_mode():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.no_grad():
        full, half = precision._seconds("cpu")
        assert not torch.is_grad_enabled()
    assert full > 0 and half > 0
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("key", "check"),
    [
        ("evaluation.precision", lambda name, folder: EvaluationConfig(precision=name).check()),
        ("training.precision", lambda name, folder: SSLTrainingArguments(output_dir=folder, precision=name)),
        (
            "method.bank_precision",
            lambda name, folder: BankConfig(backbone_config={"model_type": "resnet"}, bank_precision=name),
        ),
    ],
)
def test_all_settings_accept_the_same_precisions(key, check, tmp_path) -> None:
    for name in precision.PRECISIONS:
        check(name, str(tmp_path))
    with pytest.raises((UserError, StrictDataclassError), match=mentions(key, "half", *precision.PRECISIONS)):
        check("half", str(tmp_path))
