# SPDX-License-Identifier: Apache-2.0
"""Makes the runs of a sweep (layer 5).

Each run has its own process and its own folder. A later call runs only what is missing, and a run that was
interrupted continues from its last checkpoint.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any

from filelock import Timeout
from huggingface_hub.utils import WeakFileLock as FileLock

from hf_ssl.cards import remove_private
from hf_ssl.cards.result_files import SUPERVISED
from hf_ssl.cards.sweep_text import Measured
from hf_ssl.cards.text import duration
from hf_ssl.errors import UserError, counted
from hf_ssl.files import disk_errors_as_user_errors, read_json, write_json, write_text
from hf_ssl.progress import notice
from hf_ssl.resources import usable_cores
from hf_ssl.signals import SWEEP
from hf_ssl.study import PRETRAIN, SUPERVISE, Run, Sweep, folder_name
from hf_ssl.sweep_results import RUNS, Finished, error_file, has_results, write_results

PLAN = "sweep.json"
_OF_ARM = {"command": PRETRAIN, "encoder": None, "start": None}
"""What older versions did not store, because every arm had it."""


@dataclass(frozen=True)
class Command:
    """The command of a sweep, with which each run starts in its own process.

    Attributes:
        name, overrides: arguments of `load_sweep`.
        seeds: number of seeds; None: that of the study.
        output: folder of the results.
    """

    name: str
    overrides: Sequence[str]
    seeds: int | None
    output: Path

    def of_job(self, number: int, *, quiet: bool = False) -> list[str]:
        """Return the command line of one run. `quiet` hides the progress bars of its training."""
        seeds = [] if self.seeds is None else ["--seeds", str(self.seeds)]
        options = ["--output", str(self.output), "--job", str(number), *seeds]
        hidden = ["training.disable_tqdm=true"] if quiet else []
        return [sys.executable, "-m", "hf_ssl", "sweep", self.name, *self.overrides, *hidden, *options]


def list_jobs(sweep: Sweep, output: Path | None = None) -> list[str]:
    """Return one line for each run: its number, name, seed and state.

    Raises:
        UserError: the folder contains a sweep with other settings.
    """
    if output is not None and (output / PLAN).exists():
        _check_stored(sweep, output)
    width = max(len(run.name) for run in sweep.runs)
    finished = None if output is None else Finished(output)
    return [
        f"{number:>3}  {run.name:{width}}  seed {run.seed}  {_state(run, finished)}"
        for number, run in enumerate(sweep.runs, start=1)
    ]


def _state(run: Run, finished: Finished | None) -> str:
    if finished is None:
        return "to do"
    if run in finished:
        return "finished"
    folder = run.folder(finished.output)
    return "failed" if error_file(folder).exists() else "started" if folder.exists() else "to do"


def run_sweep(sweep: Sweep, command: Command, at_once: int = 1) -> list[Measured]:
    """Run what is missing, write the page, and return the results of all finished runs.

    The files are `README.md`, `sweep.csv`, `sweep.png`, `curves.png` and `runs.json`, the entries for
    `hf-ssl compare`. If a run fails, the page names it, and the other runs continue.

    Args:
        sweep: the sweep.
        command: the command that gave this sweep.
        at_once: number of runs at the same time, which share the cores.

    Raises:
        UserError: the folder contains another sweep, or all runs fail.
    """
    if at_once < 1:
        raise UserError(f"--at-once: expected a positive number, got {at_once}; use 1 or more")
    output = command.output
    _check_plan(sweep, output)
    missing = Finished(output).missing(sweep)
    notice(
        f"{counted(len(sweep.runs), 'run')}, {len(sweep.runs) - len(missing)} finished; results in {output}"
    )
    threads, lock = str(max(1, usable_cores() // at_once)), Lock()

    running: set[subprocess.Popen] = set()
    stopped = Event()
    ended = {id(run): Event() for run in sweep.runs}

    def start(number: int) -> None:
        run = sweep.run(number)
        try:
            if run.start is not None and not has_results(run.start, output):
                ended[id(run.start)].wait()  # it comes earlier in the order, so it has started
            make(number, run)
        finally:
            ended[id(run)].set()

    begin, made = time.monotonic(), 0

    def make(number: int, run: Run) -> None:
        nonlocal made
        if stopped.is_set():
            return
        left = f"; {_left(begin, made, len(running), len(missing))}" if made else ""
        notice(f"run {number} of {len(sweep.runs)}: {run.name}, seed {run.seed}{left}")
        environment = os.environ | {SWEEP: str(os.getpid())}
        environment |= {"OMP_NUM_THREADS": threads} if at_once > 1 else {}
        with lock:
            if stopped.is_set():
                return
            # The bars of several runs would overwrite each other.
            process = subprocess.Popen(command.of_job(number, quiet=at_once > 1), env=environment)
            running.add(process)
        status = process.wait()
        with lock:
            running.discard(process)
            made += 1
        if status < 0 or status > 128:
            notice(f"run {number} was ended by signal {abs(status) % 128}; the same command continues it")
        elif status:
            notice(f"run {number} failed with status {status}; the other runs continue")
        if has_results(run, output):
            with lock:
                write_results(sweep, output)

    with ThreadPoolExecutor(max(1, at_once)) as pool:
        try:
            left = {pool.submit(start, number) for number in missing}
            while left:
                # A signal just before a wait begins does not end it (Python 3.11), so waits are short.
                done, left = wait(left, timeout=1, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
        except BaseException as error:
            with lock:
                stopped.set()
                if not isinstance(error, KeyboardInterrupt):  # a terminal sends Ctrl-C also to the runs
                    for process in running:
                        process.terminate()  # the run saves a checkpoint
            raise
    return write_results(sweep, output)


def _left(begin: float, made: int, running: int, runs: int) -> str:
    """Return the estimated time until all runs have ended, in words.

    Each run is expected to take as long as the mean run so far, of which each running one has made one half.

    Args:
        begin: time of the start, as of `time.monotonic`.
        made: number of runs that have ended since then.
        running: number of runs that have started and not ended.
        runs: number of all runs to make.
    """
    done = made + running / 2
    seconds = (time.monotonic() - begin) / done * (runs - done)
    return f"about {duration(seconds)} left"


def run_job(sweep: Sweep, output: Path, number: int) -> None:
    """Make one run in this process, which may be one of several of torchrun or accelerate launch.

    Raises:
        UserError: the run fails. Its folder keeps the reason for the page.
    """
    run = sweep.run(number)
    _check_plan(sweep, output)
    reason = error_file(run.folder(output))
    with _alone(run.folder(output), number):
        if _is_first_process():
            reason.unlink(missing_ok=True)  # that of an earlier attempt
        try:
            _make(run, output)
        except UserError as error:
            write_text(reason, f"{error}\n")
            raise


def _is_first_process() -> bool:
    """Return whether this is the first process of torchrun or accelerate launch, or the only process."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def _alone(folder: Path, number: int) -> Iterator[None]:
    """Raise UserError if another command makes this run at the same time, which would mix its files.

    The processes of one command (torchrun, accelerate launch) share one lock, which the first one holds.
    """
    if not _is_first_process():
        yield
        return
    file = folder.with_name(f".{folder.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(file, timeout=0.1))
        except Timeout as error:
            raise UserError(
                f"--job: expected a run that no other command makes, got run {number} in {folder}, which is "
                "running; wait, or choose another run of --list-jobs"
            ) from error
        yield


def _make(run: Run, output: Path) -> None:
    """Make a run: pretrain an encoder, or train it with labels and evaluate it, or only evaluate it."""
    from hf_ssl.recipe import load_recipe
    from hf_ssl.run import evaluate, pretrain

    folder = run.folder(output)
    place = [f"training.output_dir={folder}"]
    if run.start is not None:
        if not has_results(run.start, output):
            raise UserError(
                f"{run.name}: expected the finished run {run.start.name}, seed {run.start.seed}, from whose "
                "encoder it starts, got none; make that run first"
            )
        place.append(f"backbone.init_from={run.start.folder(output)}")
    recipe = load_recipe(run.recipe, [*run.overrides, *place])
    if run.command == PRETRAIN:
        pretrain(recipe)
        return
    if run.command == SUPERVISE and not (folder / SUPERVISED).exists():
        from hf_ssl.supervised import supervise, used

        supervise(load_recipe(run.recipe, used([*run.overrides, *place])))
    chosen = recipe.is_overridden("evaluation.protocols")
    encoder = str(folder) if run.encoder is None else run.encoder
    evaluate(encoder, recipe.data, recipe.evaluation, folder, chosen=chosen)


def _check_plan(sweep: Sweep, output: Path) -> None:
    """Store the settings of the arms. Raise UserError if the folder contains a sweep with other settings.

    Processes and jobs that start at the same time write the file under a lock.
    """
    file, plan = output / PLAN, remove_private(sweep.plan)
    with disk_errors_as_user_errors(str(output)):
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / f".{PLAN}.lock"):
            if (output / RUNS).exists() and not file.exists():
                raise UserError(
                    f"--output: expected {PLAN}, the settings of the runs in {RUNS}, got none in {output}; "
                    "use another folder"
                )
            before = _check_stored(sweep, output) if file.exists() else {}
            if plan.keys() - before.keys():
                write_json(file, before | plan)


