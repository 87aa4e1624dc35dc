# SPDX-License-Identifier: Apache-2.0
"""Runs many trainings in real processes of their own, for tests: `python forked_runs.py JOBS.json`.

Importing torch and transformers takes seconds, so this process imports once and forks each run. JOBS.json
holds a list of groups; the runs of a group are the ranks of one process group and go at the same time,
groups go one after another. A run is {"recipe": name, "overrides": [...], "kill_at": step or null,
"weights": path or null}; with "curves": true it draws its curves, which takes longer than the rest of such a
small run. A killed run gets SIGKILL, as by `kill -9`, right after an optimizer step; the others write their
final weights, the history of their losses, and the weights of the online probe.
"""

import json
import os
import signal
import sys
from pathlib import Path

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  (a second for each run that draws its curves)
import torch
from transformers import TrainerCallback

from hf_ssl.recipe import load_recipe
from hf_ssl.run import train
from hf_ssl.trainer.callbacks import CurvesCallback


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(job: dict, rank: int, world_size: int, port: int) -> None:
    if world_size > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    if not job.get("curves", False):
        CurvesCallback.draw = lambda self, args, state: None  # the process is the job's own
    callbacks = [] if job["kill_at"] is None else [KillAt(job["kill_at"])]
    trainer = train(load_recipe(job["recipe"], job["overrides"]), callbacks)
    losses = {record["step"]: record["loss"] for record in trainer.state.log_history if "loss" in record}
    probe = None if trainer.online_probe is None else trainer.online_probe.classifier.state_dict()
    torch.save({"weights": trainer.model.state_dict(), "losses": losses, "probe": probe}, job["weights"])


def fork(job: dict, rank: int, world_size: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        run(job, rank, world_size, port)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(jobs_file: Path) -> int:
    failed = 0
    for number, group in enumerate(json.loads(jobs_file.read_text())):
        port = 29600 + (os.getpid() + number) % 2000
        children = [fork(job, rank, len(group), port) for rank, job in enumerate(group)]
        for child, job in zip(children, group, strict=True):
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            expected = 0 if job["kill_at"] is None else -signal.SIGKILL
            if status != expected:
                print(f"{job['weights']}: exit status {status}, expected {expected}", file=sys.stderr)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
