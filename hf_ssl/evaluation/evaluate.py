# SPDX-License-Identifier: Apache-2.0
"""Evaluates an encoder by the protocols of `PROTOCOLS`, in the same way for all encoders."""

import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from hf_ssl.data import DataConfig, LabeledImages, label_data
from hf_ssl.errors import UserError, counted
from hf_ssl.evaluation.config import EvaluationConfig, main_knn
from hf_ssl.evaluation.encoders import (
    chosen_precision,
    device_of,
    fastest_device,
    first_output,
    inspect_encoder,
    load_encoder,
    load_processor,
)
from hf_ssl.evaluation.feature_cache import cached_features
from hf_ssl.evaluation.features import PatchGrid, raw_pixels
from hf_ssl.evaluation.inputs import Inputs, LabeledData, Split, has_several_labels, read_split
from hf_ssl.evaluation.knn import check_classes, knn_accuracy
from hf_ssl.evaluation.protocols import PROTOCOLS, label_kinds, load_protocol
from hf_ssl.evaluation.results import EncoderResult, ProtocolResult
from hf_ssl.evaluation.split_report import report_comparison, unknown_classes
from hf_ssl.evaluation.statistics import feature_statistics
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.image_encoders import image_encoder
from hf_ssl.modeling.loading import load_weights
from hf_ssl.modeling.pooling import POOLED, Pooling, declared_patch_grid
from hf_ssl.precision import autocast_dtype
from hf_ssl.progress import notice
from hf_ssl.views import ViewPreset


def evaluate_encoder(
    model: nn.Module | str | PathLike,
    train: Any,
    test: Any,
    config: EvaluationConfig | dict[str, Any] | None = None,
    processor: Any = None,
    *,
    data: DataConfig | dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    description: str | None = None,
    preset: ViewPreset | None = None,
) -> EncoderResult:
    """Return the result of a frozen encoder by the protocols of the settings, and its feature statistics.

    Args:
        model: an encoder of transformers; the model of a method, whose exported encoder is evaluated; or the
            folder or Hub id of an encoder, which is loaded onto the accelerator if there is one.
        train, test: labeled images, in the forms of `hf_ssl.data.as_source`: a `Dataset`, a torch data set of
            (image, label), the path of a folder; or `LabeledData`. The labels of `test` select no setting.
        config: settings of the evaluation, or a dict of them. The function checks them. None: the defaults.
        processor: the image processor of the encoder, or its folder or Hub id; None loads the one beside the
            files of the encoder.
        data: how the images are read (`image_column`, `label_column`, `channels`, ...); can be a dict.
        device: device of the computation; None: the device of the encoder.
        description: text of the progress bars; None: no bars.
        preset: the augmentation of the training, for protocols that augment images; None: not known.

    Returns:
        An `EncoderResult`, which JSON can store.

    Raises:
        UserError: an argument has a wrong type, a setting, the labels or the features are invalid, or the
            encoder cannot be loaded or does not accept the images.
    """
    if isinstance(train, BaseImageProcessor):  # the order of arguments before data sets were accepted
        warnings.warn("evaluate_encoder: use the order model, train, test", FutureWarning, stacklevel=2)
        train, test, config, processor = config, processor, test, train
    config, data = EvaluationConfig.of(config), DataConfig.of(data)
    if isinstance(model, str | PathLike):
        if processor is None:
            model, processor = load_encoder(str(model))
        else:
            model = load_weights(str(model))
        device = fastest_device() if device is None else device
    elif isinstance(model, SSLPreTrainedModel):
        model = model.exported_encoder
    model = cast(nn.Module, image_encoder(model))
    device = device_of(model, device)
    processor = load_processor(processor, model)
    for name in config.protocols:  # before the images are read
        if (require_packages := getattr(load_protocol(name), "require_packages", None)) is not None:
            require_packages()
    train, test = _labeled(train, test, config, data)
    precision = chosen_precision(config, model, device)
    if isinstance(train, LabeledImages):
        check_protocols(config, train.kinds)
    seconds: dict[str, float] = {}
    rule, size, further = inspect_encoder(model, processor, test.iter_batches(1), device)
    # `config.check` has checked this value. The cast is necessary because OmegaConf does not support Literal.
    pooling = rule if config.pooling == "auto" else cast(Pooling, config.pooling)
    compared = ["cls", "mean"] if config.compare_poolings and "cls" in further else []
    requested = [name for name in requested_features(config) if name in further]
    encoders: dict[nn.Module, list[str]] = {model: list(dict.fromkeys([pooling, *compared, *requested]))}
    skipped: list[str] = []
    if patch_grid := declared_patch_grid(model) if config.patch_grid is None else config.patch_grid:
        patch, stride = patch_grid
        grid_encoder = PatchGrid(model, patch, stride, pooling)
        try:  # before the features are extracted, which may take long
            first_output(grid_encoder, processor, next(iter(test.iter_batches(1))), device)
            encoders[grid_encoder] = ["pooler"]
        except UserError as error:
            if config.patch_grid is not None:
                raise
            skipped = [str(error)]  # the image processor is not that of the encoder
    splits = {"train": train, "test": test}
    with _timed(seconds, "features"):
        (bank, queries), *of_grid = (
            cached_features(config, encoder, processor, splits, poolings, precision, device, description)
            for encoder, poolings in encoders.items()
        )
    inputs = _inputs(
        config, bank[pooling], train.labels, queries[pooling], test.labels, device, description,
        reported=_are_reported(train, test),
    )  # fmt: skip
    inputs.encoder, inputs.processor, inputs.dtype = model, processor, autocast_dtype(precision)
    inputs.batch_size, inputs.skipped, inputs.pooling = config.batch_size, skipped, pooling
    inputs.preset, inputs.image_size = preset, size
    inputs.channels = len(next(iter(test.iter_batches(1)))[0])
    inputs.train.further = {name: bank[name] for name in requested}
    inputs.test.further = {name: queries[name] for name in requested}
    inputs.train.images, inputs.test.images = train, test
    for split in (inputs.train, inputs.test):
        split.targets = getattr(split.images, "targets", {})  # not in all implementations of `LabeledData`
    result = _run(config, inputs)
    result["seconds"] = seconds | result["seconds"]
    result["precision"], result["pooling"], result["image_size"] = precision, pooling, size
    shown: dict[str, list[Tensor]] = {name: [bank[name], queries[name]] for name in compared}
    for grid in of_grid:
        shown["image"] = [bank[pooling], queries[pooling]]
        shown["grid"] = [features["pooler"] for features in grid]
    if shown:
        k, temperature = main_knn(config.of_protocol("knn"), len(train))
        result["pooling_neighbors"] = k
        result["poolings"] = {
            name: knn_accuracy(
                train_features,
                train.labels,
                test_features,
                test.labels,
                neighbors=[k],
                temperatures=[temperature],
                device=device,
            )[k, temperature]
            for name, (train_features, test_features) in shown.items()
        }
    result["features"] = (
        f"{POOLED[pooling]}, {result['feature_size']} numbers, images of {size} pixels, {precision}"
    )
    result["revision"] = getattr(test, "revision", None)
    return result


