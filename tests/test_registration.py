# SPDX-License-Identifier: Apache-2.0
"""The Auto classes know the methods after `import hf_ssl.auto`; each case has its own process."""

import json
import subprocess
import sys

import pytest
from forks import Forks
from tiers import in_tiers

import hf_ssl
from hf_ssl.methods import METHODS

# The first imports, in a process that has loaded torch, but neither transformers nor hf_ssl.
IMPORTS = {
    "hf_ssl.auto, then AutoConfig": "import hf_ssl.auto; from transformers import AutoConfig",
    "hf_ssl.auto, then Trainer": "import hf_ssl.auto; from transformers import Trainer, pipeline",
    "a model class, then hf_ssl.auto": "from transformers import AutoModelForPreTraining; import hf_ssl.auto",
    "a concrete model, then hf_ssl.auto": "from transformers import ViTModel; import hf_ssl.auto",
    "the trainer": "from hf_ssl import SSLTrainer",
    "the run of the commands": "import hf_ssl.run",
}
# The first import of each package and of one method: no import may need another one before it.
FIRST = [
    "hf_ssl.data",
    "hf_ssl.evaluation",
    "hf_ssl.hub",
    "hf_ssl.modeling.base",
    "hf_ssl.recipe.recipe",
    "hf_ssl.methods.simclr.modeling_simclr",
]

PROGRAM = """
import json, sys

assert not {"transformers", "hf_ssl"} & set(sys.modules)
exec(sys.argv[1])

from transformers import MODEL_FOR_PRETRAINING_MAPPING, MODEL_MAPPING, AutoConfig
for name in json.loads(sys.argv[2]):
    config = AutoConfig.for_model("ssl_" + name)
    assert type(config).__module__.startswith("hf_ssl.")
    assert type(config) in MODEL_FOR_PRETRAINING_MAPPING, f"{name} is not known"
    assert type(config) not in MODEL_MAPPING, f"{name}: AutoModel promises an encoder"
"""


@pytest.mark.parametrize(
    "name", in_tiers(zip(IMPORTS), [("hf_ssl.auto, then AutoConfig",), ("the run of the commands",)])
)
def test_auto_classes_know_all_methods(forks: Forks, name: str) -> None:
    done = forks.run("torch", PROGRAM, IMPORTS[name], json.dumps(list(METHODS)))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "module", in_tiers(zip(FIRST), [("hf_ssl.data",), ("hf_ssl.methods.simclr.modeling_simclr",)])
)
def test_any_module_can_be_imported_first(forks: Forks, module: str) -> None:
    done = forks.run("torch", f"import {module}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_importing_a_method_registers_it(forks: Forks) -> None:
    imports = "from hf_ssl import SimCLRConfig, SimCLRForPreTraining"
    done = forks.run("torch", PROGRAM, imports, json.dumps(["simclr"]))
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
    for method in METHODS.values():
        for import_path in (method.config, method.model):
            assert getattr(hf_ssl, import_path.rpartition(":")[2]).__name__ == import_path.rpartition(":")[2]
    with pytest.raises(AttributeError, match="no attribute 'SSLTraner'"):
        _ = hf_ssl.SSLTraner
