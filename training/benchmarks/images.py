# SPDX-License-Identifier: Apache-2.0
"""Generates images for the benchmarks, so that they need no data set.

The benchmarks depend on the sizes of the images and of their files, not on the values of the pixels.
"""

import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor


def small_images(count: int, size: int = 32) -> list[Image.Image]:
    """Return square RGB images of smooth colors with noise, by default with the size of CIFAR-10 images."""
    random = np.random.default_rng(0)
    return [_picture(random, size, size, coarse=4) for _ in range(count)]


def photo_files(count: int) -> list[bytes]:
    """Return JPEG files of 500 x 375 pixels and about 85 KB, the median size of ImageNet photos."""
    random = np.random.default_rng(0)
    return [_encoded(_picture(random, 500, 375, coarse=24), "JPEG", quality=90) for _ in range(count)]


def as_tensor(image: Image.Image) -> Tensor:
    """Return the image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def parquet_of_small_images(folder: Path, count: int, rows_in_group: int = 1000) -> Path:
    """Write one Parquet file with PNG images, like CIFAR-10 on the Hub, to `folder`, and return `folder`."""
    files = [_encoded(image, "PNG") for image in small_images(min(count, 1000))]
    rows = {"image": [{"bytes": files[i % len(files)], "path": None} for i in range(count)]}
    rows["label"] = [i % 10 for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(folder / "train-00000-of-00001.parquet", batch_size=rows_in_group)
    return folder


def _picture(random: np.random.Generator, width: int, height: int, coarse: int) -> Image.Image:
    colors = random.integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC), float)
    noisy = smooth + random.normal(0, 9, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _encoded(image: Image.Image, form: str, **options: int) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()
