# SPDX-License-Identifier: Apache-2.0
"""Encoders under evaluation and their processors: loading, device, precision and inspection (layer 1).

Legend: B images, C channels, H height, W width, T tokens, D features.
"""

import sys
from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedModel

from hf_ssl.data.decode import as_pillow
from hf_ssl.errors import UserError, first_line
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.files import local_or_hub
from hf_ssl.modeling.configuration import size_arguments
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.further_features import FurtherFeatures
from hf_ssl.modeling.loading import load_weights, loaded_commit, loading_errors, normalization
from hf_ssl.modeling.pooling import Pooling, pooling_rule
from hf_ssl.precision import fastest_precision


def load_encoder(model: str, revision: str | None = None) -> tuple[PreTrainedModel, Any]:
    """Return an encoder in evaluation mode and its image processor.

    Args:
        model: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: the encoder does not exist or cannot be loaded.
    """
    options = {} if revision is None else {"revision": revision}
    encoder = load_weights(model, **options)
    with loading_errors(f"an encoder with its image processor, got {model!r}"):
        processor = AutoImageProcessor.from_pretrained(
            local_or_hub(model), trust_remote_code=False, revision=loaded_commit(encoder) or revision
        )
    return encoder.eval(), processor


def load_processor(processor: Any, encoder: Any) -> Any:
    """Return an image processor for a loaded encoder.

    Args:
        processor: an image processor, which is returned; its folder or Hub id; or None for the one beside the
            files of the encoder.
        encoder: the encoder.

    Raises:
        UserError: `processor` is something else, or cannot be found or loaded.
    """
    place = getattr(encoder, "name_or_path", "") if processor is None else processor
    if not place:
        raise UserError(
            f"processor: expected an image processor for a new {type(encoder).__name__}, got {processor!r}; "
            "use processor=trainer.processor, or the folder of the encoder as model"
        )
    if isinstance(place, str | PathLike):
        with loading_errors(f"an image processor, got {str(place)!r}", "processor"):
            revision = loaded_commit(encoder) if processor is None else None
            return AutoImageProcessor.from_pretrained(
                local_or_hub(str(place)), revision=revision, trust_remote_code=False
            )
    if isinstance(place, type) or not callable(place):
        raise UserError(f"processor: expected an image processor or its folder, got {_name(place)}")
    return place


def fastest_device() -> torch.device:
    """Return the accelerator if the machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _name(value: Any) -> str:
    """Return the name of a class or of the class of a value, for messages."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def device_of(model: Any, device: torch.device | str | int | None = None) -> torch.device:
    """Return the device of an encoder, after a move to `device` if one is given.

    Raises:
        UserError: the model is not a module, has no weights, or the machine does not have the device.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: expected an encoder of transformers, its folder or its Hub id, got {_name(model)}; use "
            "AutoModel.from_pretrained(...)"
        )
    try:
        if device is not None:
            model.to(device)
        found = next((parameter.device for parameter in model.parameters()), torch.device(device or "cpu"))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device: expected a device of this machine, got {device}; {first_line(error)}"
        ) from error
    if found.type == "meta":
        raise UserError("model: expected weights, got the device meta; load the encoder with from_pretrained")
    return found


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the type of the weights of an encoder."""
    return next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)


def chosen_precision(config: EvaluationConfig, model: nn.Module, device: torch.device) -> str:
    """Return the name of the precision in which an encoder computes its features.

    Raises:
        UserError: `evaluation.precision` is not possible with the type of the weights.
    """
    precision, weights = config.precision, str(dtype_of(model)).removeprefix("torch.")
    if precision == "auto":  # an encoder without autocast computes in the type of its weights
        return fastest_precision(device.type).name if weights == "float32" else weights
    if weights not in (precision, "float32"):
        raise UserError(
            f"evaluation.precision: expected {weights}, the type of the weights, got {precision}; use auto"
        )
    return precision


def is_convolutional(model: nn.Module) -> bool:
    """Return whether the encoder has more than one convolution.

    Such an encoder computes faster in `channels_last` order. The single convolution of a transformer is its
    patch embedding.
    """
    return sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1


def pixel_values(processor: Any, images: list[Tensor], device: torch.device, **options: Any) -> Tensor:
    """Return the processor's output, float32 (B, C, H, W), for uint8 images (C, H, W), on `device`.

    If all images have one size, one copy moves them, and the processor resizes them on the device. The call
    names the layout, because the processor would infer channels-last for an image that is 3 pixels high. The
    options are further arguments of the processor.

    Raises:
        UserError: the images are not uint8 tensors, or the processor gives them different sizes, or sizes
            that depend on the other images.
    """
    if not all(
        isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 for image in images
    ):
        first = next(iter(images))
        got = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, Tensor) else _name(first)
        raise UserError(
            f"images: expected lists of uint8 tensors (C, H, W), got {got}; evaluate_encoder and "
            "trainer.predict accept data sets"
        )
    # This check does not import the class, because the import loads timm.
    timm_wrapper = sys.modules.get("transformers.models.timm_wrapper.image_processing_timm_wrapper")
    if timm_wrapper is not None and isinstance(processor, timm_wrapper.TimmWrapperImageProcessor):
        # The transforms of timm accept only PIL images and one option.
        photos = [as_pillow(image) for image in images]
        return processor(photos, return_tensors="pt")["pixel_values"].to(device)
    if len({image.shape for image in images}) == 1:
        images = list(torch.stack(images).to(device, non_blocking=True).unbind())
    layout = "channels_first"
    options |= {"input_data_format": layout, "device": device}
    try:
        processed = processor(images, return_tensors="pt", **options)
    except ValueError as error:  # transformers cannot stack the images
        if len(_sizes(processor, images, options)) > 1:
            raise _different_sizes(processor) from error
        raise
    mask = processed.get("pixel_mask")
    if mask is not None and not bool(mask.all()):
        # The processors of detectors (DETR) pad all images to the largest one. Encoders would compute other
        # features for an image in another batch.
        if len(_sizes(processor, images, options)) > 1:
            raise _different_sizes(processor)
    return processed["pixel_values"]


