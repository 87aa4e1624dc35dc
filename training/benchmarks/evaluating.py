# SPDX-License-Identifier: Apache-2.0
"""Defines the rows about the evaluation of an encoder and about the start of the program."""

import subprocess
import sys
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import AutoModel, ResNetConfig

from hf_ssl.evaluation import extract_features, knn_accuracy
from hf_ssl.evaluation.config import LEARNING_RATES
from hf_ssl.evaluation.neighbor_search import nearest
from hf_ssl.evaluation.protocols.linear import train_heads
from hf_ssl.hub import image_processor
from hf_ssl.precision import autocast_dtype, fastest_precision
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
    dtype = autocast_dtype(fastest_precision(device.type).name)
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


class Search(NamedTuple):
    """Features of noisy classes: bank (M, 512) and queries (N, 512), L2-normalized, with their classes."""

    bank: torch.Tensor
    bank_labels: torch.Tensor
    queries: torch.Tensor
    labels: torch.Tensor

    def seven_k(self) -> dict[int, float]:
        """Return the accuracies of hf_ssl."""
        found = knn_accuracy(*self, neighbors=NEIGHBORS, temperatures=(0.1,))
        return {k: accuracy for (k, _), accuracy in found.items()}


def search_data(device: torch.device, bank: int = 50_000, queries: int = 10_000) -> Search:
    """Return the data of the rows about k-NN."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(10, 512, generator=generator)

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        noise = torch.randn(count, 512, generator=generator)
        return F.normalize(0.3 * classes[labels] + noise, dim=1).to(device), labels.to(device)

    return Search(*rows(bank), *rows(queries))


def nearest_neighbors(device: torch.device, **sizes: int) -> Pair:
    """Compute the k-NN accuracy for seven values of k.

    Raises:
        SystemExit: the accuracies of hf_ssl and lightly differ.
    """
    from lightly.utils.benchmarking import knn_predict

    data = search_data(device, **sizes)

    def peer() -> dict[int, float]:
        return {k: _accuracy(knn_predict, *data, k) for k in NEIGHBORS}

    mine, theirs = data.seven_k(), peer()
    for k in NEIGHBORS:
        if abs(mine[k] - theirs[k]) > 1.5 / len(data.labels):  # allows one query in which two classes tie
            raise SystemExit(f"k-NN: expected lightly's accuracy {theirs[k]} at k = {k}, got {mine[k]}")
    return Pair(data.seven_k, peer)


def matrix_product(device: torch.device, **sizes: int) -> Pair:
    """Compare k-NN for seven values of k with the float32 product of queries and bank alone."""
    data = search_data(device, **sizes)

    def peer() -> None:
        for queries in data.queries.split(1024):
            torch.mm(queries, data.bank.T, out=buffer[: len(queries)])

    buffer = data.bank.new_empty(min(1024, len(data.queries)), len(data.bank))
    return Pair(data.seven_k, peer)


def flat_index(device: torch.device, **sizes: int) -> Pair:
    """Compare k-NN for seven values of k with a search for the nearest 200 by faiss.

    Raises:
        SystemExit: the neighbors of hf_ssl and faiss differ.
    """
    import faiss

    data = search_data(device, **sizes)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(data.bank.shape[1])
    index.add(data.bank.numpy())
    _, theirs = index.search(data.queries[:100].numpy(), max(NEIGHBORS))
    _, mine = nearest(data.bank, data.queries[:100], max(NEIGHBORS))
    if (mine.numpy() != theirs).mean() > 0.01:  # rounding can exchange neighbors
        raise SystemExit("k-NN: expected the neighbors that faiss finds, got others")
    return Pair(data.seven_k, lambda: index.search(data.queries.numpy(), max(NEIGHBORS)))


def probe_sweep(device: torch.device, images: int = 10_000, size: int = 384) -> Pair:
    """Train the linear heads of 13 learning rates and four features for one epoch on cached features.

    Raises:
        SystemExit: the heads of hf_ssl and of the loop differ.
    """
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (images,), generator=generator).to(device)
    wide = torch.randn(images, 5 * size, generator=generator).to(device)
    columns = ((3, 4), (3, 5), (0, 4), (0, 5))  # of DINOv2's grid
    grid = [wide[:, first * size : end * size] for first, end in columns]
    batch = 256

    def ours() -> list[torch.Tensor]:
        return [
            train_heads(rows, labels, 10, LEARNING_RATES, 1, batch, torch.Generator().manual_seed(0))
            for rows in grid
        ]

    def one_head(rows: torch.Tensor, rate: float) -> torch.Tensor:
        head = torch.nn.Linear(rows.shape[1], 10, device=device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=rate, momentum=0.9)
        steps = -(-images // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        order = torch.randperm(images, generator=torch.Generator().manual_seed(0)).to(device)
        for index in order.split(batch):
            optimizer.zero_grad()
            F.cross_entropy(head(rows[index]), labels[index]).backward()
            optimizer.step()
            schedule.step()
        return head.weight.detach()

    def peer() -> list[list[torch.Tensor]]:
        return [[one_head(rows, rate) for rate in LEARNING_RATES] for rows in grid]

    for mine, theirs in zip(ours(), peer(), strict=True):
        if not torch.allclose(mine[:-1, 0].T, theirs[0], atol=1e-4):  # larger rates amplify rounding
            raise SystemExit("linear probe: expected the heads of torch.optim.SGD, got others")
    return Pair(ours, peer, 52, 52)


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
    Row(
        "knn_product",
        "the same k-NN",
        "one float32 product of queries and bank (the target 0.87 allows 1.15 times its time)",
        0.87,
        matrix_product,
        "search",
        None,
        3,
        accelerator=True,
        precision="float32",
    ),
    Row(
        "knn_faiss",
        "the same k-NN",
        "faiss-cpu, flat index, nearest 200 (the target 0.59 allows 1.7 times its time)",
        0.59,
        flat_index,
        "search",
        None,
        3,
    ),
    Row(
        "probe",
        "linear probe, 13 learning rates and 4 features, 10,000 cached features of a ViT-S",
        "a loop over both with torch.optim.SGD",
        5,
        probe_sweep,
        "head",
        None,
        3,
        accelerator=True,
    ),
    Row("help", "hf-ssl --help", "import torch", 10, start_up, "start", None, 5),
]
