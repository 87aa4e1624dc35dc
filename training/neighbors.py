# SPDX-License-Identifier: Apache-2.0
"""Draws photos beside their attention maps and their nearest neighbors:
`python -m training.neighbors ENCODER PICTURE data.path=photos`.

Each row shows a photo of the test split, the attention of the encoder's last layer, and the most similar
photos of the training split. The photos are drawn at random, equally many of each class.
"""

import argparse
from pathlib import Path

from PIL import Image, ImageOps

from hf_ssl.data import DataConfig, labeled_images
from hf_ssl.data.decode import as_pillow
from hf_ssl.evaluation import attention_pictures, extract_features, load_encoder
from hf_ssl.evaluation.neighbor_search import nearest
from hf_ssl.evaluation.statistics import unit_rows
from hf_ssl.recipe import read_sections

SIDE, GAP, LARGE_GAP = 144, 4, 16
ROWS, NEIGHBORS, SEED = 5, 5, 0


def draw(model: str, data: DataConfig, rows: int = ROWS, neighbors: int = NEIGHBORS) -> Image.Image:
    """Return the picture.

    Args:
        model: a folder with an encoder of the ViT family, or its id on the Hub.
        data: the photos, with the splits "train" and "test" and labels.
        rows: number of photos.
        neighbors: number of nearest neighbors of each photo.
    """
    encoder, processor = load_encoder(model)
    gallery = labeled_images(data, "train")
    queries = labeled_images(data, "test", max_images=rows, seed=SEED)
    bank, found = (
        unit_rows(extract_features(encoder, processor, images.iter_batches(64)))
        for images in (gallery, queries)
    )
    _, rows_of_neighbors = nearest(bank, found, neighbors)
    lines = []
    for number in range(len(queries)):
        maps = attention_pictures(encoder, processor, queries[number], size=SIDE, shown_side=SIDE)
        similar = [gallery[int(row)] for row in rows_of_neighbors[number]]
        photos = [as_pillow(image) for image in similar]
        lines.append([maps["image"], maps["mean"], *photos])
    width = (2 + neighbors) * (SIDE + GAP) + LARGE_GAP - GAP
    picture = Image.new("RGB", (width, len(lines) * (SIDE + GAP) - GAP), "white")
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            left = column * (SIDE + GAP) + (LARGE_GAP if column > 1 else 0)
            picture.paste(ImageOps.fit(cell, (SIDE, SIDE)), (left, row * (SIDE + GAP)))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoder")
    parser.add_argument("picture", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="data.key=value")
    arguments = parser.parse_args()
    data, _ = read_sections(arguments.overrides)
    draw(arguments.encoder, data).save(arguments.picture, quality=88)


if __name__ == "__main__":
    main()
