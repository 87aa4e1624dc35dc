# SPDX-License-Identifier: Apache-2.0
"""Finds mutations that the tests do not detect: `python tests/weekly/mutations.py --mutations 200`.

Each mutant replaces its source file in a separate process. There, the tests of the file run until one fails.
If no test fails, the mutant survives: it shows a gap in the tests, or it is a change without effect. The log
stores the tested mutants, so that the same command continues with others. mutations.json is its summary.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

from forks import Forks
from weekly.mutants import Mutant, mutants, mutated

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "weekly" / "mutations.json"
LOG = ROOT / "tests" / "weekly" / "mutations.jsonl"

# The tests of the source files in a folder. The test file with the name of the source file runs first.
TESTS = {
    "hf_ssl/losses": ["tests/losses"],
    "hf_ssl": ["tests/test_random.py"],
    "hf_ssl/views": ["tests/views"],
    "hf_ssl/modeling": ["tests/modeling", "tests/methods", "tests/test_methods.py"],
    "hf_ssl/trainer": ["tests/trainer"],
    "hf_ssl/data": ["tests/data"],
}
# Source files that have further tests in other folders.
ALSO = {
    "hf_ssl/modeling/gather.py": ["tests/trainer/test_gradient_cache.py"],
    "hf_ssl/modeling/lars.py": ["tests/trainer/test_optimizers.py"],
    "hf_ssl/modeling/parameter_groups.py": [
        "tests/trainer/test_continued.py",
        "tests/trainer/test_optimizers.py",
    ],
}
# In these folders, only files that compute or order are mutated. The others read, write and report.
FILES = {
    "hf_ssl": ("random",),
    "hf_ssl/trainer": ("gradient_cache", "optimizers", "logs"),
    "hf_ssl/data": ("loader", "stream", "stream_loader", "batch", "labeled"),
}

# Files whose tests need several processes. For other files, such tests do not run, because they start slowly.
IN_PROCESSES = ("hf_ssl/modeling/batch_norm.py", "hf_ssl/modeling/gather.py")

# Replaces the source of one module at its import. JOB is the path of the file that contains the source.
HOOK = """
import json, sys
from importlib.machinery import PathFinder, SourceFileLoader

job = json.load(open(JOB))

class Changed(SourceFileLoader):
    def get_code(self, fullname):
        return compile(job["source"], self.path, "exec", dont_inherit=True)

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == job["module"]:
            spec = PathFinder.find_spec(name, path)
            spec.loader = Changed(name, spec.origin)
            return spec

assert not any(name.split(".")[0] == "hf_ssl" for name in sys.modules)
sys.meta_path.insert(0, Finder)
"""

# Runs in a fork that has not loaded hf_ssl.
PROGRAM = """
import os, resource, sys
exec(open(sys.argv[1]).read())
resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_seconds"],) * 2)
os.environ["FORKS_PRELUDE"] = sys.argv[1]  # for processes that the tests start

class Order:
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if job["forks"] or "forks" not in item.fixturenames]
        items.sort(key=lambda item: item.path.stem != "test_" + job["module"].rpartition(".")[2])

