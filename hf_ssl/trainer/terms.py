# SPDX-License-Identifier: Apache-2.0
"""The named parts of a loss between two log records."""

from torch import Tensor

from hf_ssl.modeling.gather import mean_over_processes
from hf_ssl.modeling.outputs import SSLOutput


class TermMeans:
    """Adds terms up on the device, without waiting for it, until a record is written."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, output: SSLOutput) -> None:
        """Count the terms of a micro-batch."""
        for name, value in (output.terms or {}).items():
            known = self._sums.get(name)
            self._sums[name] = value.detach().clone() if known is None else known + value.detach()
        self._count += 1

    def take(self) -> dict[str, float]:
        """Means over micro-batches and processes since the last call; begins anew. Waits for the device."""
        names, count = list(self._sums), self._count
        means = mean_over_processes([self._sums[name] / count for name in names])
        self._sums, self._count = {}, 0
        return dict(zip(names, means, strict=True))
