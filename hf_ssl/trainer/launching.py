# SPDX-License-Identifier: Apache-2.0
"""Rejects options of `accelerate launch`, and of its configuration file, that change a run (layer 4).

accelerate reads these options from environment variables. No training argument contains them, so a run would
not record them. `hf_ssl.precision` checks `--mixed_precision`.
"""

import os

from transformers import TrainingArguments

from hf_ssl.errors import UserError
from hf_ssl.trainer.transformers_arguments import ONE_GPU

_COMPILER = "dynamo_backend"
_OPTIONS = {
    "ACCELERATE_USE_FSDP": ("use_fsdp", ONE_GPU),
    "ACCELERATE_USE_DEEPSPEED": ("use_deepspeed", ONE_GPU),
    "ACCELERATE_USE_MEGATRON_LM": ("use_megatron_lm", ONE_GPU),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("use_parallelism_config", ONE_GPU),
    "ACCELERATE_DYNAMO_BACKEND": (_COMPILER, "use training.torch_compile=true"),
}
"""Environment variable -> the option that sets it, and the reason for the error or the alternative."""
_UNSET = ("", "no", "0", "false")


def check_launcher(args: TrainingArguments) -> None:
    """Check that `accelerate launch` was started without options that no training argument contains.

    Args:
        args: the training arguments. With `torch_compile`, the option for the compiler is allowed, because
            the training arguments replace it.

    Raises:
        UserError: one of the options is set.
    """
    for name, (option, advice) in _OPTIONS.items():
        value = os.environ.get(name, "no").lower()
        if value not in _UNSET and not (option == _COMPILER and args.torch_compile):
            raise UserError(f"--{option} of accelerate launch: expected no value, got {value}; {advice}")
