# SPDX-License-Identifier: Apache-2.0
"""The requirements of a method for encoder, views, data and batch size, and their errors."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from hf_ssl.errors import UserError
from hf_ssl.modeling.configuration import MASKING_TYPE, method_of


class Requirements:
    """The checks of a method's requirements. `SSLPreTrainedModel` describes the attributes."""

    couples_samples: bool
    minimum_views: ClassVar[int]
    maximum_views: ClassVar[int | None]
    takes_local_views: ClassVar[bool]
    backbone_types: ClassVar[tuple[str, ...] | None]
    needs_sample_index: ClassVar[bool]
    streaming_advice: ClassVar[str] = "a method with a queue (MoCo, SwAV) or in-batch negatives (SimCLR)"
    takes_image_columns: ClassVar[bool]
    config_class: Any
    config: Any

    @classmethod
    def method_name(cls) -> str:
        """Return the name that selects the method in a recipe (`method.name`)."""
        model_type = str(cast(Any, cls.config_class).model_type)
        return method_of(model_type) or model_type  # a class of another package can have any model type

    @classmethod
    def check_backbone(cls, model_type: str) -> None:
        """Raise `UserError` if the method cannot train this type of encoder."""
        if model_type == MASKING_TYPE:
            raise UserError(
                f"backbone.model_type: expected an encoder without random masks, got {model_type}; use vit, "
                "and method.name=mae for MAE"
            )
        known = cls.backbone_types
        if known is not None and model_type not in known:
            raise UserError(
                f"backbone.model_type: expected one of {', '.join(known)} for {cls.method_name()}, got "
                f"{model_type}"
            )

    @classmethod
    def check_views(cls, global_views: int, local_views: int) -> None:
        """Raise `UserError` if the method does not support this number of views."""
        count, most = global_views + local_views, cls.maximum_views
        if local_views and not cls.takes_local_views:
            raise UserError(
                f"views.local: expected no local views for {cls.method_name()}, got {local_views}"
            )
        if count < cls.minimum_views or (most is not None and count > most):
            least = cls.minimum_views
            wanted = f"exactly {least}" if most == least else f"{least} to {most}"
            wanted = f"at least {least}" if most is None else wanted
            name = cls.method_name()
            raise UserError(f"views.count: expected {wanted} views of an image for {name}, got {count}")

    @classmethod
    def stores_images(cls, config: Any) -> bool:
        """Return whether a model with this config stores a state of each image (`needs_sample_index`)."""
        return cls.needs_sample_index

    @classmethod
    def settings_in_epochs(cls, config: Any) -> dict[str, float]:
        """Return the settings of a config that count epochs and have an effect. Their names show the unit."""
        names = (field.name for field in dataclasses.fields(config))
        values = {name: getattr(config, name) for name in names if name.endswith(("_epoch", "_epochs"))}
        return {name: value for name, value in values.items() if value}

    @classmethod
    def check_streaming(cls, streaming: bool, config: Any = None) -> None:
        """Raise `UserError` if the data is a stream and the method needs row numbers.

        Args:
            streaming: whether the data is a stream.
            config: config of the method. None checks what holds for every config.
        """
        needed = cls.needs_sample_index if config is None else cls.stores_images(config)
        if needed and streaming:
            raise UserError(
                f"data.streaming: expected images with row numbers for {cls.method_name()}, got a stream; "
                f"use data.streaming=false, or {cls.streaming_advice}"
            )

    @classmethod
    def compares_images(cls, config: Any) -> bool:
        """Return whether the loss of a model with this config compares images of a batch with each other."""
        return cls.couples_samples

    @classmethod
    def check_batch_size(cls, batch_size: int, config: Any) -> None:
        """Raise `UserError` if a batch has too few images for a model with this config."""
        if cls.compares_images(config) and batch_size < 2:
            raise UserError(
                f"training.batch_size: expected at least 2, because {cls.method_name()} compares images with "
                f"each other, got {batch_size}"
            )

    @classmethod
    def check_image_columns(cls, columns: Mapping[str, str], config: Any = None) -> None:
        """Raise `UserError` if the method does not use these further image columns.

        Args:
            columns: {name: kind} (`data.further_image_columns`).
            config: config of the method. None checks what holds for every config.
        """
        if columns and not cls.takes_image_columns:
            raise UserError(
                f"data.further_image_columns: expected none for {cls.method_name()}, because only cmc uses "
                f"them, got {', '.join(columns)}; leave it out"
            )
        known = {} if config is None or not cls.takes_image_columns else config.further_image_columns or {}
        if config is not None and dict(columns) != dict(known):
            raise UserError(
                "data.further_image_columns: expected the value of config.further_image_columns, "
                f"{dict(known)}, got {dict(columns)}; set the same for both"
            )

    def check_source(self, streaming: bool, num_rows: int | None) -> None:
        """Raise `UserError` if this model cannot be trained on a stream or on this number of images."""
        self.check_streaming(streaming, self.config)
        if self.stores_images(self.config) and self.config.num_samples != num_rows:
            raise UserError(
                f"config.num_samples: expected {num_rows}, the number of images, got "
                f"{self.config.num_samples}"
            )
