# SPDX-License-Identifier: Apache-2.0
"""The evaluation protocol, which is the same for all encoders, and its descriptions for the model card."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor

from hf_ssl.data import DataConfig, LabeledImages, label_data
from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import MAIN_KNN, EncoderResult, EvaluationConfig, KnnResult, usable_neighbors
from hf_ssl.evaluation.features import (
    PatchGrid,
    device_of,
    dtype_of,
    extract_poolings,
    fastest_device,
    first_output,
    inspect_encoder,
    load_encoder,
    load_processor,
    raw_pixels,
)
from hf_ssl.evaluation.knn import as_features, as_labels, few_label_knn, knn_accuracy
from hf_ssl.evaluation.linear import HELD_OUT, MOMENTUM, linear_probe
from hf_ssl.evaluation.statistics import feature_statistics
from hf_ssl.modeling.backbones import load_weights
from hf_ssl.modeling.base import SSLPreTrainedModel
from hf_ssl.modeling.pooling import Pooling, declared_patch_grid
from hf_ssl.precision import DTYPES, fastest_precision
from hf_ssl.progress import progress


class LabeledData(Protocol):
    """Interface of the data of an evaluation; `hf_ssl.data.labeled_images` implements it.

    The evaluation reads the labels after the images, because a broken image also removes its label.
    """

    @property
    def labels(self) -> Any:
        """Return the class numbers, int64 (N,)."""

    def __len__(self) -> int: ...

    def iter_batches(self, batch_size: int) -> Iterable[list[Tensor]]:
        """Return batches, which are lists of uint8 tensors (C, H, W)."""


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
) -> EncoderResult:
    """Return the result of a frozen encoder: weighted k-NN, few labels, linear probe and feature statistics.

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
    device = device_of(model, device)
    processor = load_processor(processor, model)
    train, test = _labeled(train, test, config, data)
    precision, weights = config.precision, str(dtype_of(model)).removeprefix("torch.")
    if precision == "auto" and weights == "float32":
        precision = fastest_precision(device.type).name
    elif precision == "auto":  # an encoder without autocast computes in the type of its weights
        precision = weights
    elif weights not in (precision, "float32"):
        raise UserError(
            f"evaluation.precision: expected {weights}, the type of the weights, got {precision}; use auto"
        )
    seconds: dict[str, float] = {}
    rule, size, tokens = inspect_encoder(model, processor, test.iter_batches(1), device)
    # `config.check` has checked this value. The cast is necessary because OmegaConf does not support Literal.
    pooling = rule if config.pooling == "auto" else cast(Pooling, config.pooling)
    compared: list[Pooling] = ["cls", "mean"] if config.compare_poolings and tokens else []
    encoders: dict[nn.Module, list[Pooling]] = {model: list(dict.fromkeys([pooling, *compared]))}
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
    with _timed(seconds, "features"):
        (bank, queries), *of_grid = (
            [
                extract_poolings(
                    encoder,
                    processor,
                    images.iter_batches(config.batch_size),
                    poolings=poolings,
                    device=device,
                    dtype=DTYPES.get(precision),
                    total=len(images),
                    description=None if description is None else f"{description}, {part} features",
                )
                for part, images in (("train", train), ("test", test))
            ]
            for encoder, poolings in encoders.items()
        )
    result = evaluate_features(
        config,
        bank[pooling],
        train.labels,
        queries[pooling],
        test.labels,
        device=device,
        description=description,
    )
    result["seconds"], result["skipped"] = seconds | result["seconds"], result["skipped"] + skipped
    result["precision"], result["pooling"], result["image_size"] = precision, pooling, size
    shown: dict[str, list[Tensor]] = {name: [bank[name], queries[name]] for name in compared}
    for grid in of_grid:
        shown["image"] = [bank[pooling], queries[pooling]]
        shown["grid"] = [features["pooler"] for features in grid]
    if shown:
        k, temperature = result["knn"]["neighbors"], result["knn"]["temperature"]
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
    words = {"pooler": "pooler_output", "cls": "the class token", "mean": "the mean of all tokens"}[pooling]
    result["protocol"]["features"] = (
        f"{words}, {result['feature_size']} numbers, images of {size} pixels, {precision}"
    )
    return result


