# SPDX-License-Identifier: Apache-2.0
"""Measures the time and memory of one image in a training step on a device."""

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.utils.checkpoint import checkpoint

from hf_ssl.data import LoadedBatch
from hf_ssl.modeling.backbones import encode_without_columns
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.eval_mode import unchanged_random_state
from hf_ssl.modeling.gather import from_first_process
from hf_ssl.precision import autocast, autocast_dtype
from hf_ssl.trainer.arguments import SSLTrainingArguments

MEASURED_IMAGES = 32
"""Largest number of images in a measured step."""
MEMORY_MARGIN = 1.25
"""Factor for memory that the measurement does not include: fragmentation, and batches loaded in advance."""
_CHECKPOINT_OPTIONS = {"use_reentrant", "context_fn"}
"""Arguments of `torch.utils.checkpoint.checkpoint` that encoders pass."""
_ENOUGH_SECONDS, _SLOW_SECONDS, _FEWEST_IMAGES = 0.3, 2.0, 8


@dataclass(frozen=True)
class StepCost:
    """The cost of one image for a model on a device.

    Attributes:
        step_seconds: time of the forward and backward pass of all views.
        feature_seconds: time of the forward pass of the exported encoder, on one view.
        load_seconds: time to read, decode and crop the image in this process.
        step_bytes: memory of the forward pass that the backward pass needs.
        fixed_bytes: memory of weights, gradients and optimizer state, for any number of images.
    """

    step_seconds: float
    feature_seconds: float
    load_seconds: float
    step_bytes: float
    fixed_bytes: float

    def needed_bytes(self, args: SSLTrainingArguments) -> float:
        """Return the bytes that a step of `args.batch_size` needs on this device."""
        images = args.per_device_train_batch_size
        if args.contrastive_chunk_size is not None:
            images = min(images, args.contrastive_chunk_size)
        return self.fixed_bytes + MEMORY_MARGIN * self.step_bytes * images

    def fitting_images(self, free_bytes: float) -> float:
        """Return the number of images whose step needs these bytes, the inverse of `needed_bytes`."""
        return (free_bytes - self.fixed_bytes) / (MEMORY_MARGIN * self.step_bytes)


