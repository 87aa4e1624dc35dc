# SPDX-License-Identifier: Apache-2.0
"""The base class of all methods."""

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from hf_ssl.errors import UserError
from hf_ssl.losses.upcasting import upcast
from hf_ssl.modeling.activation_checkpoints import checkpoint_segments, supports_checkpointing
from hf_ssl.modeling.backbones import (
    encode,
    freeze_unused,
    initialize_as_timm,
    input_channels,
    set_identity_pooler,
)
from hf_ssl.modeling.batch_norm import batch_norms
from hf_ssl.modeling.configuration import SSLConfig, method_of
from hf_ssl.modeling.gather import gather
from hf_ssl.modeling.heads import WeightNormLinear
from hf_ssl.modeling.loading import loaded_commit, start_encoder, view_settings
from hf_ssl.modeling.memory import DeferredMemory, HostNumber, PersistentBuffers
from hf_ssl.modeling.outputs import COLLAPSED_RANK, RunProgress, SSLOutput
from hf_ssl.modeling.parallel_encoders import ParallelEncoders
from hf_ssl.modeling.parameter_groups import ParameterRule
from hf_ssl.modeling.pooling import Pooling, declare_feature, declare_patch_grid
from hf_ssl.modeling.position_tables import config_at_size, state_at_size
from hf_ssl.modeling.recorded_outputs import RecordedOutputs
from hf_ssl.modeling.requirements import Requirements
from hf_ssl.views.preset import ViewPreset

logger = logging.getLogger(__name__)

