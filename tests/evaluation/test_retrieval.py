# SPDX-License-Identifier: Apache-2.0
"""Galleries: neighbors as a sorted list of cosines says, thumbnails, and what is saved."""

import io
import math
import pickletools
import sys
from pathlib import Path

import pytest
import torch
from messages import mentions
from PIL import Image
from torch.nn import functional as F
from transformers import BitImageProcessor, ResNetConfig, ResNetModel

from hf_ssl.errors import UserError
from hf_ssl.evaluation import (
    Gallery,
    Retriever,
    build_gallery,
    embed_gallery,
    extract_features,
    thumbnail,
)

SIDE = 16


def features(count: int, seed: int = 0) -> torch.Tensor:
    return (
        torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
        * torch.arange(1, count + 1)[:, None]
    )


def pictures(count: int, side: int = SIDE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator))


def gallery(count: int = 20) -> Gallery:
    return build_gallery(
        features(count), [b"%d" % number for number in range(count)], [f"c{n % 3}" for n in range(count)]
    )


def test_neighbors_are_sorted_cosines() -> None:
    bank, queries = features(20), features(5, seed=1)
    found = gallery().nearest(queries, 7)
    for query, row in zip(queries, found, strict=True):
        cosines = F.cosine_similarity(query[None], bank)
        order = cosines.argsort(descending=True)[:7].tolist()
        assert [neighbor.number for neighbor in row] == order
        assert [neighbor.label for neighbor in row] == [f"c{number % 3}" for number in order]
        torch.testing.assert_close(torch.tensor([n.similarity for n in row]), cosines[order])


def test_fewer_images_than_neighbors() -> None:
    (row,) = gallery(3).nearest(features(1, seed=1), 10)
    assert len(row) == 3 and len({neighbor.number for neighbor in row}) == 3


def test_unfit_questions_are_refused() -> None:
    with pytest.raises(UserError, match=mentions(1, 0)):
        gallery().nearest(features(1), 0)
    with pytest.raises(UserError, match=mentions(8, 7)):
        gallery().nearest(features(1)[:, :7], 1)
    with pytest.raises(UserError, match="finite"):
        gallery().nearest(torch.full((1, 8), math.nan), 1)
    with pytest.raises(UserError, match=mentions(1, "none", 2)):
        build_gallery(features(2), [b""])


@pytest.mark.parametrize("labels", [None, ["one", "two", "drei · 3"]])
def test_a_gallery_comes_back(tmp_path: Path, labels: list[str] | None) -> None:
    made = build_gallery(features(3), [b"a", b"", b"\x00\xff"], labels)
    made.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gallery.parquet", "index.faiss"]
    loaded = Gallery.load(tmp_path)
    assert (loaded.thumbnails, loaded.labels) == (made.thumbnails, labels)
    assert loaded.nearest(features(2, seed=1), 3) == made.nearest(features(2, seed=1), 3)
    for path in tmp_path.iterdir():
        with pytest.raises(Exception, match=r".*"):
            list(pickletools.genops(path.read_bytes()))


def test_a_damaged_gallery_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=mentions(tmp_path)):
        Gallery.load(tmp_path)
    gallery().save(tmp_path)
    index = tmp_path / "index.faiss"
    index.write_bytes(index.read_bytes()[:30])
    with pytest.raises(UserError, match=mentions(tmp_path)):
        Gallery.load(tmp_path)


def test_without_faiss_a_sentence_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    sentence = mentions("faiss", 'pip install -c constraints.txt ".[demo]"')
    with pytest.raises(UserError, match=sentence):
        build_gallery(features(2), [b"", b""])
    with pytest.raises(UserError, match=sentence):
        embed_gallery(torch.nn.Identity(), None, [])


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [
        ((3, 8, 8), "PNG", (8, 8)),
        ((1, 96, 50), "PNG", (50, 96)),
        ((3, 97, 40), "JPEG", (40, 97)),
        ((3, 400, 300), "JPEG", (144, 192)),
    ],
)
def test_thumbnails(shape: tuple[int, int, int], kind: str, size: tuple[int, int]) -> None:
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with Image.open(io.BytesIO(thumbnail(image))) as shown:
        assert (shown.format, shown.size) == (kind, size)
        if kind == "PNG":
            expected = image.expand(3, -1, -1).permute(1, 2, 0)
            assert torch.equal(
                torch.frombuffer(bytearray(shown.convert("RGB").tobytes()), dtype=torch.uint8),
                expected.flatten(),
            )


def test_a_picture_of_the_gallery_finds_itself() -> None:
    torch.manual_seed(0)
    model = ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    )
    processor = BitImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    images = pictures(12)
    rows, thumbnails = embed_gallery(model, processor, [images[:5], images[5:]])
    torch.testing.assert_close(rows, extract_features(model, processor, [images]), atol=1e-5, rtol=1e-4)
    retriever = Retriever(model, processor, build_gallery(rows, thumbnails))
    nearest, second, *_ = retriever.neighbors(images[7], 3)
    assert nearest.number == 7 and nearest.label is None
    assert nearest.similarity == pytest.approx(1, abs=1e-5) and second.similarity < nearest.similarity
    assert thumbnails == [thumbnail(image) for image in images]