def _check_stored(sweep: Sweep, output: Path) -> dict[str, Any]:
    """Return the stored settings of the arms, or raise UserError for the first one that differs.

    The settings of an arm may change until one of its runs has begun, for example after a mistake in
    `data.path`. Arms without such a run are not returned.
    """
    before, plan = read_json(output / PLAN), remove_private(sweep.plan)
    stored = Finished(output).arms
    before = {arm: own for arm, own in before.items() if arm in stored or _has_begun(arm, output)}
    for arm in before.keys() & plan.keys():
        _check_same(_OF_ARM | before[arm], plan[arm], output)
    return before


def _has_begun(arm: str, output: Path) -> bool:
    """Return whether a run of an arm has written files, or may be running.

    A run that failed at once leaves the file of its error, and at most an empty folder. The folder of another
    arm also counts if its name begins with the name of this arm.
    """
    places = [place for folder in output.glob(f"{folder_name(arm)}*/") for place in folder.iterdir()]
    has_files = any(place.is_dir() and any(place.iterdir()) for place in places)
    locks = [place.with_name(place.stem.removeprefix(".")) for place in places if place.suffix == ".lock"]
    return has_files or any(not error_file(folder).exists() for folder in locks)


def _check_same(before: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    """Raise UserError for the first setting that differs."""
    for key in (*now, *before):
        # A key that is an axis of the grid in one of both is not among its settings.
        if key in before and key in now and _given(before[key]) != _given(now[key]):
            raise UserError(
                f"--output: expected an empty folder or the same sweep, got {output}, where {key} was "
                f"{before[key]} and is now {now[key]}; use another folder (seeds and values may be added)"
            )


def _given(value: Any) -> Any:
    """Return a mapping without null. Older versions lack the keys of new settings, as in `views.second`."""
    if not isinstance(value, dict):
        return value
    return {name: item for name, item in value.items() if item is not None}
