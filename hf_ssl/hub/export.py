# SPDX-License-Identifier: Apache-2.0
"""Exports an encoder in the format of transformers: users without hf_ssl load every weight bit for bit."""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, BitImageProcessor, PreTrainedModel

from hf_ssl.errors import UserError
from hf_ssl.files import STAGING_PREFIX, disk_errors, use_normal_permissions

STAGE = f"{STAGING_PREFIX}export-"
CONFIG = "config.json"


def export_encoder(encoder: PreTrainedModel, processor: BitImageProcessor, directory: str | Path) -> None:
    """Write a native encoder and its image processor to `directory`, after proving that they load.

    The files are written to a folder inside `directory`, loaded again with `AutoModel` there (no key missing,
    unexpected or of another shape; every tensor equal bit for bit; one image of the processor's size goes
    through), and moved up one by one, `config.json` last. Whenever it is interrupted, `directory` holds the
    encoder that it held before, or none that loads, or the new one. Other files in `directory` stay.

    Weights keep the names of old transformers releases (`save_pretrained`'s default), which old and new ones
    load. The encoder itself is not changed.

    Features of the loaded encoder equal those of `encoder` only up to rounding. The reason is that torch's
    choice of kernels depends on the memory address of a tensor, and the loaded weights have other addresses.

    Args:
        encoder: a class of transformers' own, as `AutoModel` makes it from a config.
        processor: what `image_processor` gives.
        directory: made where it does not exist.

    Raises:
        UserError: the encoder would not come back as it is, or the disk does not take it.
    """
    check_exportable(encoder)
    directory = Path(directory)
    with disk_errors(f"the encoder to {directory.name}"):
        directory.mkdir(parents=True, exist_ok=True)
        for abandoned in directory.glob(f"{STAGE}*"):
            shutil.rmtree(abandoned)
        stage = Path(tempfile.mkdtemp(prefix=STAGE, dir=directory))
        try:
            encoder.save_pretrained(stage)
            processor.save_pretrained(stage)
            use_normal_permissions(stage)
            check_reloads(encoder, processor, stage)
            _move_up(stage, directory)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def check_exportable(encoder: PreTrainedModel) -> None:
    """Raises UserError for encoders that load without complaint and are something else then."""
    kind, model_type = type(encoder).__name__, encoder.config.model_type
    if not type(encoder).__module__.startswith("transformers."):
        raise UserError(
            f"expected an encoder of a class that comes with transformers, got {kind}: nobody could load it "
            "without its source."
        )
    if model_type == "vit_mae":
        raise UserError(f"{kind} masks at random whenever it is used: export its weights as ViTModel.")
    if model_type in ("vit", "deit"):
        _check_pooler(encoder)


def _check_pooler(encoder: Any) -> None:
    """Check that a ViT returns its class token. AutoModel makes a random pooler if none was saved."""
    kind, pooler = type(encoder).__name__, encoder.pooler
    if pooler is None:
        raise UserError(
            f"{kind} was made without its pooler and would come back with a random one: make it with one "
            "whose weight is the identity, whose bias is zero, and with pooler_act='linear'."
        )
    dense: nn.Linear = pooler.dense
    identity = torch.eye(*dense.weight.shape, dtype=dense.weight.dtype, device=dense.weight.device)
    if (
        encoder.config.pooler_act != "linear"
        or not torch.equal(dense.weight, identity)
        or bool(dense.bias.count_nonzero())
    ):
        raise UserError(
            f"{kind}: expected a pooler that hands out the class token (identity weight, zero bias, "
            f"pooler_act='linear'), got another one with pooler_act={encoder.config.pooler_act!r}: "
            "pooler_output would not be what was trained."
        )


def check_reloads(encoder: PreTrainedModel, processor: BitImageProcessor, directory: Path) -> None:
    """Raises UserError unless `AutoModel` brings the very encoder back and takes the processor's images."""
    loaded, report = AutoModel.from_pretrained(directory, output_loading_info=True)
    kind = type(encoder).__name__
    if type(loaded) is not type(encoder):
        raise UserError(f"{kind}: AutoModel loads it as {type(loaded).__name__}.")
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[problem]:
            raise UserError(
                f"{kind}: AutoModel finds {problem.replace('_', ' ')}: {sorted(report[problem])[:3]}."
            )
    before, after = encoder.state_dict(), loaded.state_dict()
    different = [name for name in before if name not in after or not same_bits(before[name], after[name])]
    if different or len(before) != len(after):
        raise UserError(f"{kind}: these tensors come back changed: {different[:3]}.")
    crop, mean = processor.crop_size, processor.image_mean
    image = torch.zeros(1, len(mean), crop["height"], crop["width"], dtype=loaded.dtype)
    try:
        with torch.inference_mode():
            loaded.eval()(pixel_values=image)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{kind} does not take the processor's images {tuple(image.shape)}: {reason}"
        ) from error


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equality of type, shape and every bit: NaN equals itself, 0 differs from -0."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    one, other = (
        tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in (first, second)
    )
    return torch.equal(one, other)


def _move_up(stage: Path, directory: Path) -> None:
    """Move the files of `stage` into `directory` so that no mixture of two encoders ever loads."""
    names = sorted((path.name for path in stage.iterdir()), key=lambda name: (name == CONFIG, name))
    old = [path for path in directory.glob("model*.safetensors*") if path.name not in names]
    (directory / CONFIG).unlink(missing_ok=True)  # without it nothing loads
    for path in old:
        path.unlink()
    for name in names:
        os.replace(stage / name, directory / name)
