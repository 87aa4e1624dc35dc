# SPDX-License-Identifier: Apache-2.0
"""Defines the rows about augmentation. The transforms of lightly process one Pillow image at a time."""

import io
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from hf_ssl import views
from hf_ssl.data import DataConfig, as_source, open_source, train_loader
from hf_ssl.data.decode import decode
from hf_ssl.random import image_seeds
from hf_ssl.views import ViewOverrides, ViewPreset
from training.benchmarks.images import as_tensor, parquet_of_small_images, photo_files, small_images
from training.benchmarks.pairs import Pair
from training.benchmarks.row import Row

SIMCLR = ViewPreset(size=224)
MULTI_CROP = {
    "size": 224,
    "scale": [0.4, 1.0],
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "blur": 1.0,
    "second": ViewOverrides(blur=0.1, solarize=0.2),
    "local": ViewOverrides(count=8, size=96, scale=[0.05, 0.4], blur=0.5),
}


class _Drawer:
    """Samples new augmentation parameters at each call, as each training step does."""

    def __init__(self, preset: ViewPreset, sizes: np.ndarray) -> None:
        self.preset, self.sizes, self.calls = preset, sizes, 0

    def __call__(self) -> views.ViewParameters:
        self.calls += 1
        keys = np.arange(len(self.sizes), dtype=np.uint64)
        return views.sample_parameters(image_seeds(0, self.calls, keys), self.preset, self.sizes)


def small(preset: ViewPreset, side: int = 32) -> Any:
    """Measure the augmentation of a batch of decoded images of one size on the device."""

    def build(device: torch.device) -> Pair:
        from lightly.transforms import SimCLRTransform

        images = small_images(512, side)
        batch = torch.stack([as_tensor(image) for image in images]).contiguous().to(device)
        drawn, transform = _Drawer(preset, np.full((512, 2), side)), SimCLRTransform(input_size=preset.size)
        return Pair(
            lambda: views.augment(batch, drawn()),
            lambda: [transform(image) for image in images[:128]],
            ours_units=512,
            peer_units=128,
        )

    return build


def photos(preset: ViewPreset, *, multi_crop: bool, crops_only: bool) -> Any:
    """Measure decoding and augmentation of JPEG files.

    Args:
        preset: the augmentation settings.
        multi_crop: whether the transform of lightly is DINO's instead of SimCLR's.
        crops_only: whether to measure only the work of a loader's worker. The device of the model does the
            remaining augmentation.
    """

    def build(device: torch.device) -> Pair:
        from lightly.transforms import DINOTransform, SimCLRTransform

        files = photo_files(16)
        drawn = _Drawer(preset, np.full((16, 2), (375, 500)))
        transform = DINOTransform(n_local_views=8) if multi_crop else SimCLRTransform(input_size=224)

        def ours() -> None:
            parameters = drawn()
            crops = views.crop([decode(file, 3) for file in files], parameters)
            if not crops_only:
                views.augment(crops, parameters)

        def peer() -> None:
            for file in files[:8]:
                transform(Image.open(io.BytesIO(file)).convert("RGB"))

        return Pair(ours, peer, ours_units=16, peer_units=8)

    return build


def loader(device: torch.device) -> Pair:
    """Measure an epoch of the loader, from a Parquet file like CIFAR-10 to batches of views."""
    from lightly.transforms import SimCLRTransform

    folder = parquet_of_small_images(Path(tempfile.mkdtemp()) / "small", 4096)
    preset = ViewPreset(size=32)
    config = DataConfig(path=str(folder))
    source = open_source(config)
    transform = SimCLRTransform(input_size=32)
    rows = datasets.load_dataset(str(folder), split="train[:512]")  # decodes item by item

    class PerItem(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> list[torch.Tensor]:
            return transform(rows[index]["image"])

    peers = DataLoader(PerItem(), batch_size=256, drop_last=True)
    batches = train_loader(source, preset, config=config, seed=0, batch_size=256)

    def ours() -> None:
        for batch in batches:
            batch.inputs(device)

    return Pair(ours, lambda: [batch for batch in peers], ours_units=4096, peer_units=512)


def loader_of_dataset(device: torch.device) -> Pair:
    """Measure the loader of a `datasets.Dataset` of encoded images, and that of the same Parquet file."""
    folder = parquet_of_small_images(Path(tempfile.mkdtemp()) / "small", 4096)
    preset, config = ViewPreset(size=32), DataConfig(path=str(folder), cache="none")
    table = datasets.load_dataset(str(folder), split="train")
    loaders = [
        train_loader(source, preset, config=config, seed=0, batch_size=256)
        for source in (as_source(table, config), open_source(config))
    ]
    ours, theirs = (lambda batches=batches: [len(batch) for batch in batches] for batches in loaders)
    return Pair(ours, theirs, ours_units=4096, peer_units=4096)


_SINGLE = ViewPreset(size=32)
_MULTI = ViewPreset(interpolation="bicubic", **MULTI_CROP)

ROWS = [
    Row(
        "views_32",
        "SimCLR views, 32 px, bilinear, one core",
        "lightly",
        7,
        small(_SINGLE),
        "image",
        1,
        15,
    ),
    Row(
        "views_32_bicubic",
        "SimCLR views, 32 px, bicubic, one core",
        "lightly",
        5,
        small(ViewPreset(size=32, interpolation="bicubic")),
        "image",
        1,
        15,
    ),
    Row(
        "views_64_to_32",
        "SimCLR views, 64 px images resized to 32 px, one core",
        "lightly",
        5,
        small(_SINGLE, side=64),
        "image",
        1,
        15,
    ),
    Row(
        "views_224",
        "SimCLR views, 224 px, decoding and augmentation on one core",
        "lightly",
        2,
        photos(SIMCLR, multi_crop=False, crops_only=False),
        "image",
        1,
    ),
    Row(
        "crops_224",
        "SimCLR views, 224 px, decoding and uint8 crops only",
        "lightly",
        5,
        photos(SIMCLR, multi_crop=False, crops_only=True),
        "image",
        1,
    ),
    Row(
        "views_multi_crop",
        "multi-crop, 2 x 224 + 8 x 96 px, decoding and augmentation on one core",
        "lightly",
        2.5,
        photos(_MULTI, multi_crop=True, crops_only=False),
        "image",
        1,
    ),
    Row(
        "crops_multi_crop",
        "multi-crop, 2 x 224 + 8 x 96 px, decoding and uint8 crops only",
        "lightly",
        8,
        photos(_MULTI, multi_crop=True, crops_only=True),
        "image",
        1,
    ),
    Row(
        "loader",
        "loader: CIFAR-10-sized images in Parquet to batches of views, one core",
        "loader that applies lightly's transform to each image",
        7,
        loader,
        "image",
        1,
        7,
    ),
    Row(
        "loader_dataset",
        "loader: the same images as a `datasets.Dataset`, without a cache, one core",
        "loader of the Parquet file",
        0.95,
        loader_of_dataset,
        "image",
        1,
        7,
    ),
]
