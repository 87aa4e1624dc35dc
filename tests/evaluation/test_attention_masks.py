# SPDX-License-Identifier: Apache-2.0
"""Masks from attention: the Jaccard index against a loop, the choice of the head, and the errors."""

from typing import Any

import pytest
import torch
from messages import mentions
from transformers import BitImageProcessor, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from hf_ssl.errors import UserError
from hf_ssl.evaluation import attention_maps, evaluate_encoder, threshold_attention
from hf_ssl.evaluation.dense import SquareProcessor
from hf_ssl.evaluation.protocols.attention_masks import Config, object_scores

PROCESSOR = BitImageProcessor(
    size={"shortest_edge": 16},
    crop_size={"height": 16, "width": 16},
    image_mean=[0.5] * 3,
    image_std=[0.2] * 3,
)


class Images:
    """Random images of several sizes with a bright square, which is class 1 or 2 of the mask."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images, masks = [], []
        for number in range(count):
            height, width = 16 + number % 3, 20
            image = torch.randint(0, 100, (3, height, width), generator=generator, dtype=torch.uint8)
            mask = torch.zeros(height, width, dtype=torch.uint8)
            top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
            image[:, top : top + 7, left : left + 7] += 150
            mask[top : top + 7, left : left + 7] = 1 + number % 2
            mask[:, -2:] = 255
            mask[-1, :9] = 2
            self.images.append(image)
            masks.append(mask)
        masks[0][:] = 0  # an image without an object
        self.targets = {"masks": masks}
        self.labels = torch.zeros(count, 0, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.images)

    def iter_batches(self, batch_size: int) -> Any:
        for first in range(0, len(self), batch_size):
            yield self.images[first : first + batch_size]


@pytest.fixture(scope="module")
def encoder() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16,
        patch_size=4, initializer_range=0.3,
    )  # fmt: skip
    return ViTModel(config).eval()


def run(encoder: Any, train: Images, test: Images, **settings: Any) -> list[Any]:
    config = {"protocols": ["attention_masks"], "cache": False, "settings": {"attention_masks": settings}}
    return evaluate_encoder(encoder, train, test, config, PROCESSOR)["protocols"]


def loop(encoder: Any, images: Images, objects: str, side: int = 16) -> list[list[list[float]]]:
    """The Jaccard index of each image with an object, its objects and the heads, pixel by pixel."""
    processor, found = SquareProcessor(PROCESSOR, side), []
    for image, mask in zip(images.images, images.targets["masks"], strict=True):
        maps = attention_maps(encoder, processor([image])["pixel_values"]).heads
        patches = threshold_attention(maps, 0.6)[0]
        classes = {int(value) for value in mask.unique()} - {0, 255}
        groups = [classes] if objects == "foreground" and classes else [{value} for value in sorted(classes)]
        height, width = mask.shape
        grid = patches.shape[-1]
        pixels = [(y, x) for y in range(height) for x in range(width) if mask[y, x] != 255]
        scores = []
        for group in groups:
            truth = {pixel for pixel in pixels if int(mask[pixel]) in group}
            guesses = [
                {
                    (y, x)
                    for y, x in pixels
                    if head[int((y + 0.5) * grid / height), int((x + 0.5) * grid / width)]
                }
                for head in patches
            ]
            scores.append([len(truth & guess) / len(truth | guess) for guess in guesses])
        if scores:
            found.append(scores)
    return found


@pytest.mark.parametrize("objects", ["foreground", "classes"])
def test_the_results_equal_a_loop(objects: str, encoder) -> None:
    train, test = Images(12, 0), Images(10, 1)
    one, best = run(encoder, train, test, objects=objects)
    fixed = {
        name: torch.tensor(
            [torch.tensor(scores).mean(0).tolist() for scores in loop(encoder, images, objects)]
        )
        for name, images in (("train", train), ("test", test))
    }
    assert [len(values) for values in fixed.values()] == [11, 9]
    head = int(fixed["train"].mean(0).argmax())
    assert one["selection"] == {"head": head}
    assert one["value"] == pytest.approx(float(fixed["test"][:, head].mean()), abs=1e-6)
    assert one["metrics"]["mean_of_heads"] == pytest.approx(float(fixed["test"].mean()), abs=1e-6)
    largest = [torch.tensor(scores).amax(1).mean() for scores in loop(encoder, test, objects)]
    assert best["value"] == pytest.approx(float(torch.stack(largest).mean()), abs=1e-6)
    assert best["value"] > one["value"] and best["id"] != one["id"]
    assert "too optimistic" in best["text"]
    assert one["text"].endswith(". Test images without an object are left out (1)")


def test_the_size_of_the_images_and_the_number_of_training_images(encoder) -> None:
    train, test = Images(12, 0), Images(6, 1)
    result = run(encoder, train, test, size=24, train_images=4)[0]
    values = torch.tensor([scores[0] for scores in loop(encoder, test, "foreground", 24)])
    assert result["value"] == pytest.approx(float(values[:, result["selection"]["head"]].mean()), abs=1e-6)
    assert result["selected_on"] == "3 training images", "the first of four has no object"


def test_known_values() -> None:
    kept = torch.tensor([[[True, False], [False, False]], [[True, True], [True, True]]])
    mask = torch.zeros(4, 4, dtype=torch.uint8)
    mask[:2, :] = 3
    mask[3, 3] = 255
    scores = object_scores(kept, mask, Config())
    assert scores is not None and scores[0].tolist() == pytest.approx([4 / 8, 8 / 15])
    assert object_scores(kept, torch.full((4, 4), 255, dtype=torch.uint8), Config()) is None
    scores = object_scores(kept, mask, Config(background=3))
    assert scores is not None and scores[0].tolist() == pytest.approx([0, 7 / 15])


def test_mistakes_are_one_sentence(encoder) -> None:
    train, test = Images(8, 0), Images(6, 1)
    empty = Images(6, 1)
    empty.targets["masks"] = [torch.zeros_like(mask) for mask in empty.targets["masks"]]
    wide = Images(6, 1)
    wide.targets["masks"][2] = torch.ones(3, 4, dtype=torch.uint8)
    torch.manual_seed(0)
    network = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    cases: list[Any] = [
        ((network, train, test, {}), ["ResNetModel"]),
        ((encoder, train, empty, {}), ["attention masks", "test", 0]),
        ((encoder, train, wide, {}), ["data.mask_column", "3 x 4", "18 x 20", "image 2"]),
        ((encoder, train, test, {"size": 18}), ["evaluation.settings.attention_masks.size", 4, 18]),
        ((encoder, train, test, {"mass": 0}), ["evaluation.settings.attention_masks.mass"]),
        ((encoder, train, test, {"objects": "boxes"}), ["evaluation.settings.attention_masks.objects"]),
    ]
    for (model, first, second, settings), parts in cases:
        with pytest.raises(UserError, match=mentions(*parts)) as error:
            run(model, first, second, **settings)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
