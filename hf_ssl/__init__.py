# SPDX-License-Identifier: Apache-2.0
"""Self-supervised image pretraining on the Hugging Face stack.

`import hf_ssl` loads neither torch nor transformers; the names below are loaded when they are first used.
transformers' Auto classes know the methods' model types all the same, whichever of the two is imported first
(`hf_ssl.registration`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ssl import registration

if TYPE_CHECKING:
    from hf_ssl import cards, data, evaluation, hub, losses, methods, modeling, recipe, run, trainer, views
    from hf_ssl.errors import UserError
    from hf_ssl.methods import METHODS
    from hf_ssl.recipe import Recipe, load_recipe
    from hf_ssl.trainer.arguments import SSLTrainingArguments
    from hf_ssl.trainer.trainer import SSLTrainer

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Recipe",
    "SSLTrainer",
    "SSLTrainingArguments",
    "UserError",
    "__version__",
    "cards",
    "data",
    "evaluation",
    "hub",
    "load_recipe",
    "losses",
    "methods",
    "modeling",
    "recipe",
    "run",
    "trainer",
    "views",
]

_HOMES = {
    "METHODS": "hf_ssl.methods",
    "Recipe": "hf_ssl.recipe",
    "SSLTrainer": "hf_ssl.trainer.trainer",
    "SSLTrainingArguments": "hf_ssl.trainer.arguments",
    "UserError": "hf_ssl.errors",
    "load_recipe": "hf_ssl.recipe",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in __all__:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


registration.install()
