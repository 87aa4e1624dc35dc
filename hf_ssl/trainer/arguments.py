# SPDX-License-Identifier: Apache-2.0
"""Training arguments: the arguments of transformers with other defaults, and further arguments of hf_ssl."""

import json
import math
import warnings
from contextlib import suppress
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_ssl.errors import UserError, check_name, check_values, one_line
from hf_ssl.evaluation.config import MAIN_KNN
from hf_ssl.modeling.lars import VARIANTS, LARSConfig
from hf_ssl.names import renamed_arguments, renamed_keys, warn_deprecated
from hf_ssl.precision import AUTO, PRECISIONS, check_launched_precision
from hf_ssl.sections import as_setting, to_dataclass
from hf_ssl.trainer.launching import check_launcher
from hf_ssl.trainer.transformers_arguments import (
    DEFAULTS,
    REJECTED,
    check_accelerator_config,
    check_arguments,
    check_best_model,
    given_values,
    warn_once,
)

# torch 2.14 warns in every process, because accelerate (1.12 to 1.15) passes this deprecated argument.
warnings.filterwarnings("ignore", message=".*broadcast_buffers. is deprecated")

OPTIMIZERS = ("sgd", "adamw", "lars")
DEFAULT_BATCH_SIZE = 256
RULES = ("none", "linear", "square_root")
COSINE_VARIANTS = ("swav", "ijepa")
if TYPE_CHECKING:
    WorkerCount = int | str
else:
    WorkerCount = str  # HfArgumentParser (transformers 5.20 to 5.24) reads `int | str` as int: no `auto`
_MONITOR_STEPS = 200
_FIXED = (
    *REJECTED, "batch_size", "per_device_train_batch_size", "base_learning_rate", "learning_rate_rule",
    "optim", "optim_args", "optimizer", "precision", "bf16", "fp16", "monitor_steps", "lr_scheduler_type",
    "minimum_learning_rate_ratio", "lars", "gradient_accumulation_steps", "metric_for_best_model",
)  # fmt: skip


