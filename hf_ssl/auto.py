# SPDX-License-Identifier: Apache-2.0
"""Registers the models of all methods with the Auto classes of transformers when it is imported.

The configuration file and the modeling file of each method end with a line that registers its class. This
module imports these files. The trainer and the commands import this module.
"""

from hf_ssl.methods import METHODS

for _method in METHODS.values():
    _method.config_class(), _method.model_class()
