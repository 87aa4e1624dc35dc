# SPDX-License-Identifier: Apache-2.0
"""Segmentation with a linear head: its numbers against loops and other code, and its errors."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image
from messages import mentions
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitImageProcessor, MobileViTImageProcessor, ViTConfig, ViTImageProcessor, ViTModel

import hf_ssl.run
from hf_ssl.building import open_labeled_splits
from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, evaluate_encoder
from hf_ssl.evaluation.augmented import crop_and_flip
from hf_ssl.evaluation.dense import SquareProcessor, nearest_pixels
from hf_ssl.evaluation.segmentation import (
    VOID,
    WEIGHT_DECAY,
    Heads,
    class_iou,
    mean_iou,
    pixel_counts,
    token_statistics,
    train_heads,
)

PROCESSOR = BitImageProcessor(
    size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, resample=2,
    image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4],
)  # fmt: skip
COLORS = torch.tensor([[20, 20, 20], [220, 40, 40], [40, 220, 40], [40, 40, 220]])


class Pooled(nn.Module):
    """An encoder whose features are the mean colors of patches of 2 x 2 pixels, and the class of nothing."""

    def __init__(self, tokens: bool = True) -> None:
        super().__init__()
        self.tokens, self.scale = tokens, nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        features = F.avg_pool2d(pixel_values, 2) * self.scale
        pooled = features.mean(dim=(2, 3))
        return {"last_hidden_state": features} if self.tokens else {"pooler_output": pooled}


def shapes(count: int, seed: int) -> Dataset:
    """Colored rectangles on a dark background, 12 x 16 or 16 x 12 pixels, with noise and masks.

    The class numbers have a gap. A column of pixels with the color of class 1 has the number 255.
    """
    random, images, masks = np.random.default_rng(seed), [], []
    for number in range(count):
        height, width = (12, 16) if number % 2 else (16, 12)
        classes = np.zeros((height, width), np.int64)
        for label in random.permutation([1, 2, 3]):
            top, left = random.integers(0, height - 5), random.integers(0, width - 5)
            classes[top : top + 5, left : left + 5] = label
        classes[:, 0] = 1
        colors = COLORS.numpy()[classes] + random.normal(0, 12, (height, width, 3))
        images.append(PIL.Image.fromarray(colors.clip(0, 255).astype(np.uint8)))
        numbers = np.array([0, 1, 2, 7])[classes]
        numbers[:, 0] = 255
        masks.append(PIL.Image.fromarray(numbers.astype(np.uint8)))
    return Dataset.from_dict(
        {"image": images, "mask": masks}, features=Features({"image": Image(), "mask": Image()})
    )


def run(train: Any, test: Any, encoder: Any = None, **settings: Any) -> Any:
    config = {
        "protocols": ["segmentation"],
        "cache": False,
        "settings": {"segmentation": {"epochs": 8, "learning_rates": [0.01, 0.1]} | settings},
    }
    return evaluate_encoder(encoder or Pooled(), train, test, config, PROCESSOR)["protocols"][0]


@pytest.fixture(scope="module")
def data() -> tuple[Dataset, Dataset]:
    return shapes(40, 0), shapes(20, 1)


def test_colors_are_segmented(data) -> None:
    """Patches of 2 pixels limit the accuracy at the edges; larger images have more patches."""
    result = run(*data)
    assert result["value"] > 0.6 and result["metrics"]["pixel_accuracy"] > 0.85
    assert 0 < result["standard_error"] < 0.05
    assert list(result["details"]["class_iou"]) == ["0", "1", "2", "7"]
    assert np.mean(list(result["details"]["class_iou"].values())) == pytest.approx(result["value"])
    assert "16 x 16 pixels" in result["text"] and "8 x 8 frozen" in result["text"]
    fine = run(*data, size=32)
    assert fine["value"] > result["value"] + 0.05 and fine["id"] != result["id"]
    counted = run(*data, ignored=[])
    assert list(counted["details"]["class_iou"]) == ["0", "1", "2", "7", "255"]
    without = run(*data, ignored=[255, 0])
    assert list(without["details"]["class_iou"]) == ["1", "2", "7"] and without["value"] > 0.9


def test_the_command_reads_masks_if_a_protocol_needs_them(data, tmp_path) -> None:
    """Data without classes are an error for other protocols."""
    for name, split in zip(("train", "test"), data, strict=True):
        split.select(range(6)).to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    settings = DataConfig(path=str(tmp_path))
    config = EvaluationConfig(protocols=["knn", "segmentation"], max_train_images=4)
    train, test = open_labeled_splits(settings, config)
    assert [len(train.targets["masks"]), len(test.targets["masks"])] == [4, 6]
    assert train.targets["masks"][0].shape == train[0].shape[1:]
    with pytest.raises(UserError, match=mentions("data.label_column")):
        open_labeled_splits(settings, EvaluationConfig(protocols=["knn"]))
    with pytest.raises(UserError, match=mentions("evaluation.protocols", "segmentation", "knn")):
        evaluate_encoder(Pooled(), train, test, {"protocols": ["knn"], "cache": False}, PROCESSOR)


def test_the_command_also_measures_random_weights(data, tmp_path, monkeypatch) -> None:
    """Raw pixels are no baseline, because they have no patch tokens."""
    for name, split in zip(("train", "test"), data, strict=True):
        split.select(range(4)).to_parquet(tmp_path / f"{name}-00000-of-00001.parquet")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16,
        patch_size=4,
    )  # fmt: skip
    monkeypatch.setattr(hf_ssl.run, "load_encoder", lambda model: (ViTModel(config).eval(), PROCESSOR))
    settings = {"segmentation": {"epochs": 1, "learning_rates": [0.01]}}
    evaluation = EvaluationConfig(protocols=["segmentation"], settings=settings, cache=False)
    results = hf_ssl.run.evaluate("vit", DataConfig(path=str(tmp_path)), evaluation)
    assert list(results) == ["encoder", "untrained"]
    assert [len(each["protocols"]) for each in results.values()] == [1, 1]


def test_a_transformer_sees_larger_images(data) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16,
        patch_size=4, initializer_range=0.1,
    )  # fmt: skip
    result = run(*data, ViTModel(config), size=32)
    assert "8 x 8 frozen" in result["text"] and result["value"] > 0.4


def test_a_class_of_the_test_masks_alone_is_never_found(data) -> None:
    train, test = shapes(30, 0), data[1]
    train = train.map(lambda item: {"mask": PIL.Image.fromarray(np.array(item["mask"]) % 7)})
    assert run(train, test)["details"]["class_iou"]["7"] == 0


def test_the_intersection_over_union_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(6, 9, 5, generator=generator)
    heads = Heads(
        torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5,
        torch.randn(2, 5, 4, generator=generator), torch.randn(2, 4, generator=generator),
    )  # fmt: skip
    masks = [torch.randint(0, 3, (8 + row, 7), generator=generator) for row in range(6)]
    masks[2][:3] = VOID
    counts = pixel_counts(heads, tokens, iter(masks), 5)
    assert counts.shape == (6, 2, 3, 5) and counts[..., 4].sum() == 0
    for number in range(2):
        guesses, truths = [], []
        for token, mask in zip(tokens, masks, strict=True):
            rows = (token - heads.mean) / heads.deviation @ heads.weights[number] + heads.biases[number]
            logits = F.interpolate(rows.T.view(1, 4, 3, 3), mask.shape, mode="bilinear")[0]
            guesses.append(logits.argmax(0)[mask != VOID])
            truths.append(mask[mask != VOID])
        expected = jaccard_score(
            torch.cat(truths).numpy(), torch.cat(guesses).numpy(), average=None, labels=[0, 1, 2, 3]
        )
        total = counts[:, number].sum(dim=0)
        assert class_iou(total)[:4].numpy() == pytest.approx(expected)
        assert float(mean_iou(total)) == pytest.approx(expected.mean()), "class 4 does not count"


def test_heads_are_trained_as_one_after_the_other() -> None:
    """A head does not depend on other learning rates. It equals a loop with the optimizer of torch."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randn(10, 4, 3, generator=generator), torch.randint(0, 2, (10, 4, 4))
    targets[0], targets[1, 0, 0] = VOID, VOID
    rows = torch.tensor([0, 1, 2, 3, 4, 6, 7, 9])

    def train(rates: list[float]) -> Heads:
        order = torch.Generator().manual_seed(1)
        return train_heads(tokens, targets, 2, rates, 3, 5, order, rows, torch.device("cpu"))

    both, alone = train([0.01, 0.3]), train([0.3])
    torch.testing.assert_close(both.weights[1:], alone.weights)
    trained = tokens[rows].flatten(0, 1)
    mean, deviation = trained.mean(0), trained.std(0, correction=0)
    torch.testing.assert_close(token_statistics(tokens, rows), (mean, deviation))
    constant = token_statistics(torch.full((3, 4, 2), 7.1), torch.arange(3))
    assert constant[1].tolist() == [1, 1], "constant up to rounding"
    layer = nn.Conv2d(3, 2, 1)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.3, weight_decay=WEIGHT_DECAY)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    order = torch.Generator().manual_seed(1)
    for _ in range(3):
        for index in rows[torch.randperm(8, generator=order)].split(5):
            maps = ((tokens[index] - mean) / deviation).transpose(1, 2).unflatten(2, (2, 2))
            logits = F.interpolate(layer(maps), (4, 4), mode="bilinear")
            optimizer.zero_grad()
            F.cross_entropy(logits, targets[index], ignore_index=VOID).backward()
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(alone.weights[0], layer.weight[:, :, 0, 0].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone.biases[0], layer.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 5), (10, 6), (24, 14)])
def test_masks_are_resized_to_the_nearest_pixel(size) -> None:
    mask = torch.arange(70, dtype=torch.float32).view(10, 7)
    expected = F.interpolate(mask[None, None], size, mode="nearest-exact")[0, 0]
    assert torch.equal(nearest_pixels(mask, *size), expected)


