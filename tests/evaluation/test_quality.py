# SPDX-License-Identifier: Apache-2.0
"""LiDAR and alignment of an encoder: views of images, equal results, and where they are shown."""

import json

import pytest
import torch
from example_facts import new_facts
from messages import mentions
from pixel_encoder import SIZE, Pixels, processor

from hf_ssl.cards.card import render_card
from hf_ssl.cards.facts import check_facts
from hf_ssl.cards.text import terminal_text
from hf_ssl.data import DataConfig, label_data
from hf_ssl.errors import UserError
from hf_ssl.evaluation import alignment, evaluate_encoder, evaluate_features, lidar
from hf_ssl.evaluation.inputs import read_rows
from hf_ssl.evaluation.protocols.quality import standard_preset
from hf_ssl.random import image_seeds
from hf_ssl.views import ViewPreset, augment, sample_parameters


class Images:
    """Labeled random images of different sizes."""

    def __init__(self, count: int, channels: int = 3, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        sizes = [(SIZE + number % 3, SIZE + number % 2) for number in range(count)]
        self.images = [
            torch.randint(256, (channels, *size), generator=generator).to(torch.uint8) for size in sizes
        ]
        self.labels = torch.arange(count) % 2

    def __len__(self) -> int:
        return len(self.images)

    def iter_batches(self, batch_size: int):
        for start in range(0, len(self), batch_size):
            yield self.images[start : start + batch_size]


def measure(images: int = 9, views: int = 4, channels: int = 3, seed: int = 0, given=None, **settings):
    config = {
        "protocols": ["quality"],
        "settings": {"quality": {"images": images, "views": views} | settings},
        "seed": seed,
        "precision": "float32",
    }
    splits = Images(20, channels), Images(13, channels, seed=1)
    return evaluate_encoder(Pixels(channels), *splits, config, processor(channels), preset=given)


def test_the_numbers_are_those_of_the_views() -> None:
    """An independent computation: all views of an image, processed by hand, encoded by hand."""
    result = measure(images=5, views=4)
    encoder, test = Pixels(), Images(13, seed=1)
    preset = standard_preset(SIZE)
    preset.count, preset.mean, preset.std = 4, (0, 0, 0), (1, 1, 1)
    features = []
    for row in (0, 2, 5, 7, 10):  # evenly spaced
        seeds = image_seeds(0, 0, torch.tensor([row]).numpy().astype("uint64"))
        image = test.images[row][None]
        views = augment(image, sample_parameters(seeds, preset, [image.shape[-2:]])).pixel_values[0]
        pixels = ((255 * views).round() / 255 - 0.5) / 0.25
        features.append(encoder(pixels)["pooler_output"].detach())
    expected = torch.stack(features)
    quality = result["quality"]
    assert quality["lidar"] == pytest.approx(lidar(expected), rel=1e-3)
    assert quality["alignment"] == pytest.approx(alignment(expected[:, 0], expected[:, 1]), rel=1e-3)
    assert (quality["images"], quality["views"]) == (5, 4)
    assert result["protocols"] == [] and result["statistics"]["rank_me"] > 1
    assert json.loads(json.dumps(result)) == result
    assert measure(images=5, views=4)["quality"] == quality
    assert measure(images=5, views=4, seed=1)["quality"]["id"] != quality["id"]


class Counted:
    """A data set in Python that counts how often each image is read."""

    def __init__(self, images: Images) -> None:
        self.images, self.count = images, [0] * len(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int):
        self.count[row] += 1
        return self.images.images[row], int(self.images.labels[row])


def test_only_the_requested_images_are_decoded() -> None:
    images = Images(13)
    counted = Counted(images)
    labeled = label_data(counted, DataConfig.of({"cache": "none"}), "test")
    for _ in labeled.iter_batches(4):
        pass
    before, rows = list(counted.count), torch.tensor([0, 1, 5, 11, 12])
    of_all, of_labeled = (list(read_rows(each, rows, 4)) for each in (images, labeled))
    assert [row for row in range(13) if counted.count[row] > before[row]] == rows.tolist()
    assert [[row for row, _ in part] for part in of_all] == [[0, 1], [5], [11], [12]]
    for part, other in zip(of_all, of_labeled, strict=True):
        for (row, image), (other_row, other_image) in zip(part, other, strict=True):
            assert row == other_row and torch.equal(image, other_image)


def test_the_augmentation_of_the_training_is_used_if_it_is_known() -> None:
    weak = ViewPreset(size=SIZE, scale=(1, 1), ratio=(1, 1), jitter=0.0, gray=0.0, blur=0.0, flip=0.0)
    given, standard = measure(given=weak)["quality"], measure()["quality"]
    assert given["alignment"] < standard["alignment"] / 2
    assert "augmentation of the training" in given["text"] and "standard augmentation" in standard["text"]
    assert given["id"] != standard["id"]
    assert measure(given=weak, preset="standard")["quality"] == standard


def test_gray_images_are_augmented_without_color() -> None:
    assert measure(channels=1)["quality"]["lidar"] > 1


def test_features_alone_have_no_views() -> None:
    rows, labels = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    result = evaluate_features({"protocols": ["quality"]}, rows, labels, rows, labels)
    assert "quality" not in result and any("encoder" in text for text in result["skipped"])


@pytest.mark.parametrize(("key", "value"), [("images", 1), ("views", 1), ("preset", "mine")])
def test_settings_have_limits(key: str, value: object) -> None:
    with pytest.raises(UserError, match=mentions(f"evaluation.settings.quality.{key}", value)):
        measure(**{key: value})


def test_card_and_terminal_show_the_numbers() -> None:
    facts, quality = new_facts(), measure()["quality"]
    facts["results"]["trained"]["quality"] = quality
    facts["results"]["untrained"]["quality"] = quality | {"id": "quality-1-0"}
    card = render_card(check_facts(facts), has_pretraining=False)
    rows = {line.split(" | ")[0]: line for line in card.splitlines() if line.startswith("| ")}
    assert rows["| LiDAR"].startswith(f"| LiDAR | {quality['lidar']:.1f} | - |"), "another id"
    assert rows["| alignment"].startswith(f"| alignment | {quality['alignment']:.3f} | - |")
    assert quality["text"] in card and "alpha-ReQ" in card
    assert "LiDAR" in terminal_text(facts["results"])
