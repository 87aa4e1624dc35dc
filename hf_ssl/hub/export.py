# SPDX-License-Identifier: Apache-2.0
"""Exports an encoder with its image processor. Users without hf_ssl load every weight bit for bit."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from PIL.Image import Resampling
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining, BitImageProcessor, PreTrainedModel
from transformers.utils import logging as transformers_logging

import hf_ssl.auto  # noqa: F401  registers the methods with transformers
from hf_ssl.errors import UserError, check_name, first_line, loading_reason
from hf_ssl.files import (
    METHOD_MODEL,
    STAGING_PREFIX,
    check_new_or_empty,
    disk_errors_as_user_errors,
    read_json,
    replaced_folder,
    use_normal_permissions,
    write_json,
)
from hf_ssl.hub.publish import CONFIG, is_encoder_file
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.configuration import CLS_POOLER_TYPES, MASKING_TYPE
from hf_ssl.modeling.encoder_parts import PARTS
from hf_ssl.modeling.finite import check_finite
from hf_ssl.modeling.loading import load_weights
from hf_ssl.modeling.parallel_encoders import ParallelEncoders
from hf_ssl.views import ViewPreset
from hf_ssl.views.preset import check_output

FILTERS = {"bilinear": Resampling.BILINEAR, "bicubic": Resampling.BICUBIC}
_OLD_PREFIXES = {
    "chinese_clip_vision_model": "vision_model.",
    "clip_vision_model": "vision_model.",
    "mlcd_vision_model": "vision_model.",
    "siglip2_vision_model": "vision_model.",
    "siglip_vision_model": "vision_model.",
}
"""Model type -> start of the names of all weights in releases before transformers 5."""
_STAGING = f"{STAGING_PREFIX}export-"


def export_encoder(encoder: PreTrainedModel, processor: BitImageProcessor, directory: str | Path) -> None:
    """Write an encoder of transformers and its image processor to `directory`, and check that they load.

    The files are first written to a folder inside `directory` and loaded there with `AutoModel`. No key may
    be missing, unexpected or of another shape. Every tensor must be equal bit for bit. The encoder must
    accept one image of the processor's size. Then the files are moved up one by one, `config.json` last.
    After an interruption, `directory` contains the previous encoder, the new one, or none that loads. Other
    files in `directory` stay.

    The parts of `ParallelEncoders` are written to subfolders and checked separately. The folder itself then
    has no `config.json` and contains `encoders.json`, which is moved last.

    Weights get the names of old transformers releases, which old and new releases load. `save_pretrained`
    writes these names, except for the encoders of CLIP and SigLIP (`_OLD_PREFIXES`). The encoder itself stays
    unchanged.

    Features of the loaded encoder equal those of `encoder` only up to rounding. The reason is that torch's
    choice of kernels depends on the memory address of a tensor, and the loaded weights have other addresses.

    Args:
        encoder: an instance of a class of transformers, as `AutoModel` creates it from a config, or
            `ParallelEncoders` of such instances.
        processor: the result of `image_processor`.
        directory: created if it does not exist.

    Raises:
        UserError: the loaded encoder would differ, or a file cannot be written.
    """
    parts = _parts(encoder)
    for part in parts.values():
        check_exportable(part)
    directory = Path(directory)
    with disk_errors_as_user_errors(f"the encoder to {directory.name}"):
        directory.mkdir(parents=True, exist_ok=True)
        for abandoned in directory.glob(f"{_STAGING}*"):
            shutil.rmtree(abandoned)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=directory))
        try:
            encoder.save_pretrained(staging)
            _write_old_names(encoder, staging)
            processor.save_pretrained(staging)
            use_normal_permissions(staging)
            for subfolder, part in parts.items():
                channels = cast(Any, part.config).num_channels if subfolder else None
                check_reloads(part, processor, staging / subfolder, channels)
            if isinstance(encoder, ParallelEncoders):
                load_weights(str(staging), "encoder")  # checks that the parts belong together
            _move_up(staging, directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def export_model(model: SSLPreTrainedModel, directory: str | Path) -> None:
    """Export the encoder of a method with its image processor, and the method model to `pretraining/`.

    Raises:
        UserError: the same errors as `export_encoder`.
    """
    check_finite(model, "export")
    preset = ViewPreset.from_dict(model.config.views or {})
    export_encoder(model.exported_encoder, image_processor(preset, len(preset.mean)), directory)
    with replaced_folder(Path(directory) / METHOD_MODEL) as folder:
        model.save_pretrained(folder)


def export_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Export the model of a training checkpoint, see `export_model`.

    Raises:
        UserError: the checkpoint cannot be read, is not a method of hf_ssl, or the directory is not empty.
    """
    transformers_logging.disable_progress_bar()
    checkpoint, directory = checkpoint.expanduser(), directory.expanduser()
    check_new_or_empty(directory, "export")
    export_model(load_method_model(checkpoint), directory)
    print(f"encoder: {directory}, method model: {directory / METHOD_MODEL}")


