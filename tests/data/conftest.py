# SPDX-License-Identifier: Apache-2.0
"""Small files of every kind that the loader reads."""

import io
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest

from hf_ssl.data import DataConfig, open_source, train_loader
from hf_ssl.views import ViewPreset

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets_cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number, size=(12, 10), channels=3):
    """Return an image (height, width) of noise, which differs for each number."""
    shape = (*size, 3) if channels == 3 else size
    return PIL.Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(name="encode")
def encode_fixture():
    return encode


@pytest.fixture(name="picture")
def picture_fixture():
    return picture


@pytest.fixture
def write_parquet():
    """Return a function that writes encoded images, and labels, as Parquet, as `datasets` does."""

    def write(path, images, labels=None, row_group=10, names=CLASSES):
        features = {"image": datasets.Image()}
        columns = {
            "image": [{"bytes": image, "path": f"{number}.png"} for number, image in enumerate(images)]
        }
        if labels is not None:
            features["label"] = datasets.ClassLabel(names=list(names))
            columns["label"] = labels
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(path, batch_size=row_group)
        return path

    return write


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Write train/CLASS/NUMBER.png, 20 images per class, of several sizes; and test, 4 images per class."""
    root = tmp_path_factory.mktemp("folder")
    for split, count in (("train", 20), ("test", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                key = 1000 * label + number + (500 if split == "test" else 0)
                picture(key, (12 + label, 10)).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def tars(tmp_path_factory):
    """Write three files train-N.tar of 12 samples each (KEY.png, KEY.cls)."""
    root = tmp_path_factory.mktemp("tars")
    for shard in range(3):
        with tarfile.open(root / f"train-{shard}.tar", "w") as tar:
            for number in range(12):
                for ending, content in (
                    ("png", encode(picture(100 * shard + number))),
                    ("cls", str(number % 3).encode()),
                ):
                    info = tarfile.TarInfo(f"{shard}{number:02d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return root


@pytest.fixture
def numbered(tmp_path, write_parquet):
    """Return a function that writes `count` small images as Parquet and returns their configuration."""

    def make(count=60, files=1, row_group=10, size=(12, 10), broken=(), **options):
        per_file = -(-count // files)
        for file in range(files):
            rows = range(file * per_file, min(count, (file + 1) * per_file))
            images = [b"no image" if row in broken else encode(picture(row, size)) for row in rows]
            write_parquet(tmp_path / "numbered" / f"train-{file:05d}.parquet", images, row_group=row_group)
        return DataConfig(path=str(tmp_path / "numbered"), **options)

    return make


@pytest.fixture
def preset():
    return ViewPreset(size=8)


@pytest.fixture
def make_loader(preset):
    """Return a function that opens a source and returns its `train_loader`."""

    def make(config, seed=5, batch_size=8, preset=preset, **options):
        source = open_source(config)
        return train_loader(source, preset, config=config, seed=seed, batch_size=batch_size, **options)

    return make
