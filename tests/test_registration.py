# SPDX-License-Identifier: Apache-2.0
"""The Auto classes know our types, whatever is imported first; each order has a process of its own."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import hf_ssl
from hf_ssl.methods import METHODS

PACKAGE = Path(hf_ssl.__file__).parent

# What is imported first. Each runs in a fork of a process that has loaded torch and others, but neither
# transformers nor hf_ssl.
ORDERS = {
    "hf_ssl alone": "import hf_ssl; assert not {'transformers', 'datasets.arrow_dataset'} & loaded()",
    "hf_ssl, then AutoConfig": (
        "import hf_ssl; from transformers import AutoConfig; "
        "assert 'transformers.modeling_utils' not in loaded()"
    ),
    "hf_ssl, then a model class": "import hf_ssl; from transformers import AutoModelForPreTraining",
    "hf_ssl, then Trainer": "import hf_ssl; from transformers import Trainer; assert Trainer.train",
    "hf_ssl, then pipeline": "import hf_ssl; from transformers import pipeline; assert callable(pipeline)",
    "hf_ssl, then modeling_utils": "import hf_ssl, transformers.modeling_utils",
    "transformers, then hf_ssl": "from transformers import AutoModelForPreTraining; import hf_ssl",
    "a concrete model, then hf_ssl": "from transformers import ViTModel; import hf_ssl",
}

DRIVER = """
import importlib, json, os, sys, traceback
# What the orders would load again and again.
import torch, accelerate, torchvision, sklearn.metrics, torch.distributed.fsdp

orders, methods = json.load(sys.stdin)
loaded = lambda: set(sys.modules)
assert not {"transformers", "hf_ssl"} & loaded()

def check():
    from transformers import AutoConfig
    configs = {}
    for name in methods:
        configs[name] = AutoConfig.for_model("ssl_" + name)
        assert type(configs[name]).__module__.startswith("hf_ssl.")
    from transformers import MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING
    for name, config in configs.items():
        assert type(config) in MODEL_FOR_PRETRAINING_MAPPING, f"{name} is not known"
        assert type(config) not in MODEL_MAPPING, f"{name}: AutoModel promises an encoder"
    for name, module in list(sys.modules.items()):
        if name.startswith("hf_ssl") and module.__spec__ is not None:
            for loader in (type(module.__spec__.loader), type(module.__loader__)):
                assert not loader.__module__.startswith("hf_ssl"), f"{name} kept {loader}"

def run(name, code, pipe):
    try:
        exec(code, {"loaded": loaded})
        check()
        message = ""
    except BaseException:
        message = traceback.format_exc()[-3000:] or "failed"
    with os.fdopen(pipe, "w") as file:
        file.write(message)
    os._exit(0)

results, running = {}, []
def collect():
    name, pid, pipe = running.pop(0)
    with os.fdopen(pipe) as file:
        results[name] = file.read()
    os.waitpid(pid, 0)

for name, code in orders.items():
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        run(name, code, writing)
    os.close(writing)
    running.append((name, pid, reading))
    if len(running) == 2:
        collect()
while running:
    collect()
json.dump(results, sys.stdout)
"""


def own_files() -> list[str]:
    """The files that the hook may meet half-loaded: bases, and the two of every method."""
    files = [path for path in (PACKAGE / "modeling").glob("*.py") if "transformers" in path.read_text()]
    names = ["hf_ssl.modeling." + path.stem for path in files]
    methods = [
        place.partition(":")[0] for method in METHODS.values() for place in (method.config, method.model)
    ]
    return [*sorted(names), *methods, "hf_ssl.trainer.arguments", "hf_ssl.recipe", "hf_ssl.evaluation"]


def orders() -> dict[str, str]:
    return ORDERS | {f"{name} first": f"import {name}" for name in own_files()}


@cache
def results() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([orders(), list(METHODS)]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("order", orders())
def test_auto_classes_know_our_types(order: str) -> None:
    assert results()[order] == ""


def test_importing_hf_ssl_is_cheap() -> None:
    code = (
        "import sys, hf_ssl\n"
        "hf_ssl.METHODS, dir(hf_ssl), hf_ssl.__version__\n"
        "heavy = ('torch', 'transformers', 'datasets', 'evaluate', 'numpy', 'omegaconf')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    for name in hf_ssl.__all__:
        assert getattr(hf_ssl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'SSLTraner'"):
        _ = hf_ssl.SSLTraner