def test_complete_images_become_squares_with_the_normalization_of_the_processor() -> None:
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    expected = PROCESSOR(list(images), return_tensors="pt", input_data_format="channels_first")
    found = SquareProcessor(PROCESSOR, 16)(list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, expected["pixel_values"])
    wide = SquareProcessor(PROCESSOR, 8)([images[0], images[0, :, :4]])["pixel_values"]
    assert wide.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    "other",
    [
        ViTImageProcessor(size={"height": 16, "width": 16}, do_rescale=False),
        ViTImageProcessor(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5),
        MobileViTImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ],
    ids=["not scaled", "scaled to 2", "BGR"],
)
def test_a_processor_with_other_values_of_pixels_is_an_error(other) -> None:
    """The square images would have other values than the encoder expects."""
    images = list(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8))
    for build in (
        lambda: SquareProcessor(other, 16)(images),
        lambda: crop_and_flip(other, Batches(images), 0.2, 0.5),
    ):
        with pytest.raises(UserError, match=mentions("processor", type(other).__name__)) as error:
            build()
        assert len(str(error.value)) < 300
    gray = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.5], image_std=[0.25])
    pixels = SquareProcessor(gray, 8)([image[:1] for image in images])["pixel_values"]
    assert pixels.shape == (2, 1, 8, 8)


