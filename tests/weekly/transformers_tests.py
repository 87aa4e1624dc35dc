# SPDX-License-Identifier: Apache-2.0
"""Runs the common tests of transformers on all methods: `python tests/weekly/transformers_tests.py`.

The tests come from the source distribution of the installed version. It lacks three modules, which stubs
replace. `transformers_tests.json` contains the counts.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

HERE = Path(__file__).parent
RECORD = HERE / "transformers_tests.json"
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: pass",
    "generation/test_utils.py": "class GenerationTesterMixin: pass",
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, "
    "'output_hidden_states': True, 'architectures': ['Model'], 'id2label': {0: 'label'}, "
    "'label2id': {'label': '0'}, 'problem_type': 'regression'}",
}


def prepare(folder: Path) -> None:
    """Write the tests and the package `common` with the tests of transformers to a folder."""
    version = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    source = ["--no-binary", "transformers", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "download", version, *source, "-d", str(folder)], check=True)
    subprocess.run([*pip, "install", "parameterized", "--no-deps", "-t", str(folder / "lib")], check=True)
    package = folder / "common"
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    shutil.move(next(folder.glob("transformers-*/tests")), package)
    for name, code in STUBS.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(code + "\n")
        (package / name).parent.joinpath("__init__.py").touch()
    (package / "__init__.py").touch()
    shutil.copy(HERE / "transformers_cases.py", folder / "test_common_models.py")


def run(folder: Path, arguments: list[str]) -> tuple[dict[str, int], str]:
    """Return the numbers of passed, failed and skipped tests, and the output of pytest."""
    places = [str(folder), str(folder / "lib"), str(HERE.parent.parent)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "test_common_models.py", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return counts, done.stdout


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        counts, output = run(Path(name), arguments)
    print(output[-6000:])
    if not arguments:
        record = {"transformers": transformers.__version__, **counts}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(counts.get("failed", 0) + counts.get("error", 0) > 0 or not counts.get("passed"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
