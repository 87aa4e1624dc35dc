# SPDX-License-Identifier: Apache-2.0
"""Defines the rows about the evaluation of an encoder and about the start of the program."""

import subprocess
import sys
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModel, ResNetConfig

from hf_ssl.evaluation import extract_features, knn_accuracy
from hf_ssl.hub import image_processor
from hf_ssl.precision import DTYPES, fastest_precision
from hf_ssl.views import ViewPreset
from training.benchmarks.images import as_tensor, small_images
from training.benchmarks.pairs import Pair
from training.benchmarks.row import Row
from training.benchmarks.steps import RESNET18

NEIGHBORS = (1, 5, 10, 20, 50, 100, 200)


def features(device: torch.device) -> Pair:
    """Compute features of 32-pixel images, enlarged to 64, with a ResNet-18.

    hf_ssl uses the precision that `evaluation.precision=auto` chooses. The peer gets images that are already
    normalized.
    """
    dtype = DTYPES[fastest_precision(device.type).name]
    encoder = AutoModel.from_config(ResNetConfig(**RESNET18)).to(device).eval()
    plain = AutoModel.from_config(encoder.config).to(device).eval()
    plain.load_state_dict(encoder.state_dict())
    images = [as_tensor(image) for image in small_images(512)]
    batches = [images[start : start + 128] for start in range(0, 512, 128)]
    processor = image_processor(ViewPreset(size=32, enlarge=64), 3)
    ready = [processor(batch, return_tensors="pt")["pixel_values"].to(device) for batch in batches]

    @torch.no_grad()
    def peer() -> torch.Tensor:
        return torch.cat([plain(batch).pooler_output.flatten(1).cpu() for batch in ready])

    def ours() -> torch.Tensor:
        return extract_features(encoder, processor, batches, dtype=dtype)

    return Pair(ours, peer, 512, 512)


def nearest_neighbors(device: torch.device) -> Pair:
    """Compute the k-NN accuracy for seven values of k.

    Raises:
        SystemExit: the accuracies of hf_ssl and lightly differ.
    """
    from lightly.utils.benchmarking import knn_predict

    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(10, 512, generator=generator)

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        noise = torch.randn(count, 512, generator=generator)
        return F.normalize(0.3 * classes[labels] + noise, dim=1).to(device), labels.to(device)

    bank, bank_labels = rows(50_000)
    queries, labels = rows(10_000)

    def ours() -> dict[int, float]:
        found = knn_accuracy(bank, bank_labels, queries, labels, neighbors=NEIGHBORS, temperatures=(0.1,))
        return {k: accuracy for (k, _), accuracy in found.items()}

    def peer() -> dict[int, float]:
        return {k: _accuracy(knn_predict, bank, bank_labels, queries, labels, k) for k in NEIGHBORS}

    mine, theirs = ours(), peer()
    for k in NEIGHBORS:
        if abs(mine[k] - theirs[k]) > 1.5e-4:  # allows one query in which two classes tie
            raise SystemExit(f"k-NN: expected lightly's accuracy {theirs[k]} at k = {k}, got {mine[k]}")
    return Pair(ours, peer)


def _accuracy(predict: Any, bank: Any, bank_labels: Any, queries: Any, labels: Any, k: int) -> float:
    correct = 0
    for start in range(0, len(queries), 1024):
        found = predict(queries[start : start + 1024], bank.T, bank_labels, 10, knn_k=k, knn_t=0.1)
        correct += int((found[:, 0] == labels[start : start + 1024]).sum())
    return correct / len(queries)


def start_up(device: torch.device) -> Pair:
    def program(*command: str) -> Any:
        return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)

    return Pair(program("-m", "hf_ssl", "--help"), program("-c", "import torch"))


ROWS = [
    Row(
        "features",
        "feature extraction, ResNet-18, 64 px",
        "float32 loop over preprocessed images",
        2,
        features,
        "image",
        None,
        7,
        accelerator=True,
    ),
    Row(
        "knn",
        "k-NN accuracy for seven k, 50,000 training and 10,000 test features of size 512",
        "lightly, one call per k",
        10,
        nearest_neighbors,
        "search",
        None,
        3,
        accelerator=True,
    ),
    Row("help", "hf-ssl --help", "import torch", 10, start_up, "start", None, 5),
]