def evaluate_pixels(
    config: EvaluationConfig | dict[str, Any] | None,
    train: Any,
    test: Any,
    data: DataConfig | dict[str, Any] | None = None,
) -> EncoderResult:
    """Return the result of raw pixels (`raw_pixels`) by the same protocol, without the linear probe.

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
    result = evaluate_features(
        config, bank, train.labels, queries, test.labels, linear=False, description="raw pixels"
    )
    result["seconds"] = seconds | result["seconds"]
    side = config.raw_pixel_size
    result["protocol"]["features"] = f"images resized to {side} x {side} pixels, minus the mean of each image"
    return result


def evaluate_features(
    config: EvaluationConfig,
    train_features: Tensor,
    train_labels: Any,
    test_features: Tensor,
    test_labels: Any,
    *,
    device: torch.device | str | None = None,
    linear: bool = True,
    description: str | None = None,
) -> EncoderResult:
    """Return the result of the protocol for given features.

    The result omits values of k above M, and numbers of labels above the size of the smallest class. It lists
    them in `skipped`.

    Args:
        config: settings of the evaluation, or a dict of them.
        train_features, train_labels: (M, D) float32 and (M,).
        test_features, test_labels: (N, D) float32 and (N,).
        device: device of the computation; None: the device of the features.
        linear: whether to train the linear probe if `config.linear` is set.
        description: first text of the progress bars; None: no bars.

    Raises:
        UserError: a split has fewer than 2 images, or the labels or the features are invalid.
    """
    config = EvaluationConfig.of(config)
    train_features, test_features = as_features(train_features, "train"), as_features(test_features, "test")
    bank_labels = as_labels(train_labels, len(train_features), f"evaluation, split {config.train_split!r}")
    query_labels = as_labels(test_labels, len(test_features), f"evaluation, split {config.test_split!r}")
    bank, queries = len(train_features), len(test_features)
    if min(bank, queries) < 2:
        raise UserError(f"evaluation: expected at least 2 images in each split, got {bank} and {queries}")
    data = (train_features, bank_labels, test_features, query_labels)
    smallest = int(bank_labels.bincount()[bank_labels.unique()].min())
    counts = usable_neighbors(config.neighbors, bank)
    few = [n for n in config.few_labels if n <= smallest]
    skipped = [f"{k}-NN: the bank has {bank} images" for k in config.neighbors if k > bank]
    skipped += [
        f"{n} labels a class: the smallest class has {smallest}" for n in config.few_labels if n > smallest
    ]

    seconds: dict[str, float] = {}
    with _timed(seconds, "knn"), _progress_bar(description, "k-NN"):
        grid = knn_accuracy(*data, neighbors=counts, temperatures=config.temperatures, device=device)
    with _timed(seconds, "few_labels"), _progress_bar(description, "few labels"):
        draws = [
            few_label_knn(*data, labels_per_class=n, draws=config.draws, seed=config.seed, device=device)
            for n in few
        ]
    probe = None
    epochs = 2 * config.linear_epochs  # first with all learning rates, then with the best one
    with _timed(seconds, "linear"), _progress_bar(description, "linear probe", epochs, "epoch") as bar:
        if config.linear and linear:
            probe = _linear(config, *data, device=device, advance=bar.update)
    main = _main_setting(grid)
    k, temperature = main
    return EncoderResult(
        protocol=_describe(config, main, probe, few, bank, queries),
        images={"train": bank, "test": queries},
        classes=int(torch.cat([bank_labels, query_labels]).unique().numel()),
        feature_size=train_features.shape[1],
        knn=KnnResult(
            neighbors=k,
            temperature=temperature,
            accuracy=grid[main],
            grid=[{"neighbors": k, "temperature": t, "accuracy": value} for (k, t), value in grid.items()],
        ),
        linear=probe,
        few_labels=[dict(draw._asdict()) for draw in draws],
        skipped=skipped,
        statistics=feature_statistics(test_features),
        seconds=seconds,
    )


def _progress_bar(description: str | None, part: str, total: int | None = None, unit: str = "image") -> Any:
    """Return a progress bar for a part of the evaluation, which shows nothing without a description."""
    return progress(None if description is None else f"{description}, {part}", total, unit=unit)


def _linear(
    config: EvaluationConfig,
    *data: Tensor,
    device: torch.device | str | None,
    advance: Callable[[int], object],
) -> dict[str, Any]:
    probe = linear_probe(
        *data,
        learning_rates=config.learning_rates,
        epochs=config.linear_epochs,
        batch_size=config.linear_batch_size,
        standardize=config.linear_standardize,
        seed=config.seed,
        device=device,
        advance=advance,
    )
    # Keys in JSON must be strings.
    return probe._asdict() | {"validation": {str(rate): value for rate, value in probe.validation.items()}}


def _main_setting(grid: dict[tuple[int, float], float]) -> tuple[int, float]:
    """Return the main k and T, which are chosen independently.

    k is the largest measured one up to 20, or the smallest one if all are above 20. T is 0.07 if it was
    measured, otherwise the first one.
    """
    counts = sorted({k for k, _ in grid})
    temperatures = [temperature for _, temperature in grid]
    below = [k for k in counts if k <= MAIN_KNN[0]]
    temperature = MAIN_KNN[1] if MAIN_KNN[1] in temperatures else temperatures[0]
    return below[-1] if below else counts[0], temperature


def _describe(
    config: EvaluationConfig,
    main: tuple[int, float],
    probe: dict[str, Any] | None,
    few: list[int],
    bank: int,
    queries: int,
) -> dict[str, str]:
    """Return a description of each measurement for the text and the metadata of the card."""
    train = f"{bank:,} images of split {config.train_split}"
    test = f"{queries:,} images of split {config.test_split}"
    k, temperature = main
    words = {
        "knn": f"{k}-NN by cosine similarity, votes weighted by exp(cosine / {temperature:g}), "
        f"bank: {train}, tested on {test}"
    }
    if few:
        words["few_labels"] = (
            f"1-NN by cosine similarity among n labeled images a class, drawn at random from the {train}: "
            f"mean and standard deviation of {config.draws} draws (seed {config.seed}), tested on {test}"
        )
    if probe is not None:
        rates = sorted(config.learning_rates)
        state = "standardized" if config.linear_standardize else "not standardized"
        edge = " (at the edge of the sweep)" if probe["at_edge"] else ""
        words["linear"] = (
            f"softmax regression on frozen features, {state}, without augmentation. Optimizer: SGD, momentum "
            f"{MOMENTUM:g}, no weight decay, {probe['epochs']} epochs, batch size {probe['batch_size']}, "
            f"cosine schedule. The learning rate {probe['learning_rate']:g}{edge} had the highest accuracy "
            f"on a held-out {100 * HELD_OUT:g} % of the training images ({len(rates)} tested, {rates[0]:g} "
            f"to {rates[-1]:g}). The final classifier was trained on all {train} and tested on {test}"
        )
    return words


def _labeled(
    train: Any, test: Any, config: EvaluationConfig, data: DataConfig
) -> tuple[LabeledData, LabeledData]:
    """Return the labeled images of both splits, with the same numbers of classes."""
    data = replace(data, label_column=config.label_column or data.label_column)
    if not hasattr(train, "iter_batches"):
        train = label_data(train, data, "train", config.max_train_images)
    if not hasattr(test, "iter_batches"):
        test = label_data(test, data, "test", config.max_test_images)
    if isinstance(train, LabeledImages) and isinstance(test, LabeledImages):
        test.classified_by(train)
    return train, test


@contextmanager
def _timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[key] = round(time.perf_counter() - start, 2)
