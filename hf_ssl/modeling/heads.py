# SPDX-License-Identifier: Apache-2.0
"""Heads that more than one method uses."""

from torch import nn

from hf_ssl.modeling.batch_norm import BatchNorm1dWithoutOffset


class ProjectionHead(nn.Sequential):
    """SimCLR's projector: Linear without bias and BatchNorm in each layer, ReLU between, no offset in the
    last BatchNorm.

    Maps features (N, D) to (N, projection_size). Source: google-research/simclr, tf2/model.py
    (`proj_head_mode="nonlinear"`); BatchNorm's decay 0.9 is torch's momentum 0.1.
    """

    def __init__(self, feature_size: int, hidden_size: int, projection_size: int, num_layers: int) -> None:
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [
                nn.Linear(feature_size, hidden_size, bias=False),
                nn.BatchNorm1d(hidden_size),
                nn.ReLU(inplace=True),
            ]
            feature_size = hidden_size
        layers += [
            nn.Linear(feature_size, projection_size, bias=False),
            BatchNorm1dWithoutOffset(projection_size),
        ]
        super().__init__(*layers)
