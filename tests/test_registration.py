# SPDX-License-Identifier: Apache-2.0
"""The Auto classes know our types, whatever is imported first; each order has a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forks import Forks
from tiers import in_tiers

import hf_ssl
from hf_ssl.methods import METHODS

PACKAGE = Path(hf_ssl.__file__).parent

# The first imports, in a process that has loaded torch, but neither transformers nor hf_ssl.
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

PROGRAM = """
import json, sys

loaded = lambda: set(sys.modules)
assert not {"transformers", "hf_ssl"} & loaded()
order, methods = sys.argv[1], json.loads(sys.argv[2])
exec(order)

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
"""


def own_files() -> list[str]:
    """The files that the hook may meet half-loaded: bases, and the two of every method."""
    files = [path for path in (PACKAGE / "modeling").glob("*.py") if "transformers" in path.read_text()]
    names = ["hf_ssl.modeling." + path.stem for path in files]
    methods = [
        place.partition(":")[0] for method in METHODS.values() for place in (method.config, method.model)
    ]
    return [*sorted(names), *methods, "hf_ssl.trainer.arguments", "hf_ssl.recipe", "hf_ssl.evaluation"]


# The sample: one base class, one of the two files of a method, and the package that imports most.
SAMPLED = ("hf_ssl.modeling.base", "hf_ssl.methods.simclr.modeling_simclr", "hf_ssl.evaluation")


def orders() -> list:
    files = [(f"import {name}",) for name in own_files()]
    sampled = [(f"import {name}",) for name in SAMPLED]
    return [*(pytest.param(code, id=name) for name, code in ORDERS.items()), *in_tiers(files, sampled)]


@pytest.mark.parametrize("order", orders())
def test_auto_classes_know_our_types(forks: Forks, order: str) -> None:
    done = forks.run("torch", PROGRAM, order, json.dumps(list(METHODS)))
    assert done.returncode == 0, done.stderr[-3000:]


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