def test_random_crops_need_square_images() -> None:
    """Before, a convolutional network was trained with square crops and tested with other shapes."""
    wide = ViTImageProcessor(size={"height": 16, "width": 32})
    images = Batches([torch.zeros(3, 20, 20, dtype=torch.uint8)])
    with pytest.raises(UserError, match=mentions("processor", "16 x 32")):
        crop_and_flip(wide, images, 0.2, 0.5)


class Batches(list[torch.Tensor]):
    """Images with the method `iter_batches` of `LabeledImages`."""

    def iter_batches(self, batch_size: int) -> Iterator[list[torch.Tensor]]:
        yield self[:batch_size]


def test_mistakes_are_one_sentence(data) -> None:
    train, test = data
    small = test.map(
        lambda item, row: {"mask": item["mask"].resize((5, 5))} if row == 3 else {}, with_indices=True
    )
    ignored = test.map(lambda item: {"mask": PIL.Image.new("L", item["mask"].size, 255)})
    cases = [
        ((train, small, None, {}), ["data.mask_column", "5 x 5", "12 x 16", "image 3", "test"]),
        ((train, test, None, {"classes": 3}), [3, 7, "train"]),
        ((train, test, None, {"ignored": [0, 1, 2, 255]}), [7, 255, "segmentation"]),
        ((train, ignored, None, {}), ["segmentation", "pixels that count", "test", 255]),
        ((train, test, None, {"ignored": [256]}), ["evaluation.settings.segmentation.ignored", 256]),
        ((train, test, Pooled(tokens=False), {}), ["segmentation", "Pooled"]),
        ((train, test.remove_columns("mask"), None, {}), ["data.mask_column"]),
    ]
    for (first, second, encoder, settings), parts in cases:
        with pytest.raises(UserError, match=mentions(*parts)) as error:
            run(first, second, encoder, **settings)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
