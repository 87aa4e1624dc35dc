# SPDX-License-Identifier: Apache-2.0
"""Configuration of CMC."""

import re
from typing import Any, cast

from transformers.models.auto.configuration_auto import AutoConfig

from hf_ssl.data.config import COLUMN_KINDS
from hf_ssl.errors import UserError, check_name
from hf_ssl.modeling.configuration import BankConfig, check_fields, check_unused, strict
from hf_ssl.modeling.narrow_encoders import DIVISIBLE_TYPES, narrow_configs
from hf_ssl.views.color_spaces import COLOR_SPACES, ColorViews
from hf_ssl.views.preset import ViewPreset

GRAPHS = ("full", "core")
LOSSES = ("info_nce", "nce", "softmax")


@strict
class CMCConfig(BankConfig):
    """CMC (Tian et al., arXiv:1906.05849).

    Each color view has a narrow encoder: its widths and attention heads are shares of those in the config.
    Narrow ResNets of a linear color space ("ydbdr", "ycbcr", "rgb") fold into one encoder, which is
    published. With "lab" and with other encoders, each narrow encoder is published in its own subfolder.

    Attributes:
        color_space: "ydbdr" (PyContrast), "lab" (the paper), "ycbcr" or "rgb".
        channel_groups: how many consecutive channels form each view, such as [1, 2] for Y and DbDr. None
            means [1, 1, 1] for "rgb" and [1, 2] for the others.
        further_image_columns: further image columns of the data, {name: kind}, such as {"depth": "gray"}.
            Each is a further view, after the color views, in the order of the names. Its encoder is as wide
            as that of the first view. It is not a part of the published encoder, which needs only RGB images.
            A recipe sets it as `data.further_image_columns` (`hf_ssl.data.further_columns` describes the
            kinds).
        gradient_view: whether the magnitude of the gradient is a further, last view. Its encoder is as wide
            as that of the first view. It is not a part of the published encoder.
        graph: "full" contrasts all pairs of views (L_F), "core" only the first view with each other one
            (L_C). They are equal for two views.
        loss: "info_nce" has the other images of the batch as negatives, so it also works with a stream. With
            "nce" (noise-contrastive estimation, the default of the authors' code) and "softmax" (cross
            entropy), the negatives are random rows of a memory bank. Each view has its own bank. The authors'
            code has 16,384 negatives, and its banks start as `bank_start: uniform`. `negatives` and the
            settings of the banks are only for these two losses.
        temperature: temperature of the softmax over similarities (0.07).
        projection_size: output width of each head (128).
        projection_layers: number of layers of each head: 1 in CMC, 2 in the variant v2 of PyContrast.
        projection_hidden_size: width of the hidden layers of the heads. None means the width of the features.
    """

    model_type = "ssl_cmc"

    color_space: str = "ydbdr"
    channel_groups: list[int] | tuple[int, ...] | None = None
    further_image_columns: dict[str, str] | None = None
    gradient_view: bool = False
    graph: str = "full"
    loss: str = "info_nce"
    temperature: float = 0.07
    projection_size: int = 128
    projection_layers: int = 1
    projection_hidden_size: int | None = None

    def validate_views_and_encoder(self) -> None:
        """Raise `ValueError` for an unknown name or for invalid views.

        Views are invalid if their channels do not sum to 3, or if there are fewer than two views. The
        function also raises the error for an encoder that cannot be divided, or that expects no RGB images.
        """
        check_name("method.color_space", self.color_space, COLOR_SPACES, "a known color space")
        groups = self.groups
        is_division = min(groups, default=0) >= 1 and sum(groups) == 3
        views = len(groups) + len(self.columns) + self.gradient_view
        check_fields(
            ("graph", self.graph, self.graph in GRAPHS, f"one of {', '.join(GRAPHS)}"),
            ("loss", self.loss, self.loss in LOSSES, f"one of {', '.join(LOSSES)}"),
            ("channel_groups", list(groups), is_division, "numbers of at least 1 with the sum 3"),
            ("channel_groups", list(groups), views >= 2, "at least two groups without further views"),
        )
        self._check_columns()
        if self.loss == "info_nce":
            of_banks = ["negatives", "bank_momentum", "bank_start", "bank_precision"]
            check_unused(self, of_banks, "method.loss=info_nce")
        if self.projection_layers == 1:
            check_unused(self, ["projection_hidden_size"], "method.projection_layers=1")
        if cast(Any, self.backbone_config).model_type in DIVISIBLE_TYPES:
            narrow_configs(self.backbone_config, groups)

    def _check_columns(self) -> None:
        for name, kind in self.columns.items():
            check_name(f"data.further_image_columns.{name}", kind, COLUMN_KINDS, "a kind of images")
        names = [*self.color_views.names, *self.column_names, "gradient"]
        repeated = [name for number, name in enumerate(names) if name in names[:number]]
        if repeated:
            raise UserError(
                "data.further_image_columns: expected columns with other names before the first dot than "
                f"those of the other views, got {repeated[0]} twice; rename the column"
            )
        self._check_normals()

    def _check_normals(self) -> None:
        """Raise `UserError` if a rotation of the views would turn the directions of surface normals."""
        normals = [name for name, kind in self.columns.items() if kind == "normals"]
        for settings in ViewPreset.from_dict(self.views or {}).expand() if normals else ():
            for name in ("quarter_turns", "rotation"):
                if value := getattr(settings, name):
                    raise UserError(
                        f"views.{name}: expected 0, because a rotation changes the directions of the surface "
                        f"normals in the column {normals[0]}, got {value}"
                    )

    @property
    def columns(self) -> dict[str, str]:
        """Return the further image columns {name: kind} in the order of their names."""
        return dict(sorted((self.further_image_columns or {}).items()))

    @property
    def column_names(self) -> list[str]:
        """Return the name of the view of each further image column: "depth" for "depth.png"."""
        return [re.sub(r"\W", "_", name.split(".")[0]) for name in self.columns]

    @property
    def groups(self) -> tuple[int, ...]:
        """Return how many channels each color view has."""
        if self.channel_groups is None:
            return COLOR_SPACES[self.color_space].groups
        return tuple(self.channel_groups)

    @property
    def color_views(self) -> ColorViews:
        """Return the division of normalized images into color views."""
        preset: Any = ViewPreset.from_dict(self.views or {})
        return ColorViews(self.color_space, self.groups, tuple(preset.mean), tuple(preset.std))


AutoConfig.register(CMCConfig.model_type, CMCConfig)
