# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays in the process while a CPU computes."""

import os
import platform
import subprocess
import sys

import pytest

from hf_ssl import allocation
from hf_ssl.allocation import kept_memory


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


# A new process: free memory of earlier tests in this process could hold the buffers.
FAULTS = """
import resource
from hf_ssl.allocation import kept_memory

def faults(count):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        b"1" * (64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start

print(faults(4))
with kept_memory("cpu"):
    faults(8)  # glibc needs up to four buffers until one is used again
    print(faults(4))
"""


def test_freed_buffers_are_used_again():
    variables = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MALLOC_") and name not in ("GLIBC_TUNABLES", "LD_PRELOAD")
    }
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        if "[always]" in file.read():
            pytest.skip("the kernel uses large pages")
    run = subprocess.run(
        [sys.executable, "-c", FAULTS], env=variables, capture_output=True, text=True, check=True
    )
    usual, kept = map(int, run.stdout.split())
    pages = 64 * 256  # of 4 KiB, in one buffer
    assert usual > 3 * pages  # the behavior of glibc that the block avoids
    assert kept < pages


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