def evaluate_pixels(
    config: EvaluationConfig | dict[str, Any] | None,
    train: Any,
    test: Any,
    data: DataConfig | dict[str, Any] | None = None,
) -> EncoderResult:
    """Return the result of raw pixels (`raw_pixels`) by the protocols for which this makes sense.

    Arguments and errors are those of `evaluate_encoder`.
    """
    config = EvaluationConfig.of(config)
    train, test = _labeled(train, test, config, DataConfig.of(data))
    seconds: dict[str, float] = {}
    with _timed(seconds, "features"):
        bank, queries = (
            raw_pixels(
                images.iter_batches(config.batch_size),
                config.raw_pixel_size,
                total=len(images),
                description=f"raw pixels, {part} features",
            )
            for part, images in (("train", train), ("test", test))
        )
    names = [name for name in config.protocols if PROTOCOLS[name].of_pixels]
    reported = _are_reported(train, test)
    inputs = _inputs(
        config, bank, train.labels, queries, test.labels, description="raw pixels", reported=reported
    )
    result = _run(replace(config, protocols=names), inputs)
    result["seconds"] = seconds | result["seconds"]
    side = config.raw_pixel_size
    result["features"] = f"images resized to {side} x {side} pixels, minus the mean of each image"
    result["revision"] = getattr(test, "revision", None)
    return result


def evaluate_features(
    config: EvaluationConfig | dict[str, Any] | None,
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    *,
    device: torch.device | str | None = None,
    description: str | None = None,
) -> EncoderResult:
    """Return the result of given features by the protocols of the settings.

    The result omits default values of k above M, and numbers of labels above the size of the smallest class.
    It lists them in `skipped`.

    Args:
        config: settings of the evaluation, or a dict of them.
        train_features, train_labels: (M, D) float32 and (M,).
        test_features, test_labels: (N, D) float32 and (N,).
        device: device of the computation; None: the device of the features.
        description: first text of the progress bars; None: no bars.

    Raises:
        UserError: a split has fewer than 2 images, or the labels, the features or a setting are invalid.
    """
    config = EvaluationConfig.of(config)
    check_protocols(config, {"several" if has_several_labels(train_labels) else "one"})
    data = (train_features, train_labels, test_features, test_labels)
    return _run(config, _inputs(config, *data, device, description))


def _inputs(
    config: EvaluationConfig,
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    device: torch.device | str | None = None,
    description: str | None = None,
    *,
    reported: bool = False,
) -> Inputs:
    """Return the checked inputs of all protocols; the arguments are those of `evaluate_features`.

    `reported`: whether images with an unknown class were already reported.
    """
    train = read_split(train_features, train_labels, config.split_names[0], "train")
    test = read_split(test_features, test_labels, config.split_names[1], "test", train.features.shape[1])
    if has_several_labels(train.labels) != has_several_labels(test.labels):
        raise UserError("labels: expected several labels of the images in both splits, or in none")
    if not has_several_labels(train.labels):
        check_classes(train.labels, f"evaluation, split {train.name!r}")
        _check_shared_classes(train, test, reported)
    elif train.labels.shape[1] != test.labels.shape[1]:
        both = train.labels.shape[1], test.labels.shape[1]
        raise UserError(f"labels: expected {both[0]} classes in split {test.name}, got {both[1]}")
    device = test.features.device if device is None else torch.device(device)
    return Inputs(train, test, device, config.seed, description)


