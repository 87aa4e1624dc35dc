# SPDX-License-Identifier: Apache-2.0
"""Self-supervised image pretraining on the Hugging Face stack.

`import hf_ssl` loads neither torch nor transformers: the names below are imported when they are first used.
`import hf_ssl.auto` makes transformers' Auto classes load the models of the methods.
"""

from typing import TYPE_CHECKING

from hf_ssl.methods import METHODS as METHODS
from hf_ssl.names import lazy_names

if TYPE_CHECKING:
    from hf_ssl.errors import UserError as UserError
    from hf_ssl.evaluation import evaluate_encoder as evaluate_encoder
    from hf_ssl.recipe import Recipe as Recipe
    from hf_ssl.recipe import load_recipe as load_recipe
    from hf_ssl.trainer.arguments import SSLTrainingArguments as SSLTrainingArguments
    from hf_ssl.trainer.trainer import SSLTrainer as SSLTrainer

__version__ = "0.1.0"

_PACKAGES = (
    "cards",
    "data",
    "evaluation",
    "hub",
    "losses",
    "methods",
    "modeling",
    "recipe",
    "run",
    "trainer",
    "views",
)
_modules_and_classes = [
    import_path.split(":") for method in METHODS.values() for import_path in (method.config, method.model)
]

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "hf_ssl.errors": ["UserError"],
        "hf_ssl.evaluation": ["evaluate_encoder"],
        "hf_ssl.methods": ["METHODS"],
        "hf_ssl.recipe": ["Recipe", "load_recipe"],
        "hf_ssl.trainer.arguments": ["SSLTrainingArguments"],
        "hf_ssl.trainer.trainer": ["SSLTrainer"],
        **{module: [name] for module, name in _modules_and_classes},
    },
    modules=[f"hf_ssl.{name}" for name in _PACKAGES],
)
