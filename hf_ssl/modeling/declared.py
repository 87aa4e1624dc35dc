# SPDX-License-Identifier: Apache-2.0
"""What a method says of itself, and what follows for those who use it."""

from typing import Any, ClassVar

from hf_ssl.errors import UserError


class Declared:
    """Class attributes of a method, where they differ from the defaults here.

    Attributes:
        couples_samples: the loss compares images with each other, so embeddings are gathered from all
            processes with gradient. Where the loss is a mean over images, averaging by DDP is exact already
            and this is False.
        minimum_views, maximum_views: views of an image that the loss needs and takes.
        backbone_types: model types of the backbones that it can train; None where any will do.
        needs_sample_index: it remembers something of every image, so images need a row number, which those of
            a stream have not. Its config has `num_samples`, how many images there are.
        begins_with_a_pass: all images are embedded and remembered once before the first step.
        takes_local_views: whether smaller views beside the global ones (multi-crop) mean anything to it.
        student_teacher: pairs of attribute names; a teacher starts as a copy of its student, is frozen, and
            is moved by the method.
        exported: name of the encoder that is published: the backbone, or its teacher.
        remembered: names of the embeddings that `remember` takes over.
        collapsed_below: measurements of the monitor, its own or the method's, with the value below which the
            method has collapsed.
        views_share_statistics: whether BatchNorm normalises all views of one size together. Where it is
            False each view goes through layers with BatchNorm by itself, as in authors' loops.
    """

    config: Any

    couples_samples: ClassVar[bool] = False
    minimum_views: ClassVar[int] = 2
    maximum_views: ClassVar[int | None] = None
    backbone_types: ClassVar[tuple[str, ...] | None] = None
    needs_sample_index: ClassVar[bool] = False
    begins_with_a_pass: ClassVar[bool] = False
    takes_local_views: ClassVar[bool] = False
    student_teacher: ClassVar[tuple[tuple[str, str], ...]] = ()
    exported: ClassVar[str] = "backbone"
    remembered: ClassVar[tuple[str, ...]] = ()
    collapsed_below: ClassVar[dict[str, float]] = {"embedding_std": 0.05, "embedding_rank": 2.0}
    views_share_statistics: ClassVar[bool] = True

    @classmethod
    def check_views(cls, global_views: int, local_views: int) -> None:
        """Raise `UserError` if the method cannot be trained with so many views of an image."""
        count, most = global_views + local_views, cls.maximum_views
        name = cls.__name__.removesuffix("ForPreTraining")
        if local_views and not cls.takes_local_views:
            raise UserError(f"views.local: {name} takes no local views, got {local_views}")
        if count < cls.minimum_views or (most is not None and count > most):
            wanted = f"exactly {most}" if most == cls.minimum_views else f"at least {cls.minimum_views}"
            raise UserError(f"views.count: {name} needs {wanted} views of an image, got {count}")

    @classmethod
    def check_streaming(cls, streaming: bool) -> None:
        """Raise `UserError` if the method cannot be trained on a stream and this is one."""
        if cls.needs_sample_index and streaming:
            name = cls.__name__.removesuffix("ForPreTraining")
            raise UserError(
                f"data.streaming: {name} remembers every image and needs data.streaming=false; methods with "
                "a queue (MoCo, SwAV) take streams"
            )

    def check_source(self, streaming: bool, num_rows: int | None) -> None:
        """Raise `UserError` if this model cannot be trained on such data."""
        self.check_streaming(streaming)
        if self.needs_sample_index and self.config.num_samples != num_rows:
            raise UserError(
                f"config.num_samples: expected {num_rows}, the number of images, got "
                f"{self.config.num_samples}"
            )
