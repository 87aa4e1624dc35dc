# SPDX-License-Identifier: Apache-2.0
"""Attention as pictures: where they are bright, what size they have, and what is written."""

import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from example_facts import new_facts
from messages import mentions
from PIL import Image
from transformers import BitImageProcessor, ResNetConfig, ResNetModel, ViTConfig, ViTModel
from transformers.utils import logging as transformers_logging

from hf_ssl.cards import write_facts
from hf_ssl.cli import main
from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    attention_maps,
    attention_pictures,
    darken_outside_mask,
    fade_outside,
    overlay,
    visible_part,
    write_attention_pictures,
)
from hf_ssl.evaluation.overlays import overview

KEYS = ["image", "mean", "rollout", "mask", "colors", "head 1", "head 2"]


def vit() -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=32,
            patch_size=8,
        )
    )  # fmt: skip


def processor(resample: int = 2) -> BitImageProcessor:
    return BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, resample=resample,
        image_mean=[0.5, 0.4, 0.3], image_std=[0.25, 0.2, 0.3], do_convert_rgb=True,
    )  # fmt: skip


def photo(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_pictures_show_what_the_encoder_saw() -> None:
    pixels = photo(32, 48)
    pictures = attention_pictures(vit(), processor(), pixels, shown_side=64)
    assert list(pictures) == KEYS
    assert {picture.size for picture in pictures.values()} == {(64, 64)}
    assert {picture.mode for picture in pictures.values()} == {"RGB"}
    maps = attention_maps(vit(), processor()([pixels], return_tensors="pt")["pixel_values"])
    shown = {"mean": maps.mean[0], "rollout": maps.rollout[0], "head 2": maps.heads[0, 1]}
    for name, values in shown.items():
        np.testing.assert_array_equal(
            np.asarray(pictures[name]), np.asarray(overlay(pictures["image"], values))
        )
    middle = pixels[:, :, 8:40].repeat_interleave(2, 1).repeat_interleave(2, 2).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(np.asarray(pictures["image"]), middle)


def test_a_bright_object_is_at_its_place_in_the_visible_part() -> None:
    """The object lies in the columns 60 to 64 and the rows 24 to 28 of a photo of 40 x 120 pixels."""
    pixels = torch.zeros(3, 40, 120, dtype=torch.uint8)
    pixels[:, 24:28, 60:64] = 255
    left, top, right, bottom = visible_part(processor(), 40, 120)
    assert (left, top, right, bottom) == pytest.approx((1 / 3, 0, 2 / 3, 1), abs=0.01)
    shown = attention_pictures(vit(), processor(), pixels)["image"]
    rows, columns = np.nonzero(np.asarray(shown)[..., 0] > 128)
    place = (columns.mean() + 0.5) / shown.width, (rows.mean() + 0.5) / shown.height
    expected = (62 / 120 - left) / (right - left), (26 / 40 - top) / (bottom - top)
    assert place == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("options", "size", "expected"),
    [
        ({"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}, (50, 50), (1 / 16,) * 2),
        ({"size": {"height": 56, "width": 56}, "do_center_crop": False}, (30, 90), (0, 0)),
        ({"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}, (80, 20), (0, 3 / 8)),
        ({"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}, (1, 1), (0, 0)),
    ],
)
@pytest.mark.parametrize("scaling", [{}, {"do_normalize": False}, {"do_rescale": False}])
def test_the_visible_part_of_other_processors(
    options: dict, size: tuple[int, int], expected: tuple[float, float], scaling: dict
) -> None:
    left, top = expected
    part = visible_part(BitImageProcessor(**options, **scaling), *size)
    assert part == pytest.approx((left, top, 1 - left, 1 - top), abs=0.01)


def test_a_photo_is_gray_outside_the_visible_part() -> None:
    faded = np.asarray(fade_outside(Image.new("RGB", (30, 20), (255, 0, 0)), (1 / 3, 0, 2 / 3, 1)))
    assert (faded[:, 10:20] == [255, 0, 0]).all()
    np.testing.assert_allclose(np.delete(faded, np.s_[10:20], axis=1), [[[166, 90, 90]] * 20] * 20, atol=1)


def test_a_size_keeps_the_whole_photo() -> None:
    pictures = attention_pictures(vit(), processor(), photo(40, 100), size=44, shown_side=1)
    assert {picture.size for picture in pictures.values()} == {(104, 40)}  # 44 x 110 in whole patches
    same = attention_pictures(vit(), processor(), photo(32, 48), size=32, shown_side=1)["image"]
    np.testing.assert_array_equal(np.asarray(same), photo(32, 48).permute(1, 2, 0).numpy())
    for resample in (0, 2, 3):  # the size of the processor itself gives the same pixels
        square = processor(resample)
        own = attention_pictures(vit(), square, photo(50, 50), shown_side=1)["image"]
        sized = attention_pictures(vit(), square, photo(50, 50), size=32, shown_side=1)["image"]
        np.testing.assert_array_equal(np.asarray(sized), np.asarray(own))
    with pytest.raises(UserError, match=mentions("size", 8, 7)):
        attention_pictures(vit(), processor(), photo(40, 100), size=7)


def test_overlays_are_blended_colors() -> None:
    gray = Image.new("RGB", (8, 4), (100, 100, 100))
    values = torch.tensor([[2.0, 3.0]])
    shown = np.asarray(overlay(gray, values, opacity=0.5, smooth=False, colors="viridis")).astype(float)
    low, high = (np.array(matplotlib.colormaps["viridis"](value)[:3]) * 255 for value in (0.0, 1.0))
    assert np.abs(shown[:, :4] - (low + 100) / 2).max() <= 1.5
    assert np.abs(shown[:, 4:] - (high + 100) / 2).max() <= 1.5
    smooth = np.asarray(overlay(gray, values, opacity=1.0)).astype(float).sum(axis=2)
    assert (np.diff(smooth[0]) >= -2).all() and len(np.unique(smooth[0])) > 3
    assert np.isfinite(np.asarray(overlay(gray, torch.ones(2, 2)))).all()  # a map of one value


def test_the_photo_is_darkened_outside_the_mask() -> None:
    mask = torch.tensor([[True, False], [False, True]])
    shown = np.asarray(darken_outside_mask(Image.new("RGB", (4, 4), (200, 100, 40)), mask, darkness=0.5))
    assert (shown[:2, :2] == [200, 100, 40]).all() and (shown[:2, 2:] == [100, 50, 20]).all()
    assert (shown[2:, 2:] == [200, 100, 40]).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT, a ResNet and two photos of one name."""
    root = tmp_path_factory.mktemp("attention")
    vit().save_pretrained(root / "vit")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(root / "resnet")
    for name in ("vit", "resnet"):
        processor().save_pretrained(root / name)
    for name in ("a", "b"):
        (root / name).mkdir()
        Image.new("RGB", (50, 40), (200, 10, 10)).save(root / name / "dog.png")
    (root / "page.jpg").write_text("<html></html>")
    Image.new("F", (50, 40), 1.5).save(root / "floats.tif")
    return root


def test_written_pictures(folders: Path, tmp_path: Path) -> None:
    photos = [folders / "a" / "dog.png", folders / "b" / "dog.png"]
    transformers_logging.enable_progress_bar()
    written = write_attention_pictures(str(folders / "vit"), photos, tmp_path, size=32)
    assert not transformers_logging.is_progress_bar_enabled()  # its bars are no whole lines of a log
    assert written == [tmp_path / "dog", tmp_path / "dog_2"]
    names = sorted(f"{key.replace(' ', '_')}.png" for key in KEYS)
    for folder in written:
        assert sorted(path.name for path in folder.iterdir()) == names
        with Image.open(folder / "mean.png") as picture:
            assert picture.size == (400, 320)
    with Image.open(tmp_path / "overview.png") as picture:
        assert picture.size == (len(KEYS) * 163 - 3, 14 + 2 * 131 - 3)


def test_a_photo_of_12_bits_is_scaled_as_in_training(folders: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(folders / "vit", tmp_path / "run"))
    facts = new_facts()
    facts["data"] |= {"value_range": [0.0, 4095.0], "found_values": [0.0, 4095.0]}
    write_facts(model, facts)
    values = np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "eight.png")
    twelve = np.rint(values * (4095 / 255)).astype(np.uint16)
    Image.fromarray(twelve).save(tmp_path / "twelve.png")
    for name in ("eight", "twelve"):
        assert main(["attention", str(model), str(tmp_path / f"{name}.png"), "--output", str(tmp_path)]) == 0
    for picture in ("image", "mean", "colors"):
        assert (tmp_path / "twelve" / f"{picture}.png").read_bytes() == (
            tmp_path / "eight" / f"{picture}.png"
        ).read_bytes()


def test_the_overview_has_a_row_for_each_photo_and_a_column_for_each_picture() -> None:
    rows = [
        {"image": Image.new("RGB", (40, 20), "red"), "mean": Image.new("RGB", (40, 20), "lime")},
        {"image": Image.new("RGB", (20, 20), "blue"), "mean": Image.new("RGB", (20, 20), "black")},
    ]
    sheet = overview(rows, height=10)
    assert sheet.size == (2 * 23 - 3, 14 + 2 * 13 - 3)
    colors = [[sheet.getpixel((x, y)) for x in (5, 28)] for y in (19, 32)]
    assert colors == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (0, 0, 0)]]
    assert sheet.getpixel((15, 32)) == (255, 255, 255)  # narrower than the others
    heading = np.asarray(sheet)[:14]
    assert (heading[:, :20] < 128).any() and (heading[:, 23:] < 128).any()


def test_mistakes_are_told(folders: Path, tmp_path: Path) -> None:
    good = folders / "a" / "dog.png"
    for model, path, parts in (
        ("resnet", good, ("ResNetModel",)),
        ("vit", folders / "page.jpg", ("page.jpg", "picture")),
        ("vit", folders / "nothing.jpg", ("nothing.jpg", "No such file")),
        ("vit", folders / "floats.tif", ("floats.tif", "data.value_range")),
        ("nothing", good, ("nothing",)),
    ):
        with pytest.raises(UserError, match=mentions(*parts)):
            write_attention_pictures(str(folders / model), [path], tmp_path)
    assert not list(tmp_path.iterdir())
