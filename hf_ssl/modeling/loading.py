# SPDX-License-Identifier: Apache-2.0
"""Loads encoders, their configurations and image processors from folders and the Hub (layer 1)."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, logging

from hf_ssl.errors import UserError, counted, loading_reason
from hf_ssl.files import local_folder, local_or_hub
from hf_ssl.modeling.backbones import set_identity_pooler
from hf_ssl.modeling.configuration import CLS_POOLER_TYPES, method_of
from hf_ssl.modeling.finite import check_finite, check_not_quantized
from hf_ssl.modeling.image_encoders import (
    TOWER,
    TWO_TOWERS,
    check_loads_alone,
    image_config,
    image_encoder,
)
from hf_ssl.modeling.parallel_encoders import find_parts
from hf_ssl.modeling.pooling import declare_feature, rule_without_pooler

logger = logging.get_logger(__name__)

_UNUSED = ("mask_token", "num_batches_tracked")
"""Ends of names of weights that files may lack: they have no effect on features."""
_COMPUTED = (
    "attn_mask", "position_ids", "relative_coords_table", "relative_position_index", "total_ops",
    "total_params",
)  # fmt: skip
"""Ends of names of tensors that files of old versions contain, and that models compute or do not need."""
_ADAPTER = "adapter_config.json"

_OF_PATCHES = ("siglip2", "siglip2_vision_model")
"""Model types whose input is a sequence of patches (NaFlex) and not an image."""


@contextmanager
def loading_errors(what: str, where: str = "model") -> Iterator[None]:
    """Turn the errors of loading something from a folder or the Hub into a UserError.

    Args:
        what: the thing, with the value that names it.
        where: the argument or the key of the value.
    """
    try:
        yield
    except (
        Exception
    ) as error:  # damaged files raise many types of errors in transformers, safetensors and torch
        sentence = f"{where}: expected a local folder or a Hub id of {what}; {loading_reason(error)}"
        raise UserError(sentence) from error


def load_config(place: str, where: str = "model", **options: Any) -> PreTrainedConfig:
    """Return the configuration of an encoder.

    Args:
        place: a folder or a Hub id.
        where: the argument or the key that holds `place`, for messages.
        options: further arguments of `AutoConfig.from_pretrained`, such as `revision`. Code of the repository
            never runs (`trust_remote_code=False`).

    Raises:
        UserError: there is no encoder, or a method model instead of one.
    """
    folder = local_or_hub(place)
    with loading_errors(f"an encoder, got {place!r}", where):
        parts = find_parts(folder, **options)
        if parts is not None:
            return parts.config()
    return image_config(_encoder_config(place, where, **options))


def _encoder_config(place: str, where: str, **options: Any) -> PreTrainedConfig:
    """Return the configuration in the folder or repository itself, which is not in parts."""
    if "subfolder" not in options:
        _check_folder(place, where)
    with loading_errors(f"an encoder, got {place!r}", where):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            local_or_hub(place), trust_remote_code=False, **options
        )
    if method_of(config.model_type) is not None:
        raise UserError(
            f"{where}: expected an encoder, got the method model {place}; use the folder above pretraining/, "
            "or export the checkpoint"
        )
    if config.model_type in _OF_PATCHES:
        raise UserError(
            f"{where}: expected an encoder with a fixed image size, got {config.model_type} (NaFlex), whose "
            "input is any number of patches; use a fixed size, such as google/siglip2-base-patch16-224"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{where}: expected an encoder, got {config.model_type}, whose output is that of a decoder (for "
            "example object queries); save its encoder or backbone to a folder of its own"
        )
    vars(config).pop("auto_map", None)  # an exported encoder must not name the code of another repository
    return config


def _check_folder(place: str, where: str) -> None:
    """Raise UserError if a local folder has no `config.json`, such as the folder of an unfinished run.

    A folder with an adapter is also an error: without peft, `from_pretrained` would load the weights that the
    adapter changes, and ignore the adapter.
    """
    folder = local_folder(place)
    if folder is not None and (folder / _ADAPTER).exists():
        raise UserError(
            f"{where}: expected an encoder, got {place!r}, an adapter of peft with {_ADAPTER}; merge it with "
            "model.merge_and_unload(), and save the result to another folder"
        )
    if folder is None or (folder / CONFIG_NAME).exists():
        return
    if any(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        raise UserError(
            f"{where}: expected an encoder, got {place!r}, an unfinished run; finish it with its command, or "
            f"use hf-ssl export {place}/checkpoint-N FOLDER"
        )
    raise UserError(
        f"{where}: expected an encoder, got {place!r}, a folder without {CONFIG_NAME}; use the output folder "
        "of a run, or of save_pretrained"
    )


def loaded_commit(encoder: Any) -> str | None:
    """Return the commit on the Hub that an encoder was loaded from; None if it is not known.

    transformers 5.20 records it, and 5.24 does not. `load_weights` records it in the same attribute, which
    `save_pretrained` does not write.
    """
    return getattr(encoder.config, "_commit_hash", None)


def _commit_in_cache(place: str, revision: str | None) -> str | None:
    """Return the commit of an encoder that was just loaded, or None for a local folder."""
    if local_folder(place) is not None:
        return None
    file = try_to_load_from_cache(place, "config.json", revision=revision)
    return Path(file).parent.name if isinstance(file, str) else None


def load_weights(place: str, where: str = "model", **options: Any) -> PreTrainedModel:
    """Return an encoder from a folder or the Hub. Arguments and errors: see `load_config`.

    All functions that load encoders call this one. If the encoder consists of parts in subfolders
    (`hf_ssl.modeling.encoder_parts`), the result joins them. The result is the encoder of images in a ViTMAE
    or in a model of images and texts (`image_encoder`).

    The weights are in float32, also if the files contain others. `from_pretrained` of transformers 5 would
    keep 16 bits, which are not enough for training. An evaluation has the precision that it names.

    `AutoModel` creates random weights for those that the files lack, and only logs a warning. A pooler that
    was not saved, as in checkpoints of classifiers, would give other features in each process. The feature
    is then the class token, or the mean of all tokens. Other missing weights raise an error, and so do
    weights that are not finite or whole numbers, and layers that the configuration leaves out. Biases that
    it leaves out are logged as a warning.
    """
    folder = local_or_hub(place)
    with loading_errors(f"an encoder, got {place!r}", where):
        parts = find_parts(folder, **options)
        if parts is not None:
            joined = parts.load()
            check_finite(joined, where)
            return joined
    config = _encoder_config(place, where, **options)
    with loading_errors(f"an encoder, got {place!r}", where):
        encoder, report = AutoModel.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            **options,
        )
        commit = _commit_in_cache(place, options.get("revision"))
    missing = [key for key in sorted(report["missing_keys"]) if not key.endswith(_UNUSED)]
    if config.model_type in TWO_TOWERS:
        start = f"{TOWER}."
        missing = [key.removeprefix(start) for key in missing if key.startswith(start)]
    layers, others = _left_out(encoder, report["unexpected_keys"])
    if config.model_type in TWO_TOWERS:
        layers, others = ([key for key in keys if f"{TOWER}." in key] for keys in (layers, others))
    if layers:
        raise UserError(
            f"{where}: expected a {CONFIG_NAME} that describes all layers in {place}, got none for "
            f"{counted(len(layers), 'tensor')}, such as {layers[0]}; correct {CONFIG_NAME}"
        )
    if others:
        logger.warning(
            "%s of %s, such as %s, is not part of the encoder that %s describes, and is not used; check its "
            "settings, for example of biases", counted(len(others), "tensor"), place, others[0], CONFIG_NAME,
        )  # fmt: skip
    encoder = image_encoder(encoder)
    config, encoder.config._commit_hash = encoder.config, commit
    check_finite(encoder, where)
    check_not_quantized(encoder, where)
    if others := [key for key in missing if not key.startswith("pooler.")]:
        raise UserError(
            f"{where}: expected all weights of a {type(encoder).__name__} in {place}, got none for "
            f"{counted(len(others), 'tensor')}, such as {others[0]}; they would be new"
        )
    if missing and config.model_type in CLS_POOLER_TYPES:
        encoder.config.pooler_act, encoder.pooler.activation = "linear", nn.Identity()
        set_identity_pooler(encoder)
        declare_feature(encoder, "cls")
    elif missing:
        declare_feature(encoder, rule_without_pooler(encoder))
    return encoder


def _left_out(encoder: nn.Module, unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of tensors in the files that belong to the encoder, although it does not have them.

    Other unexpected tensors are those of classifiers and decoders.

    Args:
        encoder: the model that `AutoModel` returned.
        unexpected: names of the tensors in the files that the model does not have.

    Returns:
        The tensors of further modules of a list of modules, such as layers, and those that belong to a module
        of the encoder, such as biases. The latter may also be left over from another version of the model.
    """
    modules = dict(encoder.named_modules())
    prefix = f"{getattr(encoder, 'base_model_prefix', '')}."
    layers, others = [], []
    for key in sorted(unexpected):
        if key.endswith(_UNUSED + _COMPUTED):
            continue
        *path, _ = key.removeprefix(prefix).split(".")
        known = next(count for count in range(len(path), -1, -1) if ".".join(path[:count]) in modules)
        owner, further = modules[".".join(path[:known])], path[known:]
        is_list = isinstance(owner, nn.ModuleList | nn.Sequential) and len(owner) > 0
        if further and is_list and further[0].isdecimal():
            layers.append(key)
        # An `nn.Identity` of timm takes the place of a classifier, and has no parameters.
        elif not further and owner is not encoder and any(True for _ in owner.parameters(recurse=False)):
            others.append(key)
    return layers, others