def measure_step(
    model: SSLPreTrainedModel,
    batch: LoadedBatch,
    load_seconds: float,
    args: SSLTrainingArguments,
    free_bytes: float = math.inf,
) -> StepCost:
    """Measure forward and backward passes of a copy of the model. The model itself does not change.

    The first measurement has 2 images or `model.batch_multiple`, and each further one up to four times as
    many. The loop ends if a pass takes 2 s, or 0.3 s with at least 8 images. It also ends if a pass has the
    whole batch, or if more images would not fit into memory. The measured pass is `embed` and its gradient.
    It excludes the objective, which is cheap and depends on a state that training has not built yet. The copy
    uses activation checkpoints if training does.

    Args:
        model: the model of a method.
        batch: loaded images.
        load_seconds: seconds that the loading of one image took.
        args: training arguments with the chosen precision.
        free_bytes: free memory of the device.
    """
    device, kept = args.device, []
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if parameter.requires_grad
    )
    with unchanged_random_state(device):
        copied: SSLPreTrainedModel = copy.deepcopy(model)
        torch.nn.Module.to(copied, device).train()
        multiple = model.batch_multiple
        most = max(multiple, len(batch) // multiple * multiple)
        count = min(max(2, multiple), most)
        again = 0.0
        if checkpoints_activations(args):
            again = _use_checkpoints(copied, batch[:count].inputs(device, copied.sample_masks), args) / count
        while True:
            inputs = batch[:count].inputs(device, copied.sample_masks)
            # Methods may exchange rows in `embed`, so all processes need the same number of passes. The main
            # process determines this number.
            seconds, size = from_first_process(_pass(copied, inputs, args))
            size += again * count
            if seconds < _SLOW_SECONDS:  # the first pass also prepares kernels and memory
                seconds = from_first_process(min(seconds, *(_pass(copied, inputs, args)[0] for _ in "ab")))
            kept.append((count, size))
            larger = min(4 * count, most)
            # `fixed_bytes` is not used here: it contains the optimizer state, which a measured pass does not
            # have.
            too_large = weights + trained + MEMORY_MARGIN * size * larger / count > free_bytes
            slow = seconds >= _SLOW_SECONDS or (seconds >= _ENOUGH_SECONDS and count >= _FEWEST_IMAGES)
            if slow or count == most or too_large:
                break
            count = larger
        features = _feature_seconds(copied, inputs, args)
    return StepCost(
        step_seconds=seconds / count,
        feature_seconds=features / count,
        load_seconds=load_seconds,
        step_bytes=_slope(kept),
        fixed_bytes=weights + 3 * trained,
    )


def checkpoints_activations(args: SSLTrainingArguments) -> bool:
    """Return whether training uses activation checkpoints. transformers renamed the argument in 5.24."""
    return bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", None))


def _use_checkpoints(model: SSLPreTrainedModel, inputs: dict[str, Any], args: SSLTrainingArguments) -> float:
    """Make the model use activation checkpoints, and return the bytes that `_pass` then does not count.

    The backward pass recomputes one segment after the other. Outside of CUDA, `_pass` counts only tensors
    that the forward pass saves. So this function counts what the largest segment saves without checkpoints.
    """
    given = args.gradient_checkpointing_kwargs or getattr(args, "activation_checkpointing_kwargs", None)
    options = {"use_reentrant": False, **cast(dict[str, Any], given or {})}
    options.pop("offload", None)
    every = options.pop("every_n_layers", 1)
    storages, sizes = dict[int, int](), [0]

    def count(function: Callable[..., Any], *values: Any, **named: Any) -> Any:
        before = sum(storages.values())
        result = function(*values, **{key: named[key] for key in named.keys() - _CHECKPOINT_OPTIONS})
        sizes.append(sum(storages.values()) - before)
        return result

    if args.device.type != "cuda":
        model._set_gradient_checkpointing(True, count, every)
        with _saved_storages(storages), autocast(args.device, autocast_dtype(args.precision)):
            model.embed(inputs)
    model._set_gradient_checkpointing(True, partial(checkpoint, **options), every)
    return float(max(sizes))


def _saved_storages(storages: dict[int, int]) -> AbstractContextManager[Any]:
    """Return a context that adds the bytes of saved tensors to `storages`, by address."""

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def _pass(
    model: SSLPreTrainedModel, inputs: dict[str, Any], args: SSLTrainingArguments
) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and the bytes that it needs.

    On CUDA, these are the bytes at the peak. Elsewhere, they are the tensors saved for the backward pass.
    """
    on_cuda, storages, dtype = args.device.type == "cuda", dict[int, int](), autocast_dtype(args.precision)
    clock, before = _clock(args.device), 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
        before = torch.cuda.memory_allocated(args.device)
    start = clock()
    with _saved_storages(storages), autocast(args.device, dtype):
        made = model.embed(inputs)
    loss = sum(tensor.float().mean() for tensor in made.values() if tensor.requires_grad)
    if isinstance(loss, torch.Tensor):
        loss.backward()
        loss.item()  # waits for the device
    seconds = clock() - start
    model.zero_grad()
    if on_cuda:
        return seconds, float(torch.cuda.max_memory_allocated(args.device) - before)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return seconds, float(sum(size for place, size in storages.items() if place not in parameters))


def _feature_seconds(model: SSLPreTrainedModel, inputs: dict[str, Any], args: SSLTrainingArguments) -> float:
    """Return the seconds of the exported encoder's forward pass on one view of each image."""
    dtype, images, clock = autocast_dtype(args.precision), inputs["pixel_values"][:, 0], _clock(args.device)
    model.eval()
    seconds = []
    for _ in range(2):
        start = clock()
        with torch.no_grad(), autocast(args.device, dtype):
            encode_without_columns(model.exported_encoder, images).float().sum().item()
        seconds.append(clock() - start)
    return min(seconds)


def _clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds.

    On a CPU, the clock counts the CPU time of this process, divided by the number of torch's threads. So
    other programs that run during the measurement do not change the result.
    """
    if device.type != "cpu":
        return time.perf_counter
    return lambda: time.process_time() / torch.get_num_threads()


def _slope(measured: list[tuple[int, float]]) -> float:
    """Return the bytes of each additional image, from pairs (number of images, bytes)."""
    (first, low), (last, high) = measured[0], measured[-1]
    return high / last if first == last else max(0.0, (high - low) / (last - first))