# Arguments of `from_pretrained` that say where the files are.
_PLACE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class SSLPreTrainedModel(Requirements, PreTrainedModel):
    """A method of self-supervised learning.

    The forward pass is `embed` (backbone, heads, teacher), then gathering over processes, then `objective`.
    A method defines:

        __init__                build the heads and end with `self.post_init()`
        embed(inputs)           inputs of `forward` -> named embeddings, batch first
        objective(embeddings)   embeddings -> `SSLOutput` with the loss; changes no state

    A method may also define:

        sample_masks(seeds)         sample masks, noise or patches of images, a function of their seeds
        parameter_rules             other learning rates or weight decay for some parameters
        update_memory(embeddings)   write embeddings to a queue, memory bank or center, after the loss. A
                                    memory that the backward pass reads again is a `DeferredMemory`
        before_epoch, before_step, after_backward, after_step
                                    schedules and EMA updates, called by the trainer
        synchronize_inputs(inputs)  make the shapes of inputs agree on all processes
        measurements(embeddings)    more numbers for the monitor
        patch_grid                  a grid of patches whose mean feature is also evaluated
        pictures(inputs)            images that a run saves

    It sets the class attributes below where the defaults do not fit. `TeacherModel` is the base class of
    methods with a momentum encoder, and `MomentumModel` that of methods whose projector also has a teacher.

    Attributes:
        couples_samples: whether the loss compares images with each other. Embeddings are then gathered from
            all processes with gradient. A loss that is a mean over images needs no gathering, because DDP's
            average is exact. If this depends on the config, see `compares_images`.
        minimum_views, maximum_views: how many views of an image the loss needs and accepts.
        takes_local_views: whether the method uses small views in addition to the global ones (multi-crop).
        joint_batch_norm: whether BatchNorm normalizes all views of one size together. If False, each view
            passes separately through layers with BatchNorm.
        batch_multiple: the number of which each process's batch must be a multiple.
        backbone_types: model types of the backbones that the method can train; None for any.
        student_teacher: pairs of attribute names. A teacher starts as a copy of its student and is frozen;
            the method updates it.
        exported: name of the published encoder: the backbone or its teacher.
        exported_projector: name of the submodule that projects the features of the published encoder, or of
            the list of such submodules for its parts. A method without this submodule has no projector.
        published_feature: which output of the published encoder is its feature, see
            `hf_ssl.modeling.pooling.pool`. "auto" is the pooler if the encoder has one. Any value except
            "auto" is stored in the encoder's config. The monitor, evaluation, card and Space use it.
        mask_inputs: names of the inputs that `sample_masks` returns.
        memory_inputs: names of the embeddings that `update_memory` needs.
        needs_memory_warmup: whether all images must be embedded once before the first step, to fill the
            memory bank. A model can set it from its config.
        warmup_has_all_rows: whether this pass includes the images that do not fill a batch. Some images of
            the batch before are then embedded again.
        needs_sample_index: whether the method stores a state of each image, such as an entry in a memory
            bank. Images then need row numbers, which a stream does not have, and the config has
            `num_samples`, the number of images. If this depends on the config, see `stores_images`.
        streaming_advice: what the user can choose instead, for the error about a stream.
        takes_image_columns: whether the method uses further image columns (`data.further_image_columns`). Its
            config then has `further_image_columns`, and their channels follow those of the image.
        collapsed_below: thresholds by name of a measurement. A smaller value means that the method has
            collapsed.
        continues: whether `start_from` gave the backbone trained weights.
        hooks_are_called: whether a trainer calls the hooks (`SSLTrainer` sets it), or the warning about
            missing calls was logged.
        ends_batch: whether the next forward pass completes the batch of an optimizer step. With gradient
            accumulation, `SSLTrainer` sets it to False for all micro-batches but the last. `update_memory` is
            then called once, with the embeddings of all micro-batches.
    """

    couples_samples: bool = False
    minimum_views: ClassVar[int] = 2
    maximum_views: ClassVar[int | None] = None
    takes_local_views: ClassVar[bool] = False
    joint_batch_norm: ClassVar[bool] = True
    batch_multiple: int = 1
    backbone_types: ClassVar[tuple[str, ...] | None] = None
    student_teacher: ClassVar[tuple[tuple[str, str], ...]] = ()
    exported: ClassVar[str] = "backbone"
    exported_projector: ClassVar[str] = "projector"
    published_feature: ClassVar[Pooling] = "auto"
    mask_inputs: ClassVar[tuple[str, ...]] = ()
    memory_inputs: tuple[str, ...] = ()
    needs_memory_warmup: bool = False
    warmup_has_all_rows: ClassVar[bool] = False
    needs_sample_index: ClassVar[bool] = False
    takes_image_columns: ClassVar[bool] = False
    collapsed_below: ClassVar[dict[str, float]] = {"embedding_std": 0.05, **COLLAPSED_RANK}

    # Attributes of transformers.
    config_class = SSLConfig
    # The prefix is not "encoder", because keys of transformers' own encoders begin with "encoder.".
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  (transformers' own form)
    # The loss is a mean over the batch, and the Trainer divides it by the accumulation steps.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.check_backbone(cast(Any, config.backbone_config).model_type)
        self.backbone: PreTrainedModel = AutoModel.from_config(
            config.backbone_config, trust_remote_code=False
        )
        self.hooks_are_called = self.continues = False
        self.discard_batch()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        # transformers (5.20 to 5.24) raises an error for encoders such as ResNet. 5.20 has no
        # `every_n_layers`.
        if supports_checkpointing(self.backbone):
            options = {} if every_n_layers == 1 else {"every_n_layers": every_n_layers}
            super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)
        else:
            checkpoint_segments(self.backbone, enable, gradient_checkpointing_func, every_n_layers)

    # What a method defines.

    def embed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors that the objective needs, each batch first (B, ...).

        Args:
            inputs: the arguments of `forward` that were given.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no embed")

    def objective(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the loss of embeddings. This function changes no state.

        Args:
            embeddings: as `embed` returns them; of all processes if `couples_samples`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no objective")

    def sample_masks(self, seeds: np.ndarray) -> dict[str, Tensor]:
        """Return masks, noise or parameters of patches: arguments of `forward` that `mask_inputs` names.

        The tensors are batch first and on the CPU. They depend only on the seeds and on values that
        `before_step` wrote. So they do not depend on the number of processes, and a resumed run samples the
        same masks. `hf_ssl.random.uniforms` makes random numbers. Methods use the numbers from position
        `hf_ssl.random.FIRST_METHOD_NUMBER` on.

        Args:
            seeds: (B,) uint64, one for each image and epoch.
        """
        return {}

    @property
    def parameter_rules(self) -> tuple[ParameterRule, ...]:
        """Return the rules for parameters that do not use the trainer's defaults."""
        return ()

    @property
    def patch_grid(self) -> list[int] | None:
        """Return side and distance of the patches whose mean feature is also evaluated (CPC), or None.

        Both are in pixels of the encoder's input. The config of the exported encoder stores them.
        """
        return None

    def update_memory(self, embeddings: dict[str, Tensor]) -> None:
        """Update queues, memory banks and centers: once for each batch in training, after the loss.

        Args:
            embeddings: those that `memory_inputs` names, of all processes, without gradient.
        """

    @torch.no_grad()
    def fill_memory(self, inputs: dict[str, Tensor]) -> None:
        """Store the embeddings of a batch in the memory before the first step (`needs_memory_warmup`)."""
        embeddings = self.embed(inputs)
        self.update_memory({name: gather(embeddings[name]) for name in self.memory_inputs})
        self.write_memory()

    def synchronize_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return inputs whose shapes agree on all processes; `forward` calls it in training."""
        return inputs

    def measurements(self, embeddings: dict[str, Tensor]) -> dict[str, float]:
        """Return numbers that the monitor records for this method, in addition to those for all methods.

        Args:
            embeddings: of the monitor's images, in eval mode, as `embed` returns them.
        """
        return {}

    def pictures(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return pictures by file name: (B, V, C, H, W) each, V tiles in a row, normalized like the views.

        The trainer calls it in eval mode and saves the pictures.

        Args:
            inputs: arguments of `forward`.
        """
        return {}

    # Hooks, called by SSLTrainer only.

    def before_epoch(self, progress: RunProgress) -> None:
        """Run before the first batch of an epoch, but not when a run resumes within the epoch."""

    def before_step(self, progress: RunProgress) -> None:
        """Run before an optimizer step: write scheduled values."""

    def after_backward(self, progress: RunProgress) -> None:
        """Run after the backward pass and gradient clipping, before the optimizer step."""

    def after_step(self, progress: RunProgress) -> None:
        """Run after each optimizer step that was not skipped: update teachers."""

    # The forward pass.

    def forward(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None = None,
        sample_index: Tensor | None = None,
        noise: Tensor | None = None,
        context_patches: Tensor | None = None,
        target_patches: Tensor | None = None,
        patch_parameters: Tensor | None = None,
        rotations: Tensor | None = None,
        draw_seeds: Tensor | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """Return the loss of a batch as a `SSLOutput`.

        `noise`, patches and seeds are for methods that name them in `mask_inputs`. A method that needs a new
        kind of input adds it here.

        Args:
            pixel_values: (B, V, C, H, W) global views, normalized.
            local_pixel_values: (B, L, C, h, w) local views, normalized.
            sample_index: (B,) int64 row numbers in the data set.
            noise: (B, N) numbers in [0, 1): of patches, row by row (MAE), or of sampled negatives (CPC).
            context_patches: (B, K) int64 indices, row by row, of the patches that the encoder receives.
            target_patches: (B, M, T) int64 indices of the patches of each target block.
            patch_parameters: (B, P, columns) parameters of patches (`hf_ssl.views.sample_patches`). They stay
                on the CPU, because only the CPU reads them.
            rotations: (B,) int64 quarter turns, also on the CPU.
            draw_seeds: (B,) int64, one seed for each image, for random negatives.
            return_dict: False returns a tuple. None uses the value of the config, also for the next two
                arguments.
            output_hidden_states, output_attentions: whether to return these outputs of the backbone's layers.
                With indices, only these hidden states are returned; the others are None.

        Raises:
            UserError: the method does not accept this number of views, noise or patches, or the backbone does
                not return the wanted outputs.
        """
        if pixel_values.ndim != 5:
            raise UserError(
                "pixel_values: expected views (batch, views, channels, height, width), got the shape "
                f"{tuple(pixel_values.shape)}; one view is pixel_values[:, None]"
            )
        masks = {
            "noise": noise, "context_patches": context_patches, "target_patches": target_patches,
            "patch_parameters": patch_parameters, "rotations": rotations, "draw_seeds": draw_seeds,
        }  # fmt: skip
        given = {
            "pixel_values": pixel_values,
            "local_pixel_values": local_pixel_values,
            "sample_index": sample_index,
            **masks,
        }
        inputs = {name: tensor for name, tensor in given.items() if tensor is not None}
        unknown = [name for name in masks if name in inputs and name not in self.mask_inputs]
        if unknown:
            raise UserError(
                f"{unknown[0]}: expected None, because {self.method_name()} has no such input, got a tensor"
            )
        local_views = 0 if local_pixel_values is None else local_pixel_values.shape[1]
        self.check_views(pixel_values.shape[1], local_views)
        if self.training:
            inputs = self.synchronize_inputs(inputs)
            self._warn_without_hooks()
        config: Any = self.config
        hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = config.output_attentions if output_attentions is None else output_attentions
        with RecordedOutputs(self.backbone, hidden_states, attentions) as recorded:
            output = self.loss_from_embeddings(self.embed(inputs))
        output.hidden_states, output.attentions = recorded.hidden_states, recorded.attentions
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _warn_without_hooks(self) -> None:
        """Log a warning, once, if a trainer that calls no hooks trains a method that needs them."""
        if self.hooks_are_called:
            return
        self.hooks_are_called = True
        hooks = ("before_epoch", "before_step", "after_backward", "after_step")
        own, base = type(self), SSLPreTrainedModel
        needed = [name for name in hooks if getattr(own, name) is not getattr(base, name)]
        if needed:
            logger.warning(
                "%s needs a trainer that calls %s; use hf_ssl.SSLTrainer, or call these methods in your loop "
                "and set model.hooks_are_called = True", own.__name__, " and ".join(needed),
            )  # fmt: skip

    def loss_from_embeddings(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """Return the loss of this process's embeddings; in training, then update the memory.

        This is separate from `embed` because embeddings can be made in chunks
        (`training.contrastive_chunk_size`), while the loss needs the whole batch.
        """
        if self.couples_samples:
            embeddings = {name: gather(tensor) for name, tensor in embeddings.items()}
        output = self.objective(embeddings)
        if self.training and self.memory_inputs:
            new = {name: embeddings[name].detach() for name in self.memory_inputs}
            if not self.couples_samples:
                new = {name: gather(tensor) for name, tensor in new.items()}
            self._memory_parts.append(new)
            if self.ends_batch:
                self._update_memory_once()
        return output

    def discard_batch(self) -> None:
        """Delete the stored embeddings of an unfinished optimizer step.

        The next forward pass counts as a whole batch.
        """
        self.ends_batch = True
        self._memory_parts: list[dict[str, Tensor]] = []
        for memory in self._deferred_memories():
            memory.discard()

    def _update_memory_once(self) -> None:
        """Update the memory with all micro-batches of an optimizer step, as with one batch."""
        parts, self._memory_parts = self._memory_parts, []
        self.update_memory({name: torch.cat([part[name] for part in parts]) for name in self.memory_inputs})

    def write_memory(self) -> None:
        """Write the values that `update_memory` kept in each `DeferredMemory`, after the backward pass."""
        for memory in self._deferred_memories():
            memory.write()

    def _deferred_memories(self) -> list[DeferredMemory]:
        # The encoders have many modules and no memory.
        parts = [part for part in self.children() if not isinstance(part, PreTrainedModel)]
        return [module for part in parts for module in part.modules() if isinstance(module, DeferredMemory)]

    def encode_views(self, images_BVCHW: Tensor) -> Tensor:
        """Return the backbone's features (B, V, D) of images (B, V, C, H, W)."""
        return self.apply_to_views(lambda images: encode(self.backbone, images), images_BVCHW)

    def project_views(self, *images_BVCHW: Tensor) -> Tensor:
        """Return the projections (B, V, P) of images (B, V, C, H, W), by the backbone and the `projector`.

        The backbone encodes the views of each size together, and the projector all views.
        """
        features = [self.encode_views(images) for images in images_BVCHW]
        return self.apply_to_views(self.get_submodule("projector"), torch.cat(features, dim=1))

    def unit_projections(self, inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
        """Return the unit projections of global and local views.

        The projector receives the features of all views in one batch (`project_views`). Its BatchNorm thus
        normalizes them together and updates its statistics once, as in facebookresearch/swav
        (src/resnet50.py) and facebookresearch/dino (`MultiCropWrapper`).

        Args:
            inputs: the inputs of `embed`.
            name: key of the projections (B, V, P) of global views in the result. If there are local views,
                their projections (B, L, P) have the key "local_" + name.
        """
        views = {name: "pixel_values", f"local_{name}": "local_pixel_values"}
        images = {key: inputs[of] for key, of in views.items() if of in inputs}
        projections = self.project_views(*images.values())
        sizes = [part.shape[1] for part in images.values()]
        return dict(zip(images, normalize(upcast(projections), dim=-1).split(sizes, dim=1), strict=True))

    @staticmethod
    def join_views(embeddings: dict[str, Tensor], name: str) -> Tensor:
        """Return the projections (V + L, B, P) of `unit_projections` as one tensor, global views first."""
        kinds = [embeddings[key] for key in (name, f"local_{name}") if key in embeddings]
        return torch.cat(kinds, dim=1).transpose(0, 1)

    def apply_to_views(self, function: Callable[[Tensor], Tensor], x_BV: Tensor) -> Tensor:
        """Apply a function of a batch (N, ...) to views (B, V, ...) and return its results (B, V, ...).

        The function receives all views in one batch. It receives each view separately if BatchNorm must not
        normalize them together (`joint_batch_norm`).
        """
        if self.joint_batch_norm or not self.training or not batch_norms(self):
            return function(x_BV.flatten(0, 1)).unflatten(0, x_BV.shape[:2])
        return torch.stack([function(view) for view in x_BV.unbind(1)], dim=1)

    # Weights: initialization, loading, teachers, export.

    def post_init(self) -> None:
        """Initialize all weights, then copy them to the teachers.

        If teachers were copied first, initialization would change them, and they would differ from their
        students.
        """
        super().post_init()
        initialize_as_timm(self.backbone)
        set_identity_pooler(self)
        self.copy_teachers()
        self.freeze()
        if self.published_feature != "auto":
            declare_feature(self.exported_encoder, self.published_feature)
        declare_patch_grid(cast(PreTrainedModel, self.get_submodule(self.exported)), self.patch_grid)

    @classmethod
    def from_backbone(cls, encoder: str | os.PathLike | PreTrainedModel, **settings: Any) -> Self:
        """Return a model with the weights of a trained encoder; the heads are random.

        Args:
            encoder: a vision encoder of transformers, or the folder or Hub id of one. The encoder of images
                in a ViTMAE, or in a model of images and texts, is used.
            settings: fields of the method's config, such as `views` and `temperature`. Size, mean and std of
                the views follow the image processor of the encoder unless `views` sets them.

        Raises:
            UserError: there is no encoder that can be loaded, or the method cannot train this type of it.
        """
        encoder = start_encoder(encoder)
        if encoder.name_or_path:
            commit = loaded_commit(encoder)
            known = view_settings(encoder.name_or_path, input_channels(encoder.config), commit)
            settings["views"] = known | (settings.get("views") or {})
        config = encoder.config
        if settings.get("views"):
            config = config_at_size(config, ViewPreset.from_dict(settings["views"]).final_size)
        model = cls(cast(Any, cls.config_class)(backbone_config=config, **settings))
        model.start_from(encoder)
        return model

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a model as in transformers, then freeze the parameters that are never trained.

        Loading makes every parameter trainable. A published encoder has no teacher; the student is then
        copied. The config of an encoder becomes the backbone's config.
        """
        if args and kwargs.get("config") is None:
            place = {key: kwargs[key] for key in _PLACE if key in kwargs}
            found, _ = PreTrainedConfig.get_config_dict(args[0], **place)
            if "model_type" in found and method_of(found["model_type"]) is None:
                backbone = AutoConfig.from_pretrained(args[0], trust_remote_code=False, **place)
                kwargs["config"] = cast(Any, cls.config_class)(backbone_config=backbone)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        if any(key.startswith("backbone.pooler.") for key in info["missing_keys"]):
            set_identity_pooler(model.backbone)
        for number in vars(model).values():
            if isinstance(number, HostNumber):
                number.invalidate()
        model.copy_teachers(missing=info["missing_keys"])
        model.freeze()
        return (model, info) if output_loading_info else model

    def initialize_weights(self) -> None:
        """Initialize as in transformers, then call `_init_weights` for the whole model.

        transformers omits a module if all its parameters belong to submodules.
        """
        super().initialize_weights()
        self._init_weights(self)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, PersistentBuffers | WeightNormLinear):
            module.initialize()
        if module is self:  # the checkpoint of an encoder holds no scheduled values
            for number in vars(self).values():
                if isinstance(number, HostNumber):
                    number.initialize(number.value)

    @torch.no_grad()
    def copy_teachers(self, missing: set[str] | None = None) -> None:
        """Copy the weights of each student to its teacher.

        Args:
            missing: keys that the checkpoint lacks. Only teachers with such keys are copied. None copies all.
        """
        for student, teacher in self.student_teacher:
            if missing is None or any(key.startswith(f"{teacher}.") for key in missing):
                self.get_submodule(teacher).load_state_dict(self.get_submodule(student).state_dict())

    @torch.no_grad()
    def start_from(self, encoder: PreTrainedModel) -> None:
        """Copy the weights of a trained encoder to the backbone and the teachers. Heads do not change.

        Position tables are interpolated if the backbone encodes images of another size (`state_at_size`).

        `SSLTrainer` then compares the k-NN accuracy with the initial one (`continues`).

        Raises:
            UserError: the encoder has other parameters or shapes than the backbone.
        """
        if isinstance(encoder, ParallelEncoders):
            raise UserError(
                f"backbone.init_from: expected one encoder for {self.method_name()}, got one for each color "
                "view, which only cmc can train"
            )
        wanted, given = self.backbone.state_dict(), state_at_size(encoder, self.backbone)
        other = sorted(wanted.keys() ^ given.keys())
        other += [name for name in wanted.keys() & given.keys() if wanted[name].shape != given[name].shape]
        if other:
            raise UserError(
                "backbone.init_from: expected an encoder with the parameters of the backbone, got a "
                f"difference in {other[0]}"
            )
        self.backbone.load_state_dict(given)
        set_identity_pooler(self.backbone)
        self.copy_teachers()
        self.continues = True

    def freeze(self) -> None:
        """Freeze the teachers and the parameters of the backbone that no loss depends on."""
        freeze_unused(self.backbone)
        for _, teacher in self.student_teacher:
            self.get_submodule(teacher).requires_grad_(False)

    @property
    def exported_encoder(self) -> PreTrainedModel:
        """Return the encoder that is published."""
        return cast(PreTrainedModel, self.get_submodule(self.exported))
