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
    from hf_ssl.metrics import load_metric as load_metric
    from hf_ssl.recipe import Recipe as Recipe
    from hf_ssl.recipe import load_recipe as load_recipe
    from hf_ssl.trainer.arguments import SSLTrainingArguments as SSLTrainingArguments
    from hf_ssl.trainer.trainer import SSLTrainer as SSLTrainer

__version__ = "0.1.0"

_classes = [path.split(":") for method in METHODS.values() for path in (method.config, method.model)]

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    __file__,
    modules="cards data evaluation hub losses methods metrics modeling recipe run trainer views".split(),
    further={"METHODS": "hf_ssl.methods", **{name: module for module, name in _classes}},
)
