# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays in the process while a CPU computes."""

import resource

import pytest
import torch

from hf_ssl import allocation
from hf_ssl.allocation import kept_memory

MIB = 64


class Library:
    """Records the calls of a C library."""

    def __init__(self):
        self.calls = []

    def mallopt(self, parameter, value):
        self.calls.append((parameter, value))

    def malloc_trim(self, kept):
        self.calls.append("trim")


@pytest.fixture
def library(monkeypatch):
    found = Library()
    monkeypatch.setattr(allocation, "_glibc", lambda: found)
    return found


@pytest.fixture(autouse=True)
def _fresh():
    allocation._glibc.cache_clear()
    yield
    allocation._glibc.cache_clear()


def faults(count: int) -> int:
    """Return the page faults of tensors of 64 MiB, written one after the other."""
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(MIB * 2**20, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start


def test_freed_buffers_are_used_again(monkeypatch):
    for name in [*allocation.os.environ]:
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD"):
            monkeypatch.delenv(name)
    if allocation._glibc() is None:
        pytest.skip("another C library")
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        if "[always]" in file.read():
            pytest.skip("the kernel uses large pages")
    pages = MIB * 256
    assert faults(4) > 3 * pages  # the behavior of glibc that the block avoids
    with kept_memory("cpu"):
        faults(8)  # glibc needs up to four buffers until one is used again
        assert faults(4) < pages


def test_only_the_outermost_block_configures_the_allocator(library):
    with kept_memory("cpu"):
        inside = list(library.calls)
        with kept_memory("cpu"):
            pass
        assert library.calls == inside and len(inside) == 2
    assert library.calls[2:] == [*allocation._USUAL.items(), "trim"]


def test_the_allocator_is_reset_after_an_error(library):
    with pytest.raises(ZeroDivisionError), kept_memory("cpu"):
        raise ZeroDivisionError
    assert library.calls[-1] == "trim"


def test_other_devices_leave_the_allocator_alone(library):
    with kept_memory("cuda"):
        pass
    assert library.calls == []


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_a_configured_allocator_stays(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert allocation._glibc() is None
