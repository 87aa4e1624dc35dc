# SPDX-License-Identifier: Apache-2.0
"""Finds numbers that are not finite in files of weights, without torch (layer 0)."""

import json
from pathlib import Path

import numpy as np

# Type of a tensor in a safetensors file -> integers of its size, and the bits of its exponent. All these bits
# are set in NaN and infinity only. NumPy has no bfloat16, so integers are compared.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


def not_finite_in(folder: Path) -> str | None:
    """Return the name of the first tensor with NaN or infinity in the weight files of a folder, or None."""
    found = (not_finite_in_file(path) for path in sorted(folder.glob("*.safetensors")))
    return next((name for name in found if name is not None), None)


def not_finite_in_file(path: Path) -> str | None:
    """Return the name of the first tensor with NaN or infinity in a safetensors file, or None.

    The result is also None for a damaged file, which raises an error when it is loaded.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        data = np.memmap(path, np.uint8, "r", offset=8 + length)
        for name, entry in header.items():
            if entry.get("dtype") in _EXPONENTS:
                kind, exponent = _EXPONENTS[entry["dtype"]]
                start, end = entry["data_offsets"]
                bits = data[start:end].view(kind)
                if ((bits & bits.dtype.type(exponent)) == exponent).any():
                    return str(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return None
    return None
