# SPDX-License-Identifier: Apache-2.0
"""Measures the memory of a contrastive step in chunks: `python -m training.benchmarks.chunking`.

The program runs a SimCLR step of ResNet-18 at 64 pixels (`training.contrastive_chunk_size`). Each combination
of batch and chunk runs in a new process. The peak memory should grow with the chunk. It should grow with the
batch only by the images and embeddings. The program writes chunking.json.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ResNetConfig

from hf_ssl import views
from hf_ssl.cards import environment
from hf_ssl.data import LoadedBatch
from hf_ssl.methods.simclr.configuration_simclr import SimCLRConfig
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.random import image_seeds
from hf_ssl.trainer.gradient_cache import cached_backward
from hf_ssl.views import ViewPreset
from training.benchmarks.images import as_tensor, small_images
from training.benchmarks.peak import measured_peak_mib
from training.benchmarks.report import RESULTS
from training.benchmarks.steps import RESNET18

BATCHES, CHUNKS = (128, 512), (32, 128, None)


def step(batch_size: int, chunk: int | None) -> dict[str, Any]:
    """Return the peak memory of a step in MiB and its seconds.

    Args:
        batch_size: images in the step.
        chunk: images in a chunk; None encodes the whole batch at once.
    """
    torch.manual_seed(0)
    preset = ViewPreset(size=32, enlarge=64)
    images = torch.stack([as_tensor(image) for image in small_images(64)]).repeat(batch_size // 64, 1, 1, 1)
    keys = np.arange(batch_size, dtype=np.uint64)
    seeds = image_seeds(0, 0, keys)
    batch = LoadedBatch(images, views.sample_parameters(seeds, preset, np.full((batch_size, 2), 32)), seeds)
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=ResNetConfig(**RESNET18)))
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def program() -> None:
        if chunk is None:
            model(**batch.inputs("cpu")).loss.backward()
        else:
            parts = [partial(part.inputs, "cpu") for part in batch.split(chunk)]
            cached_backward(model, parts, backward=torch.Tensor.backward, precision=nullcontext)

    start = time.perf_counter()
    peak = measured_peak_mib(program)
    return {"batch": batch_size, "chunk": chunk, "peak_mib": peak, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    records = []
    for batch_size in BATCHES:
        for chunk in CHUNKS:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                records.append(process.submit(step, batch_size, chunk).result())
            print(records[-1], flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    record = {"machine": environment(), "steps": records}
    (arguments.output / "chunking.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
