# SPDX-License-Identifier: Apache-2.0
"""Records the software and hardware of this process, without host and user names."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hf_ssl.cards.facts import EnvironmentFacts

PACKAGES = (
    "hf_ssl",
    "torch",
    "torchvision",
    "transformers",
    "datasets",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pillow",
    "timm",
)


def environment(device: torch.device | str = "cpu", processes: int = 1) -> EnvironmentFacts:
    """Return the software and hardware of a run.

    Args:
        device: the device of the model.
        processes: number of processes, each with its own device.
    """
    device = torch.device(device)
    return EnvironmentFacts(
        python=platform.python_version(),
        packages={name: found for name in PACKAGES if (found := _version(name)) is not None},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        devices=processes,
        cores=os.cpu_count() or 1,
        memory_gib=_memory_gib(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return a name such as "AMD EPYC 9654 96-Core Processor", or the architecture if the name is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None  # Windows has no sysconf
