# SPDX-License-Identifier: Apache-2.0
"""An online probe: a linear classifier that is trained beside the encoder and does not change it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import skip_init
from torch.optim import SGD
from transformers import PreTrainedModel

from hf_ssl.data import LabeledImages
from hf_ssl.data.class_numbers import matching_numbers
from hf_ssl.data.training_labels import TrainingLabels
from hf_ssl.errors import UserError
from hf_ssl.evaluation.config import MOMENTUM
from hf_ssl.evaluation.scores import is_right
from hf_ssl.modeling.backbones import encode_without_columns
from hf_ssl.modeling.configuration import cosine_factor
from hf_ssl.modeling.eval_mode import evaluation_mode
from hf_ssl.modeling.gather import gather
from hf_ssl.precision import autocast

FILE = "online_probe.pt"
logger = logging.getLogger(__name__)


class OnlineProbe:
    """A linear classifier on the features of the first view of each training image.

    The features are those of the encoder that is exported. The encoder computes them in eval mode and without
    gradient, as in an evaluation. This costs one more forward pass of one view. All processes train the same
    classifier on the images of all processes.

    The weights start at zero. They are trained with SGD, momentum 0.9, without weight decay. The learning
    rate decays to zero along a cosine over the run.

    Source: solo-learn, solo/methods/base.py, whose online classifier also has no weight decay. Differences:
    solo-learn uses the features of all large views in training mode, and the optimizer and the schedule of
    the encoder.

    Args:
        labels: the labels of the training images.
        learning_rate: initial learning rate (`classifier_lr` of solo-learn).
        dtype: returns the autocast precision of the encoder; None disables autocast.
    """

    def __init__(
        self, labels: TrainingLabels, learning_rate: float, dtype: Callable[[], torch.dtype | None]
    ) -> None:
        self.labels, self.learning_rate, self.dtype = labels, learning_rate, dtype
        self.classifier: nn.Linear | None = None
        self._reset()

    def _reset(self) -> None:
        self._parts: list[tuple[Tensor, Tensor]] = []
        self._counts: Tensor | None = None  # correct and all labels since the last log record

    def _build(self, size: int, device: torch.device) -> tuple[nn.Linear, SGD]:
        """Return the classifier of features of this size, and its optimizer."""
        if self.classifier is None:
            # torch's own initialization would change the global random state.
            self.classifier = skip_init(nn.Linear, size, len(self.labels.class_names), device=device)
            for parameter in self.classifier.parameters():
                nn.init.zeros_(parameter)
            self._optimizer = SGD(self.classifier.parameters(), lr=self.learning_rate, momentum=MOMENTUM)
        return self.classifier, self._optimizer

    def add(self, encoder: PreTrainedModel, images: Tensor, labels: Tensor) -> None:
        """Compute the features of a micro-batch for the next `step`.

        Args:
            encoder: the encoder that is exported.
            images: (B, C, H, W) views, normalized.
            labels: (B,) int64, -1 for images without a label.
        """
        with evaluation_mode(encoder), autocast(images.device, self.dtype()):
            features = encode_without_columns(encoder, images).float()
        self._parts.append((features.clone(), labels.to(images.device, non_blocking=True)))

    def step(self, fraction: float) -> None:
        """Train the classifier with the micro-batches of an optimizer step of the encoder.

        Args:
            fraction: completed share of the run, from 0 to 1.
        """
        features, labels = (gather(torch.cat(parts)) for parts in zip(*self._parts, strict=True))
        self._parts = []
        classifier, optimizer = self._build(features.shape[1], features.device)
        optimizer.param_groups[0]["lr"] = self.learning_rate * cosine_factor(fraction, 1)
        logits, known = classifier(features), (labels >= 0).sum()
        counts = torch.stack([is_right(logits, labels).sum(), known])
        self._counts = counts if self._counts is None else self._counts + counts
        loss = cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / known.clamp_min(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def take(self) -> dict[str, float]:
        """Return the accuracy on training views since the last call, measured before each step.

        This method waits for the device.
        """
        correct, known = (0, 0) if self._counts is None else self._counts.tolist()
        self._counts = None
        return {"online_probe_train": correct / known} if known else {}

    @torch.no_grad()
    def accuracy(self, features: Tensor, images: LabeledImages) -> float:
        """Return the accuracy, from 0 to 1, on images that are not augmented.

        Before the first step, it is the accuracy of a random guess, 1 / K.

        Args:
            features: (N, D) of the encoder that is exported.
            images: the N images, which have one label each.

        Raises:
            UserError: the training images lack a class of these images.
        """
        own, labels = self.labels.class_names, images.labels
        missing = [name for i in labels.unique().tolist() if (name := images.class_names[i]) not in own]
        if missing:
            raise UserError(
                "training.online_probe: expected the classes of the training images in "
                f"{images.description}, got {missing[0]}; use training.online_probe=false"
            )
        if self.classifier is None:
            return 1 / len(own)
        numbers = torch.from_numpy(matching_numbers(images.class_names, own))
        scores = self.classifier(features.to(self.classifier.weight.device)).cpu()
        return is_right(scores, numbers[labels]).double().mean().item()

    def save(self, folder: Path) -> None:
        """Write the state to a checkpoint. Before the first step, the method writes nothing."""
        if self.classifier is not None:
            state = {
                "classifier": self.classifier.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "counts": self._counts,
            }
            torch.save(state, folder / FILE)

    def load(self, folder: Path, device: torch.device) -> None:
        """Load the state of a checkpoint. The probe starts again if the checkpoint contains none.

        Args:
            folder: the folder of the checkpoint.
            device: the device of the encoder.

        Raises:
            RuntimeError: the classifier of the checkpoint has other features or classes.
        """
        self.classifier = None
        self._reset()
        if not (folder / FILE).exists():
            logger.warning("the online probe starts from zero weights, because %s contains none", folder.name)
            return
        state: dict[str, Any] = torch.load(folder / FILE, map_location=device, weights_only=True)
        classifier, optimizer = self._build(state["classifier"]["weight"].shape[1], device)
        classifier.load_state_dict(state["classifier"])
        optimizer.load_state_dict(state["optimizer"])
        self._counts = state["counts"]
