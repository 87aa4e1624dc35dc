# SPDX-License-Identifier: Apache-2.0
"""Runs Python programs in separate processes that start quickly.

Importing torch and transformers takes seconds. A server imports them once, in stages, and runs each program
in a fork. In the stage "torch", the Hugging Face libraries and hf_ssl are not loaded, so a program can still
set the environment that they read. In "transformers", hf_ssl is not loaded. In "hf_ssl", all are loaded.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

STAGES = {
    "torch": (
        "torch", "torchvision.transforms.v2", "torch.distributed.fsdp", "sklearn.metrics", "pandas",
        "pyarrow.parquet", "matplotlib.figure", "matplotlib.backends.backend_agg", "PIL.Image",
    ),
    "transformers": (
        "accelerate", "datasets", "transformers", "transformers.trainer", "transformers.modeling_utils",
        "transformers.models.auto.modeling_auto", "transformers.models.auto.image_processing_auto",
    ),
    "hf_ssl": ("hf_ssl.run", "hf_ssl.cli", "hf_ssl.recipe", "hf_ssl.trainer.trainer"),
}  # fmt: skip
SERVER = """import os, sys; sys.path.append(sys.argv[1])
import forks; forks.STAGES["transformers"] += tuple(sys.argv[2:]); forks.serve(sys.stdin, sys.stdout)
os._exit(0)  # without unloading torch, which takes time"""


class Forks:
    """The client of a server. The server starts with the first program and ends with the context.

    Args:
        also: additional modules for the stage "transformers".
    """

    def __init__(self, also: Sequence[str] = ()) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._also = also

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            assert self._server.stdin is not None
            self._server.stdin.close()
            self._server.wait()

    def run(
        self, stage: str, code: str, *arguments: str, env: Mapping[str, str] | None = None,
        cwd: Path | None = None, timeout: int = 900,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run code as `python -c` does, after the imports of a stage. Return its status and its output."""
        return self.together(stage, code, [arguments], env=env, cwd=cwd, timeout=timeout)[0]

    def together(
        self, stage: str, code: str, each: Sequence[Sequence[str]], *,
        env: Mapping[str, str] | None = None, cwd: Path | None = None, timeout: int = 900,
    ) -> list[subprocess.CompletedProcess[str]]:  # fmt: skip
        """Run the code once for each list of arguments, all at the same time."""
        with tempfile.TemporaryDirectory() as folder:
            request = {
                "stage": stage, "code": code, "each": each, "folder": folder, "timeout": timeout,
                "env": {**(os.environ if env is None else env), "OMP_NUM_THREADS": "1"},
                "cwd": str(cwd or Path.cwd()),
            }  # fmt: skip
            statuses = self._ask(request)
            return [
                subprocess.CompletedProcess(
                    ["python", "-c", code, *arguments], status,
                    *(Path(folder, f"{number}.{kind}").read_text() for kind in ("out", "err")),
                )
                for number, (arguments, status) in enumerate(zip(each, statuses, strict=True))
            ]  # fmt: skip

    def _ask(self, request: dict[str, Any]) -> list[int]:
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(Path(__file__).parent), *self._also],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def serve(requests: TextIO, answers: TextIO, stage: str = next(iter(STAGES))) -> None:
    """Answer each request with exit statuses. A forked server answers requests for later stages."""
    if stage == next(iter(STAGES)) and "FORKS_PRELUDE" in os.environ:  # see weekly/mutations.py
        exec(Path(os.environ["FORKS_PRELUDE"]).read_text(encoding="utf-8"), {})
    for module in STAGES[stage]:
        import_module(module)
    later: tuple[TextIO, TextIO] | None = None
    while line := requests.readline():
        request = json.loads(line)
        if request["stage"] == stage:
            statuses = _run_all(request)
        else:
            later = later or _fork_server(list(STAGES)[list(STAGES).index(stage) + 1])
            later[0].write(line)
            later[0].flush()
            statuses = json.loads(later[1].readline())
        answers.write(json.dumps(statuses) + "\n")
        answers.flush()
    if later is not None:
        later[0].close()
        os.wait()


def _fork_server(stage: str) -> tuple[TextIO, TextIO]:
    reads_requests, sends_requests = os.pipe()
    reads_answers, sends_answers = os.pipe()
    if os.fork() == 0:
        try:
            os.close(sends_requests)  # otherwise this process never reads the end of the requests
            os.close(reads_answers)
            serve(os.fdopen(reads_requests), os.fdopen(sends_answers, "w"), stage)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(reads_requests)
    os.close(sends_answers)
    return os.fdopen(sends_requests, "w"), os.fdopen(reads_answers)


def _run_all(request: dict[str, Any]) -> list[int]:
    children = []
    for number, arguments in enumerate(request["each"]):
        child = os.fork()
        if child == 0:
            _become_program(request, number, arguments)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for child in children:
        with suppress(ProcessLookupError):  # processes that the child started and did not end
            os.killpg(child, signal.SIGKILL)
    return statuses


def _become_program(request: dict[str, Any], number: int, arguments: list[str]) -> None:
    """Run code and end the process as `python -c` does."""
    status = 1
    try:
        os.setsid()
        signal.alarm(request["timeout"])
        for descriptor, kind in ((1, "out"), (2, "err")):
            file = os.open(Path(request["folder"], f"{number}.{kind}"), os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
            os.close(file)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        os.chdir(request["cwd"])
        sys.path[1:1] = [
            path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path
        ]
        os.environ.clear()
        os.environ.update(request["env"])
        sys.argv = ["-c", *arguments]
        scope = sys.modules["__main__"].__dict__
        exec(compile(request["code"], "<program>", "exec"), scope)
        status = 0
    except SystemExit as end:
        status = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