def _sizes(processor: Any, images: list[Tensor], options: dict[str, Any]) -> set[tuple[int, ...]]:
    """Return the sizes that a processor gives to images, one for each different size of an image."""
    examples = {image.shape: image for image in images}.values()
    found = (processor([image], return_tensors="pt", **options)["pixel_values"] for image in examples)
    return {tuple(pixels.shape[-2:]) for pixels in found}


def _different_sizes(processor: Any) -> UserError:
    return UserError(
        f"processor: expected one size of all images, got a {type(processor).__name__} that gives images of "
        'other shapes other sizes; set "size": {"height": 224, "width": 224} in preprocessor_config.json, or '
        "do_center_crop and crop_size"
    )


def checked_normalization(processor: Any, channels: int) -> tuple[list[float], list[float]]:
    """Return `normalization` of a processor, for protocols that resize or crop images themselves.

    Raises:
        UserError: the processor does not only divide pixels by 255 and normalize them. For example, it
            exchanges the color channels (MobileViT).
    """
    mean, std = normalization(processor, channels)
    levels = (torch.arange(1, channels + 1) * 255 // (channels + 1)).to(torch.uint8)[:, None, None]
    images = [levels.repeat(1, 64, 64), (255 - levels).repeat(1, 64, 64)]
    found = pixel_values(processor, images, torch.device("cpu")).float()
    middle = found[:, :, found.shape[2] // 2, found.shape[3] // 2]
    scaled = middle * middle.new_tensor(std) + middle.new_tensor(mean)
    wanted = torch.stack([levels.flatten(), 255 - levels.flatten()]) / 255
    if not bool(((scaled - wanted).abs() < 3 / 255).all()):
        raise UserError(
            "processor: expected only the division of RGB pixels by 255 and the normalization, because this "
            f"protocol repeats these steps, got {type(processor).__name__} with other steps; use another "
            "processor, or another protocol"
        )
    return mean, std


def first_output(
    model: nn.Module,
    processor: Any,
    images: list[Tensor],
    device: torch.device,
) -> tuple[Tensor, Mapping[str, Any]]:
    """Return the processed images and the output of an encoder, in evaluation mode and without gradient.

    Raises:
        UserError: the processor or the encoder fails, as an encoder for texts or another image size does, or
            the output contains no features.
    """
    place, expected, got = "processor", "an image processor", type(processor).__name__
    try:
        with evaluation_mode(model):
            pixels = pixel_values(processor, images, device).to(dtype_of(model))
            place, expected = "model", f"an encoder of images {tuple(pixels.shape)}"
            got = type(model).__name__
            outputs = model(pixel_values=pixels, **size_arguments(model, pixels))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place}: expected {expected}, got {got}, which fails: {first_line(error)}"
        ) from error
    named = dict(outputs) if isinstance(outputs, Mapping) else {}
    found = [named[key] for key in ("pooler_output", "last_hidden_state") if named.get(key) is not None]
    right = [isinstance(each, Tensor) and each.ndim > 1 and len(each) == len(images) for each in found]
    if not found or not all(right):
        raise UserError(
            "model: expected the tensors pooler_output (B, D) or last_hidden_state (B, T, D) as output, got "
            f"{', '.join(named) or _name(outputs)}; use an encoder from AutoModel, with return_dict=True"
        )
    return pixels, outputs


class Inspection(NamedTuple):
    """Properties of an encoder, measured with one image.

    Attributes:
        pooling: the pooling that "auto" selects.
        size: width of the processed images in pixels.
        features: the further features that the encoder has, of `FEATURES`.
    """

    pooling: Pooling
    size: int
    features: list[str]


def inspect_encoder(
    model: nn.Module, processor: Any, image_batches: Iterable[list[Tensor]], device: torch.device
) -> Inspection:
    """Return the properties of an encoder."""
    batch = next(iter(image_batches), [])
    if not batch:
        raise UserError("test: expected labeled images, got none")
    with FurtherFeatures(model) as further, torch.inference_mode():
        pixels, outputs = first_output(model, processor, batch[:1], device)
        return Inspection(pooling_rule(model, outputs), pixels.shape[-1], further.available(outputs))