@renamed_arguments(**renamed_keys("training"))
@dataclass
class SSLTrainingArguments(TrainingArguments):
    """Arguments for pretraining. All fields of `transformers.TrainingArguments` also work.

    Attributes:
        batch_size: images in one optimizer step, over all processes and accumulation steps. The default is
            `per_device_train_batch_size` x processes x `gradient_accumulation_steps` if that argument is
            given, else 256.
        precision: `auto`, `float32`, `bfloat16` or `float16`. `auto` selects the fastest one on the device of
            the run (`hf_ssl.precision`). `bf16=True` and `fp16=True` have precedence. `bf16=False` and
            `fp16=False` exclude that precision from the choice.
        dataloader_num_workers: a number, or `auto`, which selects a number by cores, device and image size
            (`hf_ssl.trainer.machine_settings`).
        optimizer: `sgd`, `adamw`, `lars`, or the name of another optimizer of transformers, e.g. `adafactor`.
            `optim` has the same meaning. `optim_args` gives arguments to the optimizers of transformers.
        base_learning_rate: if set, `learning_rate_rule` computes `learning_rate` from this value.
        learning_rate_rule: `none`; `linear`: base x batch_size / 256; `square_root`: base x
            sqrt(batch_size) (SimCLR).
        momentum: momentum of SGD and LARS.
        nesterov: deprecated, without a replacement. True selects Nesterov momentum for SGD.
        weight_decay_end: if set, weight decay changes from `weight_decay` to this value along half a cosine
            over the whole run (DINO, I-JEPA). The weight decay of parameters without weight decay stays 0.
        decay_all_parameters: whether weight decay also applies to biases, normalization layers and tokens.
            Authors who use plain SGD do this.
        clip_each_tensor: the largest norm of the gradient of each parameter (DINO); 0 disables clipping.
        lars: settings of LARS, as a `hf_ssl.modeling.lars.LARSConfig` or a dict of its fields.
        warmup_epochs: epochs of linear warmup of the learning rate. It takes precedence over `warmup_steps`.
        minimum_learning_rate_ratio: final value of the cosine schedule, as a fraction of the learning rate.
        cosine_variant: authors whose form of `lr_scheduler_type=cosine_warmup_with_min_lr` is used: `swav` or
            `ijepa` (`hf_ssl.trainer.schedules.warmup_and_cosine`). None uses the form of transformers. Its
            cosine is one step ahead of SwAV's. Its warmup starts one step later than I-JEPA's.
        predictor_learning_rate_factor: factor on the learning rate of the predictor of a method (BYOL,
            SimSiam, MoCo v3, I-JEPA). In arXiv:2102.06810, it is the ratio alpha_p of the learning rates.
        learning_rate_drops: epochs after which the learning rate is multiplied by 0.1, in addition to the
            schedule `lr_scheduler_type` (MoCo v1: [120, 160] with `constant`).
        contrastive_chunk_size: images that a process encodes at once, for batches that do not fit into
            memory. Without BatchNorm, loss and gradient equal those of the whole batch up to rounding.
            BatchNorm uses the statistics of a chunk (`hf_ssl.trainer.gradient_cache`). None encodes all
            images at once.
        sync_batch_norm: whether BatchNorm statistics include the images of all processes.
        channels_last: whether convolutions use this memory layout, which is 1.3 times faster on CPUs.
        monitor_steps: optimizer steps between two measurements of the monitor; 0 disables it. `eval_steps`
            has the same meaning and can also be a fraction of the run. `eval_strategy=epoch` measures after
            each epoch instead, and `eval_strategy=no` not at all.
        monitor_bank_images, monitor_query_images: numbers of labeled images of the k-NN classifier.
        monitor_neighbors: k of the k-NN classifier.
        monitor_projector: whether the monitor also measures the k-NN accuracy of the projector's output.
        layer_decay: the learning rate of each block of the backbone is this fraction of the rate of the next
            block (layer-wise decay of BEiT). It is meant for trained backbones. None: equal rates.
        head_warmup_epochs: epochs in which the backbone is frozen and only the heads are trained. The
            BatchNorm statistics of the backbone still change.
        on_worse: what happens if the features of a run from a trained backbone become worse than at its
            start: `warn` or `stop`.
        on_collapse: what happens if the monitor finds that the embeddings have collapsed: `warn` or `stop`.
        online_probe: whether to train a linear classifier beside the encoder, on features of labeled training
            images (`hf_ssl.trainer.online_probe`). It does not change the encoder. Its accuracy is logged as
            `online_probe_train` on training views, and as `eval_online_probe` on images of the monitor.
        online_probe_learning_rate: initial learning rate of this classifier.
    """

    # These defaults differ from those of transformers. The comments give the reasons.
    remove_unused_columns: bool = False  # True removes the image column
    # True logs an average instead of a NaN loss, and waits for the device in each step.
    logging_nan_inf_filter: bool = False
    max_grad_norm: float = 0.0  # the authors of contrastive methods do not clip gradients
    weight_decay: float = 1e-4
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "cosine_with_min_lr"
    dataloader_num_workers: WorkerCount = AUTO  # type: ignore[assignment]
    dataloader_drop_last: bool = True
    per_device_eval_batch_size: int = 256  # images that the monitor encodes at once
    eval_strategy: IntervalStrategy | str = "steps"
    eval_on_start: bool = True  # the first measurement shows how much training improves
    bf16: bool | None = None  # type: ignore[assignment]  # None: `precision` sets it
    fp16: bool | None = None  # type: ignore[assignment]
    ddp_find_unused_parameters: bool | None = False
    # Buffers need no broadcast: they come from gathered values, or differ between processes on purpose.
    ddp_broadcast_buffers: bool | None = False
    logging_steps: float = 20
    logging_first_step: bool = True  # shows early that a slow run makes progress
    save_steps: float = 2 * _MONITOR_STEPS  # a multiple, as `load_best_model_at_end` requires
    save_total_limit: int | None = 2
    seed: int = 0

    batch_size: int = 0  # 0: the product with `per_device_train_batch_size`, or 256
    per_device_train_batch_size: int = 0  # 0: `batch_size` determines it
    precision: str = AUTO
    optimizer: str = "adamw"
    base_learning_rate: float | None = None
    learning_rate_rule: str = "none"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay_end: float | None = None
    decay_all_parameters: bool = False
    clip_each_tensor: float = 0.0
    lars: LARSConfig = field(default_factory=LARSConfig)
    warmup_epochs: float = 0.0
    minimum_learning_rate_ratio: float = 0.0
    cosine_variant: str | None = None
    predictor_learning_rate_factor: float = 1.0
    learning_rate_drops: list[float] = field(default_factory=list)
    contrastive_chunk_size: int | None = None
    sync_batch_norm: bool = True
    channels_last: bool = True
    monitor_steps: int = _MONITOR_STEPS
    monitor_bank_images: int = 2000
    monitor_query_images: int = 1000
    monitor_neighbors: int = MAIN_KNN[0]
    monitor_projector: bool = False
    layer_decay: float | None = None
    head_warmup_epochs: float = 0.0
    on_worse: str = "warn"
    on_collapse: str = "warn"
    online_probe: bool = False
    online_probe_learning_rate: float = 0.1  # solo-learn, scripts/pretrain/cifar/byol.yaml: classifier_lr

    @classmethod
    def from_arguments(cls, args: TrainingArguments | None) -> "SSLTrainingArguments":
        """Return arguments of transformers as arguments of hf_ssl.

        Args:
            args: values that differ from the defaults of transformers are kept. The others get the defaults
                of hf_ssl. None gives the defaults, with the output folder of transformers.
        """
        if args is None:
            return cls(output_dir="trainer_output")
        if isinstance(args, cls):
            args.check_changes()
            return args
        if not isinstance(args, TrainingArguments):
            raise UserError(
                f"args: expected SSLTrainingArguments, got {type(args).__name__}; use "
                "SSLTrainingArguments(output_dir=...)"
            )
        return cls(**{"output_dir": args.output_dir, **given_values(args)})

    def __post_init__(self) -> None:
        self._read_lars()
        self.dataloader_num_workers = workers = as_setting(self.dataloader_num_workers, int)
        check_arguments(self)
        check_launcher(self)
        if self.nesterov:
            warn_deprecated("training.nesterov is deprecated; leave it out")
        self._read_optimizer()
        self._read_precision()
        self._check_values()
        self._read_minimum_learning_rate()
        self._read_monitor_steps()
        check_best_model(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise transformers raises an error for bf16 on a CPU
        per_device = self.per_device_train_batch_size
        self.per_device_train_batch_size = per_device or 1  # transformers needs a number
        if workers == AUTO:  # transformers needs a number, and at least 1 with a prefetch factor
            self.dataloader_num_workers = 0 if self.dataloader_prefetch_factor is None else 1
        do_eval = self.do_eval
        try:
            super().__post_init__()
            check_accelerator_config(self)
        except (TypeError, ValueError, OSError, NotImplementedError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"training: {one_line(error)}") from error
        self.do_eval = do_eval  # transformers sets it, and a copy of the arguments would then warn about it
        self.dataloader_num_workers = workers
        if self.n_gpu > 1:
            raise UserError(
                f"training: expected one GPU per process, got {self.n_gpu}; start one process per GPU with "
                f"torchrun --nproc_per_node {self.n_gpu} training/pretrain.py ..., or set "
                "CUDA_VISIBLE_DEVICES=0"
            )
        micro_batches = self.micro_batches
        if not self.batch_size:
            self.batch_size = per_device * micro_batches if per_device else DEFAULT_BATCH_SIZE
        self._update_learning_rate()
        self.per_device_train_batch_size = self._batch_per_process()
        if per_device not in (0, self.per_device_train_batch_size):
            raise UserError(
                "training.batch_size, per_device_train_batch_size: expected one of them, or batch_size = "
                f"per_device_train_batch_size x {micro_batches}, got {self.batch_size} and {per_device}"
            )
        self._remember()

    def _remember(self) -> None:
        """Store the arguments that must not change later.

        Other values were computed from them, or only their default is accepted.
        """
        self._made_with = copy({item.name: getattr(self, item.name) for item in fields(self)})

    def check_changes(self) -> None:
        """Check the arguments that changed after they were made.

        Raises:
            UserError: an argument changed that determines other arguments, or a new value is invalid.
        """
        self.eval_delay = self.eval_delay or 0  # `set_evaluate` of transformers 5.24 writes None
        changed = [name for name, value in self._made_with.items() if getattr(self, name) != value]
        for name in changed:
            if name in _FIXED:
                raise UserError(
                    f"args.{name}: expected no change after the arguments were made, got "
                    f"{getattr(self, name)}; use SSLTrainingArguments({name}=...)"
                )
        if changed:
            check_arguments(self, changed)
            self._check_values()

    def _check_values(self) -> None:
        rule, lars, steps = self.learning_rate_rule, self.lars, self.eval_steps
        cosine, schedule = self.cosine_variant, SchedulerType(self.lr_scheduler_type)
        whole = isinstance(workers := self.dataloader_num_workers, int) and workers >= 0
        choices = {
            "precision": (AUTO, *PRECISIONS),
            "learning_rate_rule": RULES,
            "on_collapse": ("warn", "stop"),
            "on_worse": ("warn", "stop"),
        }
        check_values(
            "training",
            *((key, getattr(self, key), getattr(self, key) in options, f"one of {', '.join(options)}")
              for key, options in choices.items()),
            ("lars.variant", lars.variant, lars.variant in VARIANTS, f"one of {', '.join(VARIANTS)}"),
            ("lars.trust_coefficient", trust := lars.trust_coefficient, 0 < trust < math.inf, "positive"),
            ("cosine_variant", cosine, cosine in (None, *COSINE_VARIANTS), "swav, ijepa or no value"),
            ("cosine_variant", cosine, cosine is None or schedule == SchedulerType.COSINE_WARMUP_WITH_MIN_LR,
             f"no value with {schedule.value}", "lr_scheduler_type=cosine_warmup_with_min_lr"),
            ("learning_rate_rule", rule, rule == "none" or self.base_learning_rate is not None,
             "none without base_learning_rate", "learning_rate for the rate itself"),
            ("eval_steps", steps, steps is None or steps > 0, "a positive number", "monitor_steps=0"),
            ("dataloader_num_workers", workers, workers == AUTO or whole, "auto or a whole number from 0"),
            ("clip_each_tensor", self.clip_each_tensor, not (self.clip_each_tensor and self.fp16),
             "0 with fp16, which scales gradients"),
        )  # fmt: skip

    def _read_optimizer(self) -> None:
        """Make `optimizer` and `optim` consistent."""
        unset, given = DEFAULTS["optim"], OptimizerNames(self.optim).value
        name = "adamw" if given in ("adamw_torch", "adamw_torch_fused") else given
        if given != unset and self.optimizer not in ("adamw", name):
            raise UserError(
                f"training.optimizer, training.optim: expected one of them, got {self.optimizer} and {given}"
            )
        self.optimizer = name if given != unset else self.optimizer
        known = [*OPTIMIZERS, *(item.value for item in OptimizerNames)]
        expected = f"{', '.join(OPTIMIZERS)} or an optimizer of transformers"
        check_name("training.optimizer", self.optimizer, known, expected)
        if self.optimizer not in OPTIMIZERS:
            self.optim = self.optimizer
        elif self.optim_args is not None:
            raise UserError(
                f"training.optim_args: expected no value for the optimizer {self.optimizer}, got "
                f"{self.optim_args}; set training.momentum, training.lars or training.adam_beta1"
            )

    def _read_minimum_learning_rate(self) -> None:
        """Make `lr_scheduler_kwargs` and `minimum_learning_rate_ratio` consistent."""
        ratio, schedule = self.minimum_learning_rate_ratio, SchedulerType(self.lr_scheduler_type)
        kwargs: Any = {"min_lr_rate": ratio}
        if schedule == SchedulerType.COSINE_WITH_MIN_LR and self.lr_scheduler_kwargs in (None, kwargs):
            self.lr_scheduler_kwargs = kwargs
        elif ratio:
            raise UserError(
                "training.minimum_learning_rate_ratio: expected 0 with lr_scheduler_kwargs or with another "
                f"schedule than cosine_with_min_lr, got {ratio} with {schedule.value}; use one of them"
            )

    def _read_monitor_steps(self) -> None:
        """Make `monitor_steps`, `eval_steps`, `eval_strategy` and `eval_on_start` consistent."""
        strategy, given = IntervalStrategy(self.eval_strategy), self.eval_steps
        if strategy != IntervalStrategy.STEPS:
            unset = {"eval_steps": (None,), "monitor_steps": (_MONITOR_STEPS, 0)}
            for name in (name for name, values in unset.items() if getattr(self, name) not in values):
                warn_once(f"training.{name} has no effect with eval_strategy={strategy.value}")
        elif given is not None:
            if self.monitor_steps not in (_MONITOR_STEPS, given):
                raise UserError(
                    "training.monitor_steps, training.eval_steps: expected one of them, got "
                    f"{self.monitor_steps} and {given}"
                )
        elif self.monitor_steps:
            self.eval_steps = self.monitor_steps
        else:
            self.eval_strategy = IntervalStrategy.NO
        self.eval_on_start = self.eval_on_start and self.measures

    @property
    def measures(self) -> bool:
        """Whether the monitor measures the model during training."""
        return self.eval_strategy != IntervalStrategy.NO

    def _read_lars(self) -> None:
        """Make `lars` a `LARSConfig`."""
        given: Any = self.lars
        if isinstance(given, LARSConfig) and isinstance(given.trust_coefficient, str):
            given = given.trust_coefficient  # HfArgumentParser writes the text of --lars into the first field
        if isinstance(given, LARSConfig):
            given = asdict(given)
        if isinstance(given, str):
            with suppress(ValueError):
                given = json.loads(given)
        check_values("training", ("lars", given, isinstance(given, dict), "a LARSConfig, a dict or JSON"))
        self.lars = to_dataclass(LARSConfig, given, "training.lars")

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain data for JSON."""
        return {**super().to_dict(), "lars": asdict(self.lars)}

    def _read_precision(self) -> None:
        """Make `precision`, `bf16` and `fp16` consistent."""
        if self.bf16 and self.fp16:
            raise UserError("training.bf16, training.fp16: expected one true value, got two; remove one")
        if self.bf16 or self.fp16:
            self.precision = "bfloat16" if self.bf16 else "float16"
        given_by_name = {"bfloat16": self.bf16, "float16": self.fp16}
        self.excluded_precisions = {
            name
            for name, given in given_by_name.items()
            if given is False or (name == "float16" and self.clip_each_tensor)
        }
        check_launched_precision(self.precision, self.excluded_precisions)
        # A copy of the arguments (`dataclasses.replace`) would read False as an excluded precision.
        self.bf16, self.fp16 = (self.precision == name or given for name, given in given_by_name.items())

    @property
    def hides_progress(self) -> bool:
        """Whether this process shows no progress.

        This is the case with `disable_tqdm`, and in all processes but the first one of a machine.
        """
        return bool(self.disable_tqdm) or self.local_process_index > 0

    def use_precision(self, precision: str) -> None:
        """Set the precision that replaces `auto`.

        Args:
            precision: `float32`, `bfloat16` or `float16`.

        Raises:
            UserError: `accelerate launch` was started with another precision.
        """
        check_launched_precision(precision)
        self.precision = precision
        self.bf16, self.fp16 = precision == "bfloat16", precision == "float16"
        # transformers (5.20 to 5.24) sets this only in __post_init__
        self.mixed_precision = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]
        self._remember()

    @property
    def micro_batches(self) -> int:
        """Return the number of batches of an optimizer step, over all processes and accumulation steps."""
        return self.world_size * self.gradient_accumulation_steps

    def use_batch_size(self, batch_size: int) -> None:
        """Set another batch size, and the learning rate by `learning_rate_rule`.

        Args:
            batch_size: images in one optimizer step, over all processes and accumulation steps.
        """
        self.batch_size = batch_size
        self._update_learning_rate()
        self.per_device_train_batch_size = self._batch_per_process()
        self._remember()

    def _update_learning_rate(self) -> None:
        if self.base_learning_rate is not None:
            self.learning_rate = self.base_learning_rate * self._learning_rate_factor()

    def _learning_rate_factor(self) -> float:
        if self.learning_rate_rule == "linear":
            return self.batch_size / 256
        return math.sqrt(self.batch_size) if self.learning_rate_rule == "square_root" else 1.0

    def _batch_per_process(self) -> int:
        micro_batches = self.micro_batches
        if self.batch_size < micro_batches or self.batch_size % micro_batches:
            raise UserError(
                "training.batch_size: expected a multiple of processes x gradient_accumulation_steps = "
                f"{self.world_size} x {self.gradient_accumulation_steps}, got {self.batch_size}"
            )
        return self.batch_size // micro_batches