def _check_shared_classes(train: Split, test: Split, reported: bool) -> None:
    """Report test images whose class has no training image, or raise UserError if these are all of them."""
    unknown = int((~torch.isin(test.labels, train.labels)).sum())
    if unknown == len(test):
        raise UserError(
            f"evaluation: expected classes of the training images in split {test.name!r}, got other classes "
            f"for all {counted(unknown, 'image')}; if the images are sorted by class, use other splits"
        )
    if unknown and not reported:
        names = f"split {test.name!r}", f"split {train.name!r}"
        notice(unknown_classes("evaluation", unknown, len(test), *names))


def _run(config: EvaluationConfig, inputs: Inputs) -> EncoderResult:
    """Return the result of the protocols of checked settings, which may have no protocol.

    The result names a protocol that raises UserError in `skipped`, and contains the numbers of the others. If
    there are no others, the error is raised.
    """
    train, test = inputs.train, inputs.test
    kinds = train.kinds & test.kinds
    results: list[ProtocolResult] = []
    errors: list[UserError] = []
    for name, protocol in PROTOCOLS.items():
        if name not in config.protocols:
            continue
        if protocol.needs_encoder and inputs.encoder is None:
            inputs.skipped.append(f"{protocol.title}: it needs an encoder, and only features were given")
            continue
        if not kinds & set(protocol.labels):
            inputs.skipped.append(f"{protocol.title}: it needs images with {_words(protocol.labels)}")
            continue
        try:
            with _timed(inputs.seconds, name):
                results += load_protocol(name).run(inputs, config.of_protocol(name))
        except UserError as error:  # for example too few images; the other protocols are measured
            inputs.skipped.append(f"{protocol.title}: {error}")
            errors.append(error)
    if errors and not results:
        raise errors[0]
    result = EncoderResult(
        protocols=results,
        features=f"{train.features.shape[1]} numbers",
        images={"train": len(train), "test": len(test)},
        revision=None,
        classes=int(torch.cat([train.labels, test.labels]).unique().numel())
        if train.labels.ndim == 1
        else train.labels.shape[1],
        feature_size=train.features.shape[1],
        skipped=inputs.skipped,
        statistics=feature_statistics(test.features),
        seconds=inputs.seconds,
    )
    if inputs.quality is not None:
        result["quality"] = inputs.quality
    return result


def _words(kinds: Iterable[str]) -> str:
    """Return a text for kinds of labels, such as "one label or masks"."""
    words = {"one": "one label", "several": "several labels"}
    return " or ".join(words.get(kind, kind) for kind in kinds)


def check_protocols(config: EvaluationConfig, kinds: set[str]) -> None:
    """Raise UserError if no protocol of the settings accepts images with these kinds of labels."""
    if kinds & set(label_kinds(config.protocols)):
        return
    names = [name for name, protocol in PROTOCOLS.items() if kinds & set(protocol.labels)]
    advice = next((name for name in ("knn", "multi_label", *names[-1:]) if name in names), "knn")
    advice = f"use evaluation.protocols=[{advice}]"
    if "boxes" in label_kinds(config.protocols):
        advice += ", or data.label_column=NAME for a column of boxes"
    raise UserError(
        f"evaluation.protocols: expected one of {', '.join(names)} for images with "
        f"{_words(sorted(kinds))}, got {', '.join(config.protocols)}; {advice}"
    )


def requested_features(config: EvaluationConfig) -> list[str]:
    """Return the names of the further features that the protocols of the settings need."""
    names: list[str] = []
    for name in config.protocols:
        features = getattr(load_protocol(name), "features", None)
        if features is not None:
            names += features(config.of_protocol(name))
    return names


def _labeled(
    train: Any, test: Any, config: EvaluationConfig, data: DataConfig
) -> tuple[LabeledData, LabeledData]:
    """Return the labeled images of both splits, with the same numbers of classes."""
    data = replace(config, path=None).data(data)  # the images are given, so `path` has no effect
    kinds = label_kinds(config.protocols)
    if not hasattr(train, "iter_batches"):
        train = label_data(train, data, "train", config.max_train_images, kinds)
    if not hasattr(test, "iter_batches"):
        if data.value_range == "auto" and isinstance(train, LabeledImages):
            data = replace(data, value_range=train.value_range)
        test = label_data(test, data, "test", config.max_test_images, kinds)
    if isinstance(train, LabeledImages) and isinstance(test, LabeledImages):
        test.classified_by(train)
        report_comparison("evaluation", train, test)
    return train, test


def _are_reported(train: LabeledData, test: LabeledData) -> bool:
    """Return whether `_labeled` has compared the classes and contents of the images."""
    return isinstance(train, LabeledImages) and isinstance(test, LabeledImages)


@contextmanager
def _timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[key] = round(time.perf_counter() - start, 2)
