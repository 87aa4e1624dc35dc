# SPDX-License-Identifier: Apache-2.0
"""Values that move while a run goes on; loads no model, so configurations may check them."""

import math
from typing import Any

SCHEDULES = ("constant", "linear", "cosine")


def scheduled(start: float, end: float, schedule: str, fraction: float) -> float:
    """A value that moves from `start` to `end` while `fraction` goes from 0 to 1.

    Args:
        schedule: "constant" (`start` throughout), "linear", or "cosine" (half a period).
        fraction: share of the run that is done.
    """
    if schedule == "constant":
        return start
    weight = fraction if schedule == "linear" else (1 - math.cos(math.pi * fraction)) / 2
    return start + (end - start) * weight


def check_momentum(config: Any) -> None:
    """Raise `ValueError` for a momentum out of range or an unknown schedule."""
    for key in ("momentum", "momentum_end"):
        if not 0 <= (value := config.to_dict()[key]) <= 1:
            raise ValueError(f"method.{key} must be between 0 and 1, got {value}")
    if config.momentum_schedule not in SCHEDULES:
        raise ValueError(
            f"method.momentum_schedule must be one of {', '.join(SCHEDULES)}, "
            f"got {config.momentum_schedule!r}"
        )