def load_method_model(checkpoint: Path) -> SSLPreTrainedModel:
    """Return the model in a training checkpoint or in the folder `pretraining/` of a run.

    Raises:
        UserError: the folder cannot be read, is not a method of hf_ssl, or has weights that are not finite.
    """
    try:
        model = AutoModelForPreTraining.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{checkpoint}: expected a checkpoint, got an error ({loading_reason(error)}); use another one"
        ) from error
    if not isinstance(model, SSLPreTrainedModel):
        raise UserError(
            f"{checkpoint}: expected a method of hf_ssl, got a {type(model).__name__}; use another one"
        )
    check_finite(model, str(checkpoint))
    return model


def image_processor(preset: ViewPreset | dict[str, Any], channels: int) -> BitImageProcessor:
    """Return an image processor that resizes the shortest edge, crops the center and normalizes.

    The class is `BitImageProcessor`, because it converts gray, palette and transparent photos to RGB;
    `ViTImageProcessor` raises an error for them. From transformers 5.21 on, it places transparent photos on a
    white background; 5.20 drops transparency. If the preset sets `enlarge`, the processor uses the bilinear
    filter that enlarges the views. An image of the size of the views is then processed as in training.
    Otherwise the processor uses the filter of the crops.

    Args:
        preset: the views, or a dict of some of their fields. The function reads `size`, `enlarge`,
            `interpolation`, `mean` and `std`.
        channels: input channels of the encoder. With 3, the processor converts every photo to RGB.
            transformers has no processor that converts photos to gray or to another number of channels. With
            1, the user opens them with `image.convert("L")`. With other numbers, the user passes (C, H, W)
            arrays and `input_data_format="channels_first"`. The encoder raises an error if the number of
            channels of an image differs from its own.

    Raises:
        UserError: the views are not valid for this number of channels.
    """
    preset = preset if isinstance(preset, ViewPreset) else ViewPreset.from_dict(preset)
    check_output(preset, channels)
    check_name("views.interpolation", preset.interpolation, FILTERS, " or ".join(FILTERS))
    side = preset.final_size
    return BitImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        resample=FILTERS[preset.interpolation if preset.enlarge is None else "bilinear"],
        image_mean=list(preset.mean),
        image_std=list(preset.std),
        do_convert_rgb=channels == 3,
    )


def _write_old_names(encoder: PreTrainedModel, directory: Path) -> None:
    """Add the prefix to the names of weights that releases before transformers 5 expect.

    transformers 5.24 removes the prefix when it loads. It writes the prefix only for an encoder that
    `from_pretrained` loaded from a file with it. transformers 4.57 would use random weights for names without
    the prefix, and would only log a warning.
    """
    prefix = _OLD_PREFIXES.get(encoder.config.model_type)
    if prefix is None:
        return
    for file in directory.glob("*.safetensors"):
        named = {_prefixed(name, prefix): value for name, value in load_file(file).items()}
        renamed = file.with_suffix(".renamed")  # safetensors still reads from `file`
        save_file(named, renamed, {"format": "pt"})
        os.replace(renamed, file)
    for index in directory.glob("*.safetensors.index.json"):
        content = read_json(index)
        names = {_prefixed(name, prefix): file for name, file in content["weight_map"].items()}
        write_json(index, content | {"weight_map": names})


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(prefix) else prefix + name


