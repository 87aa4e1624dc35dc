# SPDX-License-Identifier: Apache-2.0
"""Converts a checkpoint: builds its encoder in transformers, and writes it with a card."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import BitImageProcessor
from transformers.utils import logging as transformers_logging

from hf_ssl import __version__
from hf_ssl.cards.conversion import ConversionFacts, EncoderFacts, SourceFacts, write_conversion
from hf_ssl.cards.privacy import folder_name
from hf_ssl.conversion import resnet, vit
from hf_ssl.conversion.architecture import Architecture, unexpected
from hf_ssl.conversion.checkpoint import read_checkpoint, state_dicts
from hf_ssl.conversion.releases import RELEASES, RESNET, Release, find_checkpoint
from hf_ssl.conversion.selection import Selection, left_out, select
from hf_ssl.errors import UserError, check_name, counted, first_line
from hf_ssl.files import check_new_or_empty, read_json, replaced_folder
from hf_ssl.hub.export import FILTERS, export_encoder, image_processor
from hf_ssl.modeling.backbones import feature_size, input_channels, set_identity_pooler
from hf_ssl.modeling.eval_mode import copy_without_values, unchanged_random_state
from hf_ssl.modeling.pooling import declare_feature, pooling_rule
from hf_ssl.progress import progress

IMAGE_SIZE = 224
"""Side in pixels of the images of a ResNet, in the authors' evaluation."""
RESIZED = 256
"""Most authors resize the shorter side to this number of pixels before a crop of 224."""
_COUNTER = "num_batches_tracked"  # of BatchNorm: some files lack it, and it has no effect on features


def convert(
    file: str | Path,
    release: str,
    output: str | Path,
    *,
    place: str | None = None,
    heads: int | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ConversionFacts:
    """Write the encoder in a checkpoint as an encoder of transformers, with image processor, card and facts.

    The folder is complete or unchanged, also after an interruption. The checkpoint stays unchanged.

    Args:
        file: a file of `torch.save` or safetensors. None of its code runs.
        release: key of `RELEASES`.
        output: a new or empty folder.
        place: where the weights of the encoder are in the file, see `hf_ssl.conversion.selection`. None: the
            places of the release.
        heads: number of attention heads of a vision transformer. None: that of the release.
        size: side in pixels of the images of the processor. None: that of the positions of a vision
            transformer, or 224.
        mean, std: normalization of each channel, for pixels in [0, 1]. None: that of the release.

    Returns:
        The facts, which `conversion.json` also contains.

    Raises:
        UserError: the file does not contain the encoder of this release, or the folder contains files.
    """
    file, output = find_checkpoint(file, release), Path(os.path.abspath(Path(output).expanduser()))
    check_new_or_empty(output, "--output")
    known, notes = _with_own_settings(RELEASES[release], file)
    transformers_logging.disable_progress_bar()
    content = read_checkpoint(file, known.places[0].rpartition("/")[0])
    dicts = state_dicts(content)
    chosen = select(dicts, file, release, place)
    found = _architecture(chosen, known, heads)
    _check_labels(file, chosen, known, found.left_out)
    _check_tokens_and_scales(file, chosen, known)
    encoder = _encoder(found, known)
    processor = _processor(encoder, found, known, file.name, size, mean, std)
    with progress(f"hashing {file.name}"), file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    facts = ConversionFacts(
        hf_ssl_version=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        name=folder_name(output),
        release=release,
        title=known.title,
        paper=known.paper,
        page=known.page,
        license=known.license,
        source=SourceFacts(
            file=file.name,
            bytes=file.stat().st_size,
            sha256=digest,
            urls=known.addresses(file.name),
            place=chosen.place,
        ),
        backbone=_encoder_facts(encoder, found, processor),
        processor={
            "resize": processor.size["shortest_edge"],
            "crop": processor.crop_size["height"],
            "interpolation": known.interpolation,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
        },
        not_converted=left_out(content, dicts, chosen, found.left_out),
        notes=[*found.notes, *([known.note] if known.note else []), *notes],
    )
    with replaced_folder(output) as folder:
        export_encoder(encoder, processor, folder)
        write_conversion(folder, facts)
        check_new_or_empty(output, "--output")  # the conversion of a large file takes a minute
    return facts


def _with_own_settings(release: Release, file: Path) -> tuple[Release, list[str]]:
    """Return the release with the preprocessing in `config.json` of timm beside the file, and notes.

    Releases with one preprocessing for all checkpoints stay unchanged.
    """
    if release.mean is not None:
        return release, []
    config = file.parent / "config.json"
    content = read_json(config) if config.is_file() else None
    given = content.get("pretrained_cfg", content) if isinstance(content, dict) else None
    if not isinstance(given, dict) or not {"mean", "std", "crop_pct", "interpolation"} <= given.keys():
        note = (
            f"The checkpoint contains no preprocessing. The resize to {RESIZED}/{IMAGE_SIZE} of the crop and "
        )
        return release, [f"{note}the {release.interpolation} filter are assumptions."]
    check_name(f"{config}: interpolation", given["interpolation"], FILTERS, " or ".join(FILTERS))
    try:
        mean, std = (tuple(map(float, given[key])) for key in ("mean", "std"))
        resized = {file.name: IMAGE_SIZE / float(given["crop_pct"])}
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{config}: expected numbers for mean, std and crop_pct, got an error ({first_line(error)}); "
            "edit this file, or move the checkpoint to another folder"
        ) from error
    return replace(release, mean=mean, std=std, interpolation=given["interpolation"], resized=resized), []


