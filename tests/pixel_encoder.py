# SPDX-License-Identifier: Apache-2.0
"""An encoder whose features are a linear map of the pixels, with its image processor."""

import torch
from torch import nn
from transformers import BitImageProcessor

SIZE = 8


class Pixels(nn.Module):
    """An encoder whose features are a linear map of the pixels."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.map = nn.Linear(channels * SIZE * SIZE, 6, bias=False)
        with torch.no_grad():
            weight = torch.randn(self.map.weight.shape, generator=torch.Generator().manual_seed(1))
            self.map.weight.copy_(weight)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"pooler_output": self.map(pixel_values.flatten(1))}


def processor(channels: int = 3) -> BitImageProcessor:
    return BitImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        do_convert_rgb=False,
        image_mean=[0.5] * channels,
        image_std=[0.25] * channels,
    )