def start_encoder(given: str | os.PathLike | PreTrainedModel) -> PreTrainedModel:
    """Return the encoder that a training starts from.

    Args:
        given: a folder, a Hub id or a model. The result is then the encoder of images in it.

    Raises:
        UserError: the encoder cannot be loaded, now or after the training.
    """
    encoder = given if isinstance(given, PreTrainedModel) else load_weights(os.fspath(given), "encoder")
    encoder = cast(PreTrainedModel, image_encoder(encoder))
    check_loads_alone(encoder.config, "encoder")
    return encoder


def view_settings(place: str, channels: int, revision: str | None = None) -> dict[str, Any]:
    """Return the fields of the views that follow from the image processor beside the files of an encoder.

    They are `size`, `mean` and `std`. Without a processor, log a warning and return {}.

    Args:
        place: a folder or a Hub id.
        channels: number of channels of the images.
        revision: commit on the Hub.
    """
    try:
        processor: Any = AutoImageProcessor.from_pretrained(
            local_or_hub(place), revision=revision, trust_remote_code=False
        )
    except (ImportError, OSError, ValueError) as error:
        logger.warning(
            "views: size, mean and std do not follow the encoder, because its image processor cannot be "
            "loaded: %s", loading_reason(error),
        )  # fmt: skip
        return {}
    mean, std = normalization(processor, channels)
    scale = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1
    if not math.isclose(scale, 1 / 255) or getattr(processor, "do_flip_channel_order", False):
        logger.warning(
            "views: expected an image processor that divides RGB pixels by 255, as for the views, got "
            "%s with another factor or another order of colors; use another encoder, or expect that "
            "training needs more steps", type(processor).__name__,
        )  # fmt: skip
    if hasattr(processor, "data_config"):
        side = processor.data_config["input_size"][-1]
    else:
        # The processors of EfficientNet and BEiT have a `crop_size`, but do not crop by default.
        crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
        size = dict(crops or processor.size or {})
        side = size.get("height", size.get("shortest_edge"))
    return {"mean": mean, "std": std} | ({} if side is None else {"size": side})


def normalization(processor: Any, channels: int) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each channel, for pixels in [0, 1], of a processor.

    They are 0 and 1 for a processor that does not normalize or names no numbers. A single number applies to
    all channels. With `include_top`, the processor of EfficientNet divides twice by the standard deviation,
    so the result is its square.
    """
    given = getattr(processor, "data_config", None)  # of timm
    if given is None:
        used = getattr(processor, "do_normalize", False)
        given = {"mean": processor.image_mean, "std": processor.image_std} if used else {}
    mean, std = list(given.get("mean") or [0.0]), list(given.get("std") or [1.0])
    if getattr(processor, "include_top", False):
        std = [value**2 for value in std]
    return mean * (channels if len(mean) == 1 else 1), std * (channels if len(std) == 1 else 1)
