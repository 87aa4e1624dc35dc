# SPDX-License-Identifier: Apache-2.0
"""Linear probe with crops and flips: in each epoch, the frozen encoder computes the features of new crops.

Legend: B images in a batch, D features, K classes, R learning rates trained simultaneously.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_ssl.errors import check_name, check_values, counted
from hf_ssl.evaluation.augmented import AugmentedImages, TrainBatch, crop_and_flip
from hf_ssl.evaluation.config import LEARNING_RATES, MOMENTUM, are_positive
from hf_ssl.evaluation.encoders import dtype_of, is_convolutional
from hf_ssl.evaluation.inputs import SELECTED_ON, Inputs, hold_out
from hf_ssl.evaluation.protocols.linear import logits
from hf_ssl.evaluation.results import ProtocolResult
from hf_ssl.evaluation.scores import EDGE, accuracy_result, by_setting, check_converged, is_at_edge, is_right
from hf_ssl.modeling.configuration import cosine_factor, size_arguments
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.gather import gather, process_count
from hf_ssl.modeling.lars import LARS
from hf_ssl.modeling.pooling import pool
from hf_ssl.precision import autocast

VERSION = 1


class Recipe(NamedTuple):
    """Published settings of SGD or LARS with momentum 0.9. `Config` explains the fields with the same names.

    Attributes:
        learning_rates: learning rates for batches of 256 images. They are proportional to the batch size.
        source: the paper, and the differences from it.
        drops: fractions of the training after which the learning rate is multiplied by `drop`; (): a cosine
            to zero.
        drop: see above.
        warmup: fraction of the training in which the learning rate rises from zero, before this schedule.
        lars: variant of LARS (`hf_ssl.modeling.lars.VARIANTS`); None for SGD.
        adapts_bias: whether LARS also adapts the learning rate of the bias, which then has weight decay.
        start: standard deviation of the initial weights; 0: zeros.
        batch_norm: whether a BatchNorm without gain and bias precedes the classifier.
    """

    learning_rates: tuple[float, ...]
    epochs: int
    source: str
    drops: tuple[float, ...] = ()
    nesterov: bool = False
    weight_decay: float = 0.0
    batch_size: int = 256
    drop: float = 0.1
    warmup: float = 0.0
    lars: str | None = None
    adapts_bias: bool = False
    start: float = 0.0
    batch_norm: bool = False


RECIPES = {
    "sweep": Recipe(LEARNING_RATES, 100, "MoCo, SwAV and DINO, with a sweep of the learning rate"),
    "simclr": Recipe(
        (0.1,), 90, "SimCLR, README, there with batches of 4,096 images", nesterov=True, weight_decay=1e-6
    ),
    "moco": Recipe((30.0,), 100, "MoCo v1 and v2, main_lincls.py", drops=(0.6, 0.8)),
    "moco_v3": Recipe((0.1,), 90, "MoCo v3, ResNet-50, main_lincls.py, there with batches of 1,024 images"),
    "moco_v3_vit": Recipe(
        (3.0,), 90, "MoCo v3, vision transformers, README, there with batches of 1,024 images"
    ),
    "simsiam": Recipe(
        (0.1,), 90, "SimSiam, main_lincls.py --lars", batch_size=4096, lars="larc", adapts_bias=True,
        start=0.01,
    ),
    "mae": Recipe(
        (0.1,), 90, "MAE, ViT-B, main_linprobe.py", batch_size=16384, warmup=10 / 90, lars="barlowtwins",
        start=0.01, batch_norm=True,
    ),
    "cmc": Recipe(
        (30.0,), 60, "CMC and PyContrast, ResNet-50, there also with crops of at least 20 %", drop=0.2,
        drops=(30 / 60, 40 / 60, 50 / 60),
    ),
    "vissl": Recipe(
        (0.01,), 28, "VISSL, eval_resnet_8gpu_transfer_in1k_linear.yaml", drops=(8 / 28, 16 / 28, 24 / 28),
        nesterov=True, weight_decay=5e-4, batch_norm=True,
    ),
    "byol": Recipe((0.2,), 80, "BYOL, configs/eval.py, there with batches of 1,024 images", nesterov=True),
    "swav": Recipe((0.3,), 100, "SwAV, eval_linear.py", weight_decay=1e-6),
    "barlow_twins": Recipe((0.3,), 100, "Barlow Twins, evaluate.py", weight_decay=1e-6),
    "vicreg": Recipe((0.02,), 100, "VICReg, README", weight_decay=1e-6),
    "dino": Recipe(
        (0.001,), 100,
        "DINO, eval_linear.py, there with batches of 1,024 images and the last 4 blocks of ViT-S",
    ),
}  # fmt: skip
"""Name -> published settings. Source: the code of the authors."""


@dataclass
class Config:
    """Settings. Those that are null have the value of the recipe.

    Attributes:
        recipe: a key of `RECIPES`.
        learning_rates: learning rates for this batch size, which are trained simultaneously.
        epochs: number of epochs.
        batch_size: number of images in a batch, at most the number of training images.
        smallest_crop: smallest fraction of the area of a random crop.
        flip: probability of a horizontal flip.
    """

    recipe: str = "sweep"
    learning_rates: list[float] | None = None
    epochs: int | None = None
    batch_size: int | None = None
    smallest_crop: float = 0.08
    flip: float = 0.5

    def check(self, where: str) -> None:
        """Raise UserError for a value outside of its range."""
        check_name(f"{where}.recipe", self.recipe, RECIPES, "a known recipe")
        rates = None if self.learning_rates is None else list(self.learning_rates)
        crop, size = self.smallest_crop, self.batch_size
        check_values(
            where,
            ("learning_rates", rates, rates is None or are_positive(rates), "one or more positive numbers"),
            ("epochs", self.epochs, self.epochs is None or self.epochs > 0, "a positive number"),
            ("batch_size", size, size is None or size > 0, "a positive number"),
            ("smallest_crop", crop, 0 < crop <= 1, "a number above 0, at most 1"),
            ("flip", self.flip, 0 <= self.flip <= 1, "a probability"),
        )


def run(inputs: Inputs, config: Config) -> list[ProtocolResult]:
    """Return the accuracy of the classifier with the selected learning rate."""
    recipe, train, test = RECIPES[config.recipe], inputs.train, inputs.test
    wanted = config.batch_size or recipe.batch_size
    epochs, size = config.epochs or recipe.epochs, min(wanted, len(train))
    given = config.learning_rates or [rate * size / 256 for rate in recipe.learning_rates]
    rates = sorted(set(given))
    heads, validation = _train(inputs, config, rates, epochs, wanted)
    best = max(rates, key=lambda rate: validation.get(rate, 0.0))
    scores = heads.logits(test.features.to(inputs.device))[:, rates.index(best)].cpu()
    check_converged(scores, best, "evaluation.settings.linear_augmented.learning_rates")
    at_edge = is_at_edge(rates, best)
    selected_on = SELECTED_ON if validation else None
    chosen = f"learning rate {best:g}"
    if validation:
        chosen += (
            f"{EDGE * at_edge}, which had the highest accuracy on a held-out "
            f"{selected_on} ({len(rates)} tested, {rates[0]:g} to {rates[-1]:g})"
        )
    drops = " and ".join(f"{100 * each:g} %" for each in recipe.drops)
    schedule = (
        f"learning rate times {recipe.drop:g} after {drops} of the steps" if drops else "cosine schedule"
    )
    schedule += f" after a warmup of {100 * recipe.warmup:.3g} % of the steps" * bool(recipe.warmup)
    optimizer = "SGD" if recipe.lars is None else f"LARS ({recipe.lars})"
    settings = asdict(config) | {"learning_rates": rates, "epochs": epochs, "batch_size": wanted}
    settings |= {"seed": inputs.seed}
    return [
        accuracy_result(
            "linear_augmented",
            VERSION,
            settings,
            scores,
            test.labels,
            key="linear_augmented",
            title="Accuracy of the linear probe with crops and flips",
            column="linear probe, crops",
            text=f"softmax regression on the frozen encoder{', after BatchNorm' * recipe.batch_norm}, recipe "
            f"{config.recipe} ({recipe.source}). Here: "
            f"random crops of at least {100 * config.smallest_crop:g} % of the area and flips with "
            f"probability {config.flip:g} in each epoch, {optimizer}, "
            f"{'Nesterov ' * recipe.nesterov}momentum {MOMENTUM:g}, weight decay {recipe.weight_decay:g}, "
            f"{counted(epochs, 'epoch')}, batch size {size}, "
            f"{schedule}, {chosen}. The tested classifier was trained on all {train} and tested on {test}",
            selection={"learning_rate": best} if validation else {},
            selected_on=selected_on,
            details={
                "at_edge": at_edge,
                "validation": by_setting(validation),
            },
        )
    ]


def _train(
    inputs: Inputs, config: Config, rates: list[float], epochs: int, batch_size: int
) -> tuple["Heads", dict[float, float]]:
    """Return classifiers that were trained on all images, and the accuracy of each rate on held-out images.

    Two classifiers are trained for each learning rate, on the same features: one with all images, and one
    without the held-out images. So the encoder computes each crop once. With one rate, nothing is held out.
    """
    train, device, recipe = inputs.train, inputs.device, RECIPES[config.recipe]
    preset = crop_and_flip(inputs.processor, train.images, config.smallest_crop, config.flip)
    images = AugmentedImages(train.images, preset, inputs.seed)
    loader = images.loader(np.arange(len(train)), batch_size, device)
    held_out = torch.zeros(len(train), dtype=torch.bool, device=device)
    if len(rates) > 1:
        held_out[hold_out(len(train), inputs.seed)[1].to(device)] = True
    labels, width = train.labels.to(device), train.features.shape[1]
    heads, partial = (Heads(width, inputs.classes, rates, recipe, device, inputs.seed) for _ in range(2))
    with inputs.progress("linear probe with crops", epochs, "epoch") as bar:
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for batch in loader:
                features, rows = encode_batch(inputs, batch)
                progress = batch.number / (epochs * len(loader))
                heads.step(features, labels[rows], progress)
                if len(rates) > 1:
                    kept = ~held_out[rows]
                    partial.step(features[kept], labels[rows[kept]], progress)
            bar.update(1)
    if len(rates) == 1:
        return heads, {}
    scores = partial.logits(train.features.to(device)[held_out])
    right = is_right(scores, labels[held_out][:, None])
    return heads, dict(zip(rates, right.double().mean(dim=0).tolist(), strict=True))


def encode_batch(inputs: Inputs, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Return the features (B, D) and the row numbers (B,) of a batch of all processes.

    Each process encodes its share. gather needs equal shapes, so a short share is filled with its first row.
    All shares before it are full, so the added rows are at the end. The encoder receives at most
    `inputs.batch_size` images at once.
    """
    encoder, device = inputs.encoder, inputs.device
    order = torch.channels_last if is_convolutional(encoder) else torch.contiguous_format
    with evaluation_mode(encoder):
        parts = []
        for part in batch.images.split(inputs.batch_size):
            pixels = part.views(device).pixel_values[:, 0].to(dtype_of(encoder), memory_format=order)
            with autocast(device, inputs.dtype):
                outputs = encoder(pixel_values=pixels, **size_arguments(encoder, pixels))
            parts.append(pool(outputs, inputs.pooling, encoder).float())
        features = torch.cat(parts)
        rows = batch.rows.to(device)
        missing = -(-batch.size // process_count()) - len(rows)
        if missing:
            features = torch.cat([features, features[:1].expand(missing, -1)])
            rows = torch.cat([rows, rows[:1].expand(missing)])
        return gather(features)[: batch.size], gather(rows)[: batch.size]


class Heads:
    """Linear classifiers for several learning rates, trained by SGD or LARS on the same batches.

    The gradient of the mean cross entropy with respect to the logits is (softmax - one hot) / B. All
    classifiers start with the same weights, and their biases with zero.

    Args:
        width, classes: D and K.
        rates: R initial learning rates.
        recipe: the other settings.
        device: device of the weights.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        rates: Sequence[float],
        recipe: Recipe,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        weights = torch.zeros(width + 1, len(rates), classes)  # the last row: biases
        if recipe.start:
            generator = torch.Generator().manual_seed(seed)
            weights[:-1] = recipe.start * torch.randn(width, 1, classes, generator=generator)
        self.weights = weights.to(device)
        self.velocity = torch.zeros_like(self.weights)
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False).to(device) if recipe.batch_norm else None
        self.initial_rates = list(rates)
        self.lars = None if recipe.lars is None else self._lars(recipe)
        self.rates = torch.tensor(rates, device=device, dtype=torch.float32)[None, :, None]
        self.recipe = recipe

    def _lars(self, recipe: Recipe) -> LARS:
        """Return an optimizer with two groups for each classifier: its weights and its bias."""
        groups = []
        for number, rate in enumerate(self.initial_rates):
            for rows, adapt in ((slice(None, -1), True), (-1, recipe.adapts_bias)):
                decay = recipe.weight_decay if adapt else 0.0
                part = self.weights[rows, number]
                groups.append({"params": [part], "lr": rate, "weight_decay": decay, "adapt": adapt})
        return LARS(groups, lr=0.0, momentum=MOMENTUM, variant=str(recipe.lars))

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits (B, R, K) of features (B, D). BatchNorm uses its running statistics."""
        return logits(self.weights, features if self.norm is None else self.norm.eval()(features))

    def step(self, features: Tensor, labels: Tensor, progress: float) -> None:
        """Update the weights.

        Args:
            features, labels: (B, D) and (B,), B >= 0.
            progress: the completed fraction of the training, which determines the learning rate.
        """
        if len(labels) < (1 if self.norm is None else 2):
            return
        if self.norm is not None:
            features = self.norm.train()(features)
        error = logits(self.weights, features).softmax(dim=2)
        target = labels[:, None, None].expand(-1, error.shape[1], 1)
        error = error.scatter_add(2, target, error.new_full(target.shape, -1.0)) / len(labels)
        gradient = torch.cat([torch.einsum("bd,brk->drk", features, error), error.sum(dim=0)[None]])
        if self.lars is not None:
            for number, group in enumerate(self.lars.param_groups):
                rows = -1 if number % 2 else slice(None, -1)
                group["params"][0].grad = gradient[rows, number // 2]
                group["lr"] = self.initial_rates[number // 2] * self.rate_scale(progress)
            self.lars.step()
            return
        if self.recipe.weight_decay:
            gradient += self.recipe.weight_decay * self.weights
        self.velocity = MOMENTUM * self.velocity + gradient
        change = gradient + MOMENTUM * self.velocity if self.recipe.nesterov else self.velocity
        self.weights = self.weights - self.rates * self.rate_scale(progress) * change

    def rate_scale(self, progress: float) -> float:
        """Return the learning rate as a fraction of the initial one."""
        if self.recipe.drops:
            return self.recipe.drop ** sum(progress >= each for each in self.recipe.drops)
        warmup = self.recipe.warmup
        if progress < warmup:
            return progress / warmup
        return cosine_factor(progress, 1, warmup)