def _parts(encoder: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Return the encoders that transformers loads, by their subfolder; "" is the folder itself."""
    if isinstance(encoder, ParallelEncoders):
        return dict(zip(encoder.subfolders, cast(Any, encoder.parts), strict=True))
    return {"": encoder}


def check_exportable(encoder: PreTrainedModel) -> None:
    """Raise UserError for an encoder that diverged, or that `AutoModel` would load with other outputs."""
    name, model_type = type(encoder).__name__, encoder.config.model_type
    if not type(encoder).__module__.startswith("transformers."):
        raise UserError(f"encoder: expected a class of transformers, got {name}; use one of transformers")
    if model_type == MASKING_TYPE:
        raise UserError(f"encoder: expected one without random masks, got {name}; export it as ViTModel")
    if model_type in CLS_POOLER_TYPES:
        _check_pooler(encoder)
    check_finite(encoder, "encoder")


def _check_pooler(encoder: Any) -> None:
    """Check that a ViT returns its class token. AutoModel creates a random pooler if none was saved."""
    name, pooler = type(encoder).__name__, encoder.pooler
    if pooler is None:
        raise UserError(
            f"{name}: expected a pooler, got none, and AutoModel would add a random one; add a pooler with "
            "identity weight, zero bias and pooler_act='linear'"
        )
    dense: nn.Linear = pooler.dense
    identity = torch.eye(*dense.weight.shape, dtype=dense.weight.dtype, device=dense.weight.device)
    if (
        encoder.config.pooler_act != "linear"
        or not torch.equal(dense.weight, identity)
        or bool(dense.bias.count_nonzero())
    ):
        raise UserError(
            f"{name}: expected a pooler that returns the class token (identity weight, zero bias, "
            f"pooler_act='linear'), got another one with pooler_act={encoder.config.pooler_act!r}; set these "
            "values before the export"
        )


def check_reloads(
    encoder: PreTrainedModel, processor: BitImageProcessor, directory: Path, channels: int | None = None
) -> None:
    """Raise UserError unless `AutoModel` loads an equal encoder that accepts the processor's images.

    Args:
        encoder: the written encoder.
        processor: the image processor.
        directory: the folder of the written encoder.
        channels: channels of the encoder's images. None: those of the processor's images.
    """
    loaded, report = AutoModel.from_pretrained(directory, output_loading_info=True, trust_remote_code=False)
    name = type(encoder).__name__
    if type(loaded) is not type(encoder):
        raise UserError(f"{name}: expected AutoModel to load the same class, got {type(loaded).__name__}")
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[problem]:
            raise UserError(
                f"{name}: expected AutoModel to load every key, got {problem.replace('_', ' ')} "
                f"{sorted(report[problem])[:3]}"
            )
    before, after = encoder.state_dict(), loaded.state_dict()
    different = [key for key in before if key not in after or not same_bits(before[key], after[key])]
    if different or len(before) != len(after):
        raise UserError(f"{name}: expected equal tensors after loading, got other values in {different[:3]}")
    crop = processor.crop_size
    channels = channels or len(processor.image_mean)
    image = torch.zeros(1, channels, crop["height"], crop["width"], dtype=loaded.dtype)
    try:
        with torch.inference_mode():
            loaded.eval()(pixel_values=image)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: expected an encoder for the processor's images {tuple(image.shape)}, got an error "
            f"({first_line(error)}); set the same size and channels for both"
        ) from error


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether type, shape and every bit are equal. NaN equals itself, and 0 differs from -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (
        tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (first, second)
    )
    return torch.equal(one, other)


def _move_up(staging: Path, directory: Path) -> None:
    """Move the files of `staging` into `directory` so that no mixture of two encoders ever loads.

    Weights are moved first, then each `config.json`, then `encoders.json`. transformers loads no encoder
    from a folder without `config.json`.
    """
    paths = [path.relative_to(staging) for path in staging.rglob("*") if path.is_file()]
    last = (CONFIG, PARTS)
    paths.sort(key=lambda path: (last.index(path.name) + 1 if path.name in last else 0, path.as_posix()))
    old = [
        path
        for path in (*directory.glob("*"), *directory.glob("view_*/*"))
        if is_encoder_file(path.relative_to(directory).as_posix())  # others belong to the user
    ]
    for path in sorted(old, key=lambda path: path.name not in last):  # no encoder loads after these
        if path.name in last or path.relative_to(directory) not in paths:
            path.unlink()
    for folder in {path.parent for path in old} - {directory}:
        if not any(folder.iterdir()):
            folder.rmdir()
    for path in paths:
        (directory / path).parent.mkdir(exist_ok=True)
        os.replace(staging / path, directory / path)