sys.path.insert(0, job["root"])
import pytest
options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
sys.exit(pytest.main([*options, *job["tests"]], plugins=[Order()]))
"""


def candidates() -> dict[str, list[Mutant]]:
    """Return all mutants by file."""
    found = {}
    for folder in TESTS:
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem != "__init__" and path.stem in FILES.get(folder, (path.stem,)):
                name = path.relative_to(ROOT).as_posix()
                found[name] = mutants(name, path.read_text(encoding="utf-8"))
    return found


def run_tests(forks: Forks, file: str, source: str, cpu_seconds: int) -> int:
    """Return the status of the tests of a file after its source is replaced."""
    job = {
        "module": file.removesuffix(".py").replace("/", "."), "source": source, "root": str(ROOT),
        "tests": [*ALSO.get(file, []), *TESTS[file.rpartition("/")[0]]], "cpu_seconds": cpu_seconds,
        "forks": file in IN_PROCESSES,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        data, hook = Path(folder, "job.json"), Path(folder, "hook.py")
        data.write_text(json.dumps(job), encoding="utf-8")
        hook.write_text(HOOK.replace("JOB", repr(str(data))), encoding="utf-8")
        done = forks.run("transformers", PROGRAM, str(hook), cwd=ROOT, timeout=30 * cpu_seconds)
    return done.returncode


def baseline(forks: Forks, folder: str) -> None:
    """Check that the tests pass without a mutation. Otherwise every mutant would seem to be detected."""
    file = next(path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
    name = file.relative_to(ROOT).as_posix()
    status = run_tests(forks, name, file.read_text(encoding="utf-8"), cpu_seconds=900)
    if status:
        sys.exit(f"the tests of {folder} end with status {status} without a mutation")


def tried(log: Path) -> dict[str, dict[str, Any]]:
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


def sample(seed: int, only: str) -> Iterator[Mutant]:
    """Yield the mutants in a random order that depends only on the seed."""
    chosen = [mutant for file, all_of_it in candidates().items() if only in file for mutant in all_of_it]
    random.Random(seed).shuffle(chosen)
    yield from chosen


def summary(seed: int, entries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the counts of each file and the surviving mutants, without mutants of older sources."""
    found = candidates()
    known = {mutant.key: mutant for all_of_it in found.values() for mutant in all_of_it}
    counts = {
        file: {"mutants": len(all_of_it), "tried": 0, "survived": 0} for file, all_of_it in found.items()
    }
    survivors = []
    for key in sorted(entries.keys() & known.keys()):
        mutant, entry = known[key], entries[key]
        counts[mutant.file]["tried"] += 1
        if entry["survived"]:
            counts[mutant.file]["survived"] += 1
            survivors.append({"file": mutant.file, "line": mutant.line, "change": mutant.change})
    totals = {
        name: sum(count[name] for count in counts.values()) for name in ("mutants", "tried", "survived")
    }
    return {"seed": seed, **totals, "files": counts, "survivors": survivors}


def run(arguments: argparse.Namespace) -> list[Mutant]:
    """Test mutants until the number or the time is reached. Return the survivors of this call."""
    entries, survivors = tried(arguments.log), []
    wanted = [m for m in sample(arguments.seed, arguments.only) if m.key not in entries][
        : arguments.mutations
    ]
    end = time.monotonic() + 60 * arguments.minutes

    def work(mine: list[Mutant]) -> None:
        with Forks(also=("pytest", "xdist", "lightly.loss", "lightly.models", "timm")) as forks:
            for folder in dict.fromkeys(mutant.file.rpartition("/")[0] for mutant in mine):
                if not arguments.trust:
                    baseline(forks, folder)
            for mutant in mine:
                if time.monotonic() > end:
                    return
                source = mutated((ROOT / mutant.file).read_text(encoding="utf-8"), mutant.number)
                status = run_tests(forks, mutant.file, source, arguments.cpu_seconds)
                entry = {"key": mutant.key, "survived": status == 0, "status": status}
                with arguments.log.open("a", encoding="utf-8") as log:
                    log.write(json.dumps(entry) + "\n")
                if status == 0:
                    survivors.append(mutant)
                    print("survived", mutant.key, flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in [pool.submit(work, wanted[start :: arguments.jobs]) for start in range(arguments.jobs)]:
            done.result()
    record = summary(arguments.seed, tried(arguments.log))
    arguments.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{record['survived']} of {record['tried']} tested mutants survived; there are {record['mutants']}")
    return survivors


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--mutations", type=int, default=200, help="number of mutants to test")
    options.add_argument("--minutes", type=float, default=float("inf"), help="time limit for new mutants")
    options.add_argument("--seed", type=int, default=0, help="seed of the order of the mutants")
    options.add_argument("--only", default="", help="part of the path of the files, such as hf_ssl/losses")
    options.add_argument("--jobs", type=int, default=1, help="number of processes at the same time")
    options.add_argument("--cpu-seconds", type=int, default=300, help="limit for the tests of one mutant")
    options.add_argument("--trust", action="store_true", help="skip the tests without a mutation")
    options.add_argument("--log", type=Path, default=LOG)
    options.add_argument("--record", type=Path, default=RECORD)
    return options


if __name__ == "__main__":
    run(parser().parse_args())
