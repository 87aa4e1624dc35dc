# SPDX-License-Identifier: Apache-2.0
"""Example facts of a run, with the results of a real evaluation of random features."""

import copy
from functools import cache
from typing import Any

import torch

from hf_ssl.evaluation import EncoderResult, EvaluationConfig, evaluate_features


def measured(seed: int, signal: float) -> EncoderResult:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(120) % 4
    features = signal * torch.eye(4, 16)[labels] + torch.randn(120, 16, generator=generator)
    config = EvaluationConfig(
        protocols=["knn", "few_label_knn", "linear"],
        settings={
            "few_label_knn": {"labels_per_class": [1, 5], "draws": 3},
            "linear": {"epochs": 3, "learning_rates": [0.1, 1.0]},
        },
    )
    result = evaluate_features(config, features[:80], labels[:80], features[80:], labels[80:])
    result["features"] = "pooler_output, 16 numbers, images of 64 pixels, float32"
    return result


@cache
def _facts() -> dict[str, Any]:
    raw = measured(2, 0.5)
    raw["protocols"] = [each for each in raw["protocols"] if each["protocol"] != "linear"]
    return {
        "hf_ssl_version": "0.1.0",
        "date": "2026-11-21T10:00:00+00:00",
        "name": "my-encoder",
        "repo_id": None,
        "title": "SimCLR ResNet-18 on cifar10",
        "license": "apache-2.0",
        "tags": ["cifar"],
        "method": {
            "name": "simclr",
            "title": "SimCLR",
            "summary": "Views of one image attract each other.",
            "paper": "Chen et al., 2020, arXiv:2002.05709",
            "config": {"temperature": 0.5, "projection_size": 128},
        },
        "backbone": {
            "class_name": "ResNetModel",
            "model_type": "resnet",
            "config": {"depths": [2, 2, 2, 2]},
            "parameters": 11176512,
            "feature_size": 512,
            "image_size": 64,
            "channels": 3,
            "pooling": "pooler",
            "base_model": None,
        },
        "recipe": {
            "name": "simclr_cifar10_cpu",
            "sections": {
                "data": {"path": "/home/jane/data sets/cifar10", "split": "train"},
                "training": {
                    "output_dir": "/home/jane/runs/my-encoder",
                    "hub_token": "hf_" + "a" * 30,
                    "seed": 3,
                },
                "evaluation": {"path": None},
            },
            "overrides": ["data.path=/home/jane/data sets/cifar10", "training.max_steps=400"],
            "differences": {"method.temperature": 0.5, "views.size": 32, "views.mean": [0.49, 0.48, 0.45]},
        },
        "views": {"size": 32, "enlarge": 64},
        "data": {
            "name": "cifar10",
            "hub_id": None,
            "config": None,
            "split": "train",
            "revision": "0123456789abcdef",
            "images": 50000,
            "streaming": False,
            "broken": 0,
            "license": None,
        },
        "training": {
            "steps": 400,
            "epochs": 2.048,
            "batch_size": 256,
            "images_seen": 102400,
            "optimizer": "sgd",
            "learning_rate": 0.12,
            "learning_rate_rule": "none",
            "weight_decay": 0.0005,
            "precision": "bfloat16",
            "processes": 1,
            "seed": 3,
            "seconds": 1100.4,
            "images_per_second": 93.05,
            "final_loss": 4.1234,
            "resumed": 0,
            "selection": None,
        },
        "monitor": {
            "history": [
                {"step": 0, "knn": 0.34, "embedding_std": 0.61, "rank_me": 40.0},
                {"step": 400, "knn": 0.41, "embedding_std": 0.93, "rank_me": 130.5},
            ],
            "alarm": None,
            "test_images": 1000,
        },
        "environment": {
            "python": "3.11.7",
            "packages": {"torch": "2.15.0", "transformers": "5.23.0"},
            "device": "AMD EPYC",
            "devices": 1,
            "cores": 2,
            "memory_gib": 31.2,
        },
        "evaluation": {
            "name": "cifar10",
            "hub_id": None,
            "config": None,
            "revision": "0123456789abcdef",
            "train_split": "train",
            "test_split": "test",
            "broken": 0,
        },
        "unmeasured": None,
        "results": {"trained": measured(0, 3.0), "untrained": measured(1, 1.0), "raw_pixels": raw},
        "pictures": {},
    }


def new_facts() -> dict[str, Any]:
    """Return the facts of a run as `hf_ssl.recording` collects them; each call returns its own copy.

    New facts need no entry here, because they have a `Default`.
    """
    return copy.deepcopy(_facts())
