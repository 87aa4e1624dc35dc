# SPDX-License-Identifier: Apache-2.0
"""The software and the hardware of a run, as facts (layer 3)."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from hf_ssl import __version__
from hf_ssl.cards.facts import EnvironmentFacts
from hf_ssl.resources import processor_field, usable_cores

PACKAGES = (
    "torch torchvision transformers datasets accelerate huggingface_hub safetensors numpy pillow timm"
).split()


def environment(device: Any = "cpu", processes: int = 1) -> EnvironmentFacts:
    """Return the software and hardware of a run.

    Args:
        device: the device of the model (`torch.device` or its name).
        processes: number of processes, each with its own device.
    """
    import torch  # imported here because cards need no torch

    device = torch.device(device)
    return EnvironmentFacts(
        python=platform.python_version(),
        packages={"hf_ssl": __version__}
        | {name: found for name in PACKAGES if (found := _version(name)) is not None},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        devices=processes,
        cores=usable_cores(),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return a name such as "AMD EPYC 9654 96-Core Processor", or the architecture if the name is unknown."""
    return processor_field("model name") or platform.processor() or platform.machine()
