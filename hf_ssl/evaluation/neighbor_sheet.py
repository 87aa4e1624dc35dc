# SPDX-License-Identifier: Apache-2.0
"""A picture of test images beside their nearest training images for each encoder (layer 1).

Legend: M bank images, N images, Q queries, K neighbors, D features.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from hf_ssl.data import LabeledImages
from hf_ssl.data.decode import as_pillow
from hf_ssl.evaluation.knn import check_features
from hf_ssl.evaluation.maps import shortened
from hf_ssl.evaluation.neighbor_search import nearest, nearest_others
from hf_ssl.evaluation.statistics import unit_rows

SIDE, FRAME, GAP, CAPTION, HEADING = 96, 5, 6, 15, 22
NEIGHBORS, QUERIES = 5, 10
RIGHT, WRONG = "#0072b2", "#e69f00"  # blue and orange, which readers with color blindness can distinguish
LEGEND = "left: the query; blue frame: same class, orange frame: another class"


def find_neighbors(bank: Tensor, features: Tensor, queries: Sequence[int], *, is_bank: bool) -> np.ndarray:
    """Return the row numbers (Q, K) of the bank images with the largest cosines, best first.

    Args:
        bank: (M, D) features of the bank.
        features: (N, D) features of the images that contain the queries.
        queries: Q row numbers of `features`.
        is_bank: whether the queries are images of the bank. If so, an image is not its own neighbor.
    """
    rows = unit_rows(check_features(bank, "neighbors").float())
    if is_bank:
        chosen = torch.as_tensor(queries, device=rows.device)
        found = nearest_others(rows, chosen, min(NEIGHBORS, len(rows) - 1))
    else:
        wanted = unit_rows(check_features(features, "neighbors").float())[list(queries)]
        found = nearest(rows, wanted, min(NEIGHBORS, len(rows)))
    return found[1].cpu().numpy()


def draw_neighbors(
    found: Mapping[str, np.ndarray],
    images: LabeledImages,
    queries: Sequence[int],
    bank: LabeledImages,
    *,
    labeled: bool,
) -> Image.Image:
    """Return the picture: one row for each query, and one block of columns for each encoder.

    Args:
        found: {name of the encoder: row numbers of the neighbors (Q, K)}.
        images: the images that contain the queries.
        queries: Q row numbers.
        bank: the images that contain the neighbors.
        labeled: whether the frames and captions show the classes.
    """
    caption = CAPTION if labeled else 0
    tile, line = SIDE + 2 * FRAME + GAP, SIDE + 2 * FRAME + GAP + caption
    counts = [rows.shape[1] for rows in found.values()]
    width = GAP + tile * (1 + sum(counts)) + 3 * GAP * len(counts)
    sheet = Image.new("RGB", (width, HEADING * (1 + labeled) + line * len(queries) + GAP), "white")
    pen, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(11)
    if labeled:
        pen.text((GAP, GAP), LEGEND, "black", small)
    top = HEADING * labeled
    classes = {id(source): source.labels for source in (images, bank)} if labeled else {}

    def place(source: LabeledImages, row: int, left: int, upper: int, color: str | None) -> None:
        if color is not None:
            pen.rectangle((left, upper, left + SIDE + 2 * FRAME - 1, upper + SIDE + 2 * FRAME - 1), color)
        picture = as_pillow(source[row]).convert("RGB")
        sheet.paste(ImageOps.fit(picture, (SIDE, SIDE)), (left + FRAME, upper + FRAME))
        if labeled:
            name = shortened(source.class_names[int(classes[id(source)][row])], 17)
            pen.text((left + FRAME, upper + SIDE + 2 * FRAME), name, "black", small)

    for number, query in enumerate(queries):
        place(images, query, GAP, top + HEADING + line * number, None)
    left = GAP + tile
    for (name, rows), count in zip(found.items(), counts, strict=True):
        left += 3 * GAP
        pen.text((left, top + 3), shortened(name, count * tile // 7), "black", font)
        for number, (query, neighbors) in enumerate(zip(queries, rows, strict=True)):
            for position, row in enumerate(neighbors):
                color = None
                if labeled:
                    same = classes[id(bank)][row] == classes[id(images)][query]
                    color = RIGHT if same else WRONG
                place(bank, int(row), left + tile * position, top + HEADING + line * number, color)
        left += tile * count
    return sheet