def _check_tokens_and_scales(file: Path, chosen: Selection, release: Release) -> None:
    """Raise UserError for a vision transformer that the authors of the release did not train."""
    if chosen.family == RESNET or release.method is None:
        return
    scale = next((name for name in chosen.weights if name.endswith((".ls1.gamma", ".gamma_1"))), None)
    if scale is not None:
        raise UserError(
            f"{file}: expected a checkpoint of {release.title} without LayerScale, got {scale}; for DINOv2, "
            "run hf-ssl evaluate facebook/dinov2-small; for other encoders, use --from timm"
        )
    has_token = "cls_token" in chosen.weights
    if release.class_token not in (None, has_token):
        expected, got = ("a", "none") if release.class_token else ("no", "one")
        raise UserError(
            f"{file}: expected {expected} class token in a checkpoint of {release.title}, got {got}; use the "
            "release of its method, or --from timm"
        )


def _check_labels(file: Path, chosen: Selection, release: Release, heads: Sequence[str]) -> None:
    """Raise UserError for an encoder that was trained with labels, in a file without distinctive names."""
    classifier = next((name for name in heads if name in ("fc.weight", "head.weight")), None)
    has_prefix = chosen.place.rpartition("/")[2] != ""
    if release.method is None or release.has_classifier or has_prefix or classifier is None:
        return
    other = "torchvision" if chosen.family == RESNET else "timm"
    raise UserError(
        f"{file}: expected a checkpoint of {release.title} without a classifier, got {classifier}; if it was "
        f"trained with labels, use --from {other}"
    )


def _architecture(chosen: Selection, release: Release, heads: int | None) -> Architecture:
    weights = {
        name: value.float() if value.is_floating_point() else value for name, value in chosen.weights.items()
    }
    if chosen.family == RESNET:
        if heads is not None:
            raise UserError(f"--heads: expected no value for a ResNet, got {heads}; leave it out")
        return resnet.read(weights)
    return vit.read(weights, heads, release.heads)


def _encoder(found: Architecture, release: Release) -> Any:
    """Return the encoder with the weights of the file.

    Raises:
        UserError: a weight is missing, has another shape or another type, or is not finite.
    """
    with unchanged_random_state(torch.device("cpu")):
        encoder = found.model_class(found.config).eval()
    set_identity_pooler(encoder)
    own = encoder.state_dict()
    optional = [name for name in own if name.endswith(_COUNTER) or name.startswith("pooler.")]
    advice = "download the file again, or convert another checkpoint"
    for name in sorted(own.keys() - found.weights.keys() - set(optional)):
        raise UserError(f"checkpoint: expected all weights of {found.name}, got none for {name}; {advice}")
    for name, value in found.weights.items():
        if name not in own:
            raise unexpected(found.name, name)
        if own[name].shape != value.shape:
            shapes = f"{tuple(own[name].shape)} for {name}, got {tuple(value.shape)}"
            raise UserError(f"checkpoint: expected {shapes}; {advice}")
        _check_values(name, value, advice)
    encoder.load_state_dict(found.weights, strict=False)
    is_mean = release.pooling == "mean" or encoder.config.model_type == "ijepa"
    declare_feature(encoder, "mean" if is_mean else "auto")
    return encoder


