# SPDX-License-Identifier: Apache-2.0
"""Values that two gloo processes compute together."""

import json
from types import SimpleNamespace

import pytest
import torch
from forks import Forks

from hf_ssl.modeling import gather
from hf_ssl.modeling.gather import any_process, min_over_processes

SCRIPT = """
import json, sys, torch, torch.distributed as dist
from hf_ssl.modeling.gather import any_process, finish_communication, min_over_processes
rank, folder, cpu = int(sys.argv[1]), sys.argv[2], torch.device("cpu")
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
flags = [any_process(flag, cpu) for flag in (rank == 0, rank == 1, False)]
print(json.dumps([flags, min_over_processes(5 + rank, cpu), min_over_processes(5 - rank, cpu)]))
finish_communication()
dist.destroy_process_group()
"""


def test_both_processes_get_the_same_values(forks: Forks, tmp_path):
    done = forks.together("hf_ssl", SCRIPT, [[str(number), str(tmp_path)] for number in range(2)])
    assert [part.returncode for part in done] == [0, 0], done[0].stderr[-3000:]
    for part in done:
        assert json.loads(part.stdout.splitlines()[-1]) == [[True, True, False], 5, 4]


def test_one_process_gets_its_own_values():
    cpu = torch.device("cpu")
    assert [any_process(flag, cpu) for flag in (True, False)] == [True, False]
    assert min_over_processes(7, cpu) == 7


def test_threads_of_gloo_end_before_its_group_also_after_an_error(monkeypatch):
    seen, fake = (
        [],
        SimpleNamespace(
            is_available=lambda: True,
            is_initialized=lambda: "start" in seen,
            init_process_group=lambda backend: seen.append("start"),
            get_world_size=lambda: 2,
            get_backend=lambda: "gloo",
            destroy_process_group=lambda: seen.append("end"),
        ),
    )
    monkeypatch.setattr(gather, "dist", fake)
    monkeypatch.setattr(gather.time, "sleep", lambda seconds: seen.append("wait"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(KeyError), gather.joined_processes("cpu"):
        raise KeyError
    assert seen == ["start", "wait", "end"] and not gather.work_is_shared()
