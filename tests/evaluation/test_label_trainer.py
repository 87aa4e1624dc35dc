# SPDX-License-Identifier: Apache-2.0
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from filelock import FileLock
from transformers import Trainer

from hf_ssl.evaluation.label_trainer import training_arguments

CPU = torch.device("cpu")


def arguments(folder: Path | None, dtype: torch.dtype | None = None) -> Any:
    return training_arguments(
        folder=folder, epochs=1, batch_size=2, warmup_steps=0, seed=0, device=CPU, dtype=dtype
    )


def test_equal_trainings_wait_for_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, entered = tmp_path / "fine_tune-1", threading.Event()

    def second() -> None:
        with arguments(folder):
            entered.set()

    other = FileLock(folder.with_name(f".{folder.name}.lock"), thread_local=False)
    with other:
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.5)
    thread.join(30)
    assert entered.is_set() and str(folder) in caplog.text
    with arguments(folder), arguments(tmp_path / "fine_tune-2"), arguments(None):
        pass  # other trainings do not wait


@pytest.mark.parametrize(("dtype", "name"), [(None, "no"), (torch.bfloat16, "bf16")])
def test_the_precision_is_that_of_the_protocol(
    dtype: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with arguments(None, dtype) as args:
        assert args.mixed_precision == name


@pytest.mark.parametrize(("own", "dtype"), [("no", torch.bfloat16), ("bf16", None)])
def test_another_trainer_keeps_its_precision(own: str, dtype: Any) -> None:
    """transformers 5.24 replaces the state that all accelerators share, so cards named a wrong precision."""
    before = Accelerator(mixed_precision=own, cpu=True, gradient_accumulation_steps=3)
    with arguments(None, dtype) as args:
        Trainer(torch.nn.Linear(1, 1), args)
        assert before.mixed_precision != own  # else the workaround is not needed
    assert before.mixed_precision == own and before.gradient_accumulation_steps == 3
    assert before.state.num_processes == 1 and before.gradient_state.sync_gradients
    AcceleratorState._reset_state(reset_partial_state=True)
    with arguments(None, dtype) as args:
        Trainer(torch.nn.Linear(1, 1), args)
    assert not is_initialized()  # as before the block
