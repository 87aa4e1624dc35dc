# SPDX-License-Identifier: Apache-2.0
"""Training arguments: transformers' own with the defaults that self-supervised learning needs, and ours
beside them.
"""

import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_ssl.errors import UserError
from hf_ssl.precision import DTYPES
from hf_ssl.trainer.lars import VARIANTS

AUTO = "auto"

OPTIMIZERS = ("sgd", "adamw", "lars")
RULES = ("none", "linear", "square_root")


@dataclass
class SSLTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` for pretraining; all of its fields work, these are new or have
    another default.

    Attributes:
        batch_size: images in one optimizer step, over all processes and accumulation steps.
        precision: `auto`, `float32`, `bfloat16` or `float16`. `auto` selects the fastest one on the device of
            the run (`hf_ssl.precision`). `bf16=True` and `fp16=True` have precedence. `bf16=False` and
            `fp16=False` exclude that precision from the choice.
        dataloader_num_workers: a number, or `auto`, which selects a number by cores, device and image size
            (`hf_ssl.trainer.fitting`).
        optimizer: `sgd`, `adamw` or `lars`; transformers' own `optim` is not used.
        base_learning_rate: if set, `learning_rate` follows from it by `learning_rate_rule`.
        learning_rate_rule: `none`; `linear`: base x batch_size / 256; `square_root`: base x
            sqrt(batch_size) (SimCLR).
        momentum, nesterov: of SGD and LARS.
        weight_decay_end: if set, weight decay moves from `weight_decay` to this along half a cosine over the
            whole run (DINO, I-JEPA). Parameters without weight decay keep none.
        decay_all_parameters: weight decay on biases, norms and tokens too, as authors who use plain SGD do.
        clip_each_tensor: the largest norm of each parameter's gradient by itself (DINO); 0 clips nothing.
        lars_trust_coefficient, lars_variant, lars_clip: see `hf_ssl.trainer.lars.LARS`.
        lars_adapt_all_parameters: LARS adapts the rate of biases, norms and tokens too, as SwAV's authors do.
        warmup_epochs: passes over the data with a linear warm-up; takes precedence over `warmup_steps`.
        minimum_learning_rate_ratio: final value of the cosine, as a share of the learning rate.
        learning_rate_drops: passes over the data after each of which the learning rate is a tenth of what
            `lr_scheduler_type` says (MoCo v1: [120, 160] with `constant`).
        contrastive_chunk_size: images of a process that are encoded at once, for batches that do not fit into
            memory; loss and gradient are those of the whole batch, BatchNorm statistics those of a chunk
            (`hf_ssl.trainer.gradient_cache`). None encodes them all at once.
        sync_batch_norm: with several processes, BatchNorm statistics span all of them.
        channels_last: memory layout of convolutions, 1.3 times faster on CPUs.
        monitor_steps: optimizer steps between two measurements of the monitor; 0 switches it off.
        monitor_bank_images, monitor_query_images: labelled images of its k-NN classifier.
        monitor_neighbours: k of that classifier.
        layer_decay: if set, each block of the backbone learns at this share of the rate of the block after it
            (BEiT's layer-wise decay); for backbones that are trained already.
        head_warmup_epochs: passes over the data in which the backbone stays as it is and heads alone learn;
            its BatchNorm statistics move all the same.
        on_worse: `warn` or `stop` when a run that began with a trained backbone has made it worse.
        on_collapse: `warn` or `stop` when the monitor finds that embeddings have collapsed.
    """

    # What transformers has otherwise, and why it would be wrong here.
    remove_unused_columns: bool = False  # would drop the image column
    logging_nan_inf_filter: bool = (
        False  # would log a NaN loss as an average, and waits for the device in each step
    )
    max_grad_norm: float = 0.0  # no author of a contrastive method clips
    weight_decay: float = 1e-4
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    dataloader_num_workers: int | str = AUTO  # type: ignore[assignment]
    bf16: bool | None = None  # type: ignore[assignment]  # None: `precision` determines it
    fp16: bool | None = None  # type: ignore[assignment]
    ddp_find_unused_parameters: bool | None = False
    ddp_broadcast_buffers: bool | None = False  # they come from gathered values, or from a process's own
    logging_steps: float = 20
    logging_first_step: bool = True  # a slow first step is followed by a sign of life
    save_steps: float = 500
    save_total_limit: int | None = 2
    seed: int = 0

    batch_size: int = 256
    precision: str = AUTO
    optimizer: str = "adamw"
    base_learning_rate: float | None = None
    learning_rate_rule: str = "none"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay_end: float | None = None
    decay_all_parameters: bool = False
    clip_each_tensor: float = 0.0
    lars_trust_coefficient: float = 0.001
    lars_variant: str = "barlowtwins"
    lars_clip: bool = False
    lars_adapt_all_parameters: bool = False
    warmup_epochs: float = 0.0
    minimum_learning_rate_ratio: float = 0.0
    learning_rate_drops: list[float] = field(default_factory=list)
    contrastive_chunk_size: int | None = None
    sync_batch_norm: bool = True
    channels_last: bool = True
    monitor_steps: int = 200
    monitor_bank_images: int = 2000
    monitor_query_images: int = 1000
    monitor_neighbours: int = 20
    layer_decay: float | None = None
    head_warmup_epochs: float = 0.0
    on_worse: str = "warn"
    on_collapse: str = "warn"

    def __post_init__(self) -> None:
        _check_choice("precision", self.precision, (AUTO, *DTYPES))
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("learning_rate_rule", self.learning_rate_rule, RULES)
        _check_choice("lars_variant", self.lars_variant, VARIANTS)
        _check_choice("on_collapse", self.on_collapse, ("warn", "stop"))
        _check_choice("on_worse", self.on_worse, ("warn", "stop"))
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise UserError(f"training.layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.contrastive_chunk_size is not None and self.contrastive_chunk_size < 1:
            raise UserError(
                f"training.contrastive_chunk_size must be at least 1 image, got {self.contrastive_chunk_size}"
            )
        if self.learning_rate_drops and min(self.learning_rate_drops) <= 0:
            raise UserError(
                f"training.learning_rate_drops must be positive epochs, got {self.learning_rate_drops}"
            )
        workers = self.dataloader_num_workers
        if workers != AUTO and (not isinstance(workers, int) or workers < 0):
            raise UserError(
                f"training.dataloader_num_workers: expected auto or an integer from 0 on, got {workers!r}"
            )
        self._read_precision()
        if self.clip_each_tensor < 0 or (self.clip_each_tensor and self.fp16):
            raise UserError(
                "training.clip_each_tensor must be at least 0, and 0 with fp16, which scales gradients, got "
                f"{self.clip_each_tensor}"
            )
        if self.weight_decay_end is not None and self.weight_decay_end < 0:
            raise UserError(f"training.weight_decay_end must be at least 0, got {self.weight_decay_end}")
        self._follow_batch_size()
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": self.minimum_learning_rate_ratio}
        if self.monitor_steps:
            self.eval_strategy, self.eval_steps, self.eval_on_start = "steps", self.monitor_steps, True
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers must be told, or it refuses bf16 on a CPU
        if workers == AUTO:  # transformers expects a number, and more than 0 if there is a prefetch factor
            self.dataloader_num_workers = 0 if self.dataloader_prefetch_factor is None else 1
        super().__post_init__()
        self.dataloader_num_workers = workers
        if self.n_gpu > 1:
            raise UserError(
                f"{self.n_gpu} GPUs are visible to one process: start one for each with torchrun "
                f"--nproc_per_node {self.n_gpu} training/pretrain.py ..., or choose one with "
                "CUDA_VISIBLE_DEVICES=0"
            )
        self.per_device_train_batch_size = self._batch_per_process()

    def _read_precision(self) -> None:
        """Make `precision`, `bf16` and `fp16` consistent."""
        if self.bf16 and self.fp16:
            raise UserError(
                "training.bf16, training.fp16: expected at most one true value, got two; remove one"
            )
        if self.bf16 or self.fp16:
            self.precision = "bfloat16" if self.bf16 else "float16"
        self.excluded_precisions = {
            name
            for name, given in (("bfloat16", self.bf16), ("float16", self.fp16))
            if given is False or (name == "float16" and self.clip_each_tensor)
        }
        self.bf16, self.fp16 = self.precision == "bfloat16", self.precision == "float16"

    @property
    def hides_progress(self) -> bool:
        """Whether this process shows no progress: `disable_tqdm`, or not the first process of its machine."""
        return bool(self.disable_tqdm) or self.local_process_index > 0

    def use_precision(self, precision: str) -> None:
        """Set the precision that replaces `auto`.

        Args:
            precision: `float32`, `bfloat16` or `float16`.
        """
        self.precision = precision
        self.bf16, self.fp16 = precision == "bfloat16", precision == "float16"
        # transformers (5.20 to 5.24) sets this only in __post_init__
        self.mixed_precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]

    def use_batch_size(self, batch_size: int) -> None:
        """Set another batch size; the learning rate follows `learning_rate_rule`.

        Args:
            batch_size: images in one optimizer step, over all processes and accumulation steps.
        """
        self.batch_size = batch_size
        self._follow_batch_size()
        self.per_device_train_batch_size = self._batch_per_process()

    def _follow_batch_size(self) -> None:
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self._learning_rate_factor()

    def _learning_rate_factor(self) -> float:
        if self.learning_rate_rule == "linear":
            return self.batch_size / 256
        return math.sqrt(self.batch_size) if self.learning_rate_rule == "square_root" else 1.0

    def _batch_per_process(self) -> int:
        shares = self.world_size * self.gradient_accumulation_steps
        if self.batch_size < shares or self.batch_size % shares:
            raise UserError(
                "training.batch_size must be a multiple of processes x gradient_accumulation_steps = "
                f"{self.world_size} x {self.gradient_accumulation_steps}, got {self.batch_size}"
            )
        return self.batch_size // shares


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"training.{key} must be one of {', '.join(choices)}, got {value!r}")
