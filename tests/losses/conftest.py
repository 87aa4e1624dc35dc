# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Collects the sizes of all tensors with new memory inside its context."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        result = operation(*arguments, **keywords)
        given = {
            value.untyped_storage()._cdata
            for value in (*arguments, *keywords.values())
            if isinstance(value, torch.Tensor)
        }
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.sizes.append(tensor.numel())
        return result


@pytest.fixture
def made():
    return Made()