def _check_values(name: str, value: torch.Tensor, advice: str) -> None:
    """Raise UserError for a weight that cannot be copied, or that would make features NaN."""
    if value.is_meta or value.layout != torch.strided:
        kind = "no values" if value.is_meta else f"a tensor with the layout {value.layout}"
        raise UserError(f"checkpoint: expected dense weights, got {kind} for {name}; {advice}")
    if not value.is_floating_point() and not name.endswith(_COUNTER):
        raise UserError(
            f"checkpoint: expected floating-point weights, got {value.dtype} for {name}; convert a "
            "checkpoint that is not quantized"
        )
    if not torch.isfinite(value).all():
        raise UserError(f"checkpoint: expected finite weights, got NaN or infinity in {name}; {advice}")
    if name.endswith("running_var") and (value < 0).any():
        lowest = value.min().item()
        raise UserError(f"checkpoint: expected variances of 0 or more, got {lowest:g} in {name}; {advice}")


def _processor(
    encoder: Any,
    found: Architecture,
    release: Release,
    file: str,
    size: int | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> BitImageProcessor:
    """Return the image processor of the authors' evaluation: resize, crop of the center, normalize."""
    if size is not None and (size < 1 or found.image_size not in (None, size)):
        expected = found.image_size or "a positive number of pixels"
        raise UserError(f"--size: expected {expected} for {found.name}, got {size}; leave it out")
    channels, side = input_channels(encoder.config), size or found.image_size or IMAGE_SIZE
    given: dict[str, Sequence[float]] = {}
    for name, values in (("mean", mean or release.mean), ("std", std or release.std)):
        if values is None:
            raise UserError(
                f"--{name}: expected the normalization, which files of {release.title} do not contain, got "
                f"none; keep its config.json beside the file, or add --{name} 0.5,0.5,0.5 with its numbers"
            )
        given[name] = values
        if name == "mean" and any(value > 1 for value in values):
            raise UserError(
                f"--mean: expected numbers for pixels from 0 to 1, got {list(values)}; divide --mean and "
                "--std by 255"
            )
        valid = all(value > 0 or name == "mean" for value in values) and all(map(math.isfinite, values))
        if len(values) != channels or not valid:
            numbers = counted(channels, "positive number" if name == "std" else "number")
            raise UserError(
                f"--{name}: expected {numbers}, one for each channel, got {list(values)}; "
                f"use --{name} {','.join(['0.5'] * channels)} or the values of the training"
            )
    preset = {
        "size": side,
        "interpolation": release.interpolation,
        **{key: list(v) for key, v in given.items()},
    }
    processor = image_processor(preset, channels)
    resized = side * release.resized.get(file, RESIZED) / IMAGE_SIZE
    processor.size = {"shortest_edge": math.floor(round(resized, 6))}  # as timm does for other crops
    return processor


def _encoder_facts(encoder: Any, found: Architecture, processor: BitImageProcessor) -> EncoderFacts:
    side, channels = processor.crop_size["height"], input_channels(encoder.config)
    outputs: Any = copy_without_values(encoder)(torch.empty(1, channels, side, side, device="meta"))
    return EncoderFacts(
        architecture=found.name,
        class_name=type(encoder).__name__,
        parameters=sum(parameter.numel() for parameter in encoder.parameters()),
        feature_size=feature_size(encoder),
        image_size=side,
        channels=channels,
        pooling=pooling_rule(encoder, outputs),
        parts=None,
    )


def summary(facts: ConversionFacts) -> list[str]:
    """Return sentences about a conversion, for the terminal."""
    encoder, source = facts["backbone"], facts["source"]
    parts = [
        f"{place} ({counted(number, 'tensor')})" if number else place
        for place, number in facts["not_converted"].items()
    ]
    return [
        f"{encoder['architecture']} of {facts['title']}: {encoder['class_name']} with "
        f"{encoder['parameters']:,} parameters, from {source['place'] or 'the whole file'}",
        f"not converted: {', '.join(parts) or 'nothing'}",
        *facts["notes"],
    ]
