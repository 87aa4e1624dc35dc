# SPDX-License-Identifier: Apache-2.0
"""Image classifiers on top of an encoder: their Python class, and which of their parameters are trained
(layer 1).

Legend: B images, D features, C channels, K classes, L blocks of the encoder.
"""

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, AutoModelForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging

from hf_ssl.errors import UserError, counted
from hf_ssl.modeling.backbones import freeze_unused
from hf_ssl.modeling.configuration import size_arguments
from hf_ssl.modeling.eval_mode import evaluation_mode, unchanged_random_state
from hf_ssl.modeling.parameter_groups import block_count, layer_depths, layer_scales, optimizer_groups
from hf_ssl.modeling.pooling import Pooling, pool

NOTHING, ENCODER = "none", "all"
"""The words for `freeze`: no parameter is frozen, or all parameters of the encoder are."""


class FeatureClassifier(nn.Module):
    """An encoder and a linear layer on its feature, if no class of transformers reads this feature.

    Args:
        encoder: a vision encoder of transformers.
        pooling: its feature, see `hf_ssl.modeling.pooling.pool`.
        features: D.
        classes: K.
    """

    def __init__(self, encoder: Any, pooling: Pooling, features: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.classifier = nn.Linear(features, classes)

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """Return the logits (B, K) of images (B, C, H, W)."""
        outputs = self.encoder(pixel_values=pixel_values, **size_arguments(self.encoder, pixel_values))
        features = pool(outputs, self.pooling, self.encoder)
        return ImageClassifierOutput(logits=self.classifier(features))


@dataclass
class Classifier:
    """A classifier with a new head, whose weights are zero as in the code of SimCLR.

    Attributes:
        model: the class of `AutoModelForImageClassification`, or a `FeatureClassifier`. The output of
            `model(pixel_values=images)` has `logits`.
        head: names of the parameters that do not come from the encoder.
    """

    model: Any
    head: set[str]

    @property
    def depths(self) -> dict[str, int]:
        """Return the depth of each parameter: 0 for the stem, 1 to L for blocks, L + 1 for the rest."""
        return layer_depths(name for name, _ in self.model.named_parameters())

    @property
    def blocks(self) -> int:
        """Return L, or 0 for an encoder without numbered blocks."""
        return block_count(name for name, _ in self.model.named_parameters())

    def freeze(self, part: str, where: str) -> None:
        """Freeze parameters.

        Args:
            part: "none"; "all" for all but the head; or a number K for the stem and the first K blocks.
            where: key of this value, for messages.

        Raises:
            UserError: the encoder has no numbered blocks, or fewer than K.
        """
        if part == NOTHING:
            return
        depths = self.depths
        if part != ENCODER and int(part) > self.blocks:
            found = counted(self.blocks, "block") if self.blocks else "no numbered blocks"
            raise UserError(
                f"{where}: expected a number of blocks that the encoder has, got {part} for "
                f"{type(self.model).__name__} with {found}; use {'a smaller one or ' * (self.blocks > 0)}all"
            )
        for name, parameter in self.model.named_parameters():
            if name not in self.head and (part == ENCODER or depths[name] <= int(part)):
                parameter.requires_grad_(False)

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, layer_decay: float, where: str
    ) -> list[dict[str, Any]]:
        """Return the parameter groups of the trained parameters (`optimizer_groups`).

        Args:
            learning_rate: learning rate of the head.
            weight_decay: weight decay of weights.
            layer_decay: see `layer_scales`.
            where: key of this value, for messages.

        Raises:
            UserError: layer decay is not 1 for an encoder without numbered blocks.
        """
        names = [name for name, _ in self.model.named_parameters()]
        scales = layer_scales(names, layer_decay, where, type(self.model).__name__)
        scales |= dict.fromkeys(self.head, 1.0)
        return optimizer_groups(self.model, learning_rate, weight_decay, scales)

    def frozen_modules(self) -> list[nn.Module]:
        """Return the largest modules all of whose parameters are frozen. Training keeps them in eval mode."""
        found: list[nn.Module] = []

        def visit(module: nn.Module) -> None:
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                found.append(module)
            elif parameters:
                for child in module.children():
                    visit(child)

        visit(self.model)
        return found


def new_classifier(
    encoder: Any, classes: int, pixels: Tensor, pooling: Pooling, *, native: bool = True
) -> Classifier:
    """Return a classifier of the evaluated feature of an encoder, on the device of its weights.

    The class is that of `AutoModelForImageClassification` if its head uses the same feature that all other
    protocols measure. The function tests this with one image. This is the case for ResNet, ConvNeXt, Swin,
    I-JEPA and ViT with the class token. Otherwise the class is `FeatureClassifier`, for example for MAE and
    DINOv2. For MAE, the class of transformers uses the class token, which no loss trained. For DINOv2, it
    also uses the mean of the patches. Some encoders have no class for classification.

    Args:
        encoder: the encoder, which does not change.
        classes: K.
        pixels: a processed image (1, C, H, W).
        pooling: the evaluated feature.
        native: False always selects `FeatureClassifier`, whose encoder can be exported.
    """
    device = pixels.device
    with evaluation_mode(encoder):
        weights = next(encoder.parameters()).dtype
        arguments = size_arguments(encoder, pixels)
        feature = pool(encoder(pixel_values=pixels.to(weights), **arguments), pooling, encoder).float()
    with unchanged_random_state(device):  # new layers draw weights, which become zero below
        fits = native and not any(arguments.values())  # the class gets no arguments
        found = _class_of_transformers(encoder, classes, pixels, feature) if fits else None
        if found is None:
            own = FeatureClassifier(trainable_copy(encoder), pooling, feature.shape[1], classes).to(device)
            found = Classifier(own, {"classifier.weight", "classifier.bias"})
    for name, module in found.model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" in found.head:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return found


def trainable_copy(encoder: Any) -> Any:
    """Return a float32 copy of an encoder, with gradients for all parameters that a loss can depend on."""
    copied = copy.deepcopy(encoder).float().requires_grad_(True)
    freeze_unused(copied)
    return copied


def _class_of_transformers(encoder: Any, classes: int, pixels: Tensor, feature: Tensor) -> Classifier | None:
    """Return the classifier of transformers, or None if there is none or its head uses another feature."""
    if type(encoder.config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return None
    with tempfile.TemporaryDirectory() as folder, _no_reports():
        # `encoder.save_pretrained` (transformers 5.24) writes nothing in all processes but the first one.
        encoder.config.save_pretrained(folder)
        weights = {key: value.detach().cpu().contiguous() for key, value in encoder.state_dict().items()}
        save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
        model, report = AutoModelForImageClassification.from_pretrained(
            folder,
            num_labels=classes,
            output_loading_info=True,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    head = set(report["missing_keys"])
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == classes and f"{name}.weight" in head
    ]
    if len(layers) != 1:
        return None
    model.to(pixels.device)
    inputs: list[Tensor] = []
    hook = layers[0].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    with evaluation_mode(model):
        model(pixel_values=pixels)
    hook.remove()
    same = inputs[0].shape == feature.shape and torch.allclose(inputs[0], feature, rtol=1e-2, atol=1e-3)
    return Classifier(model, head) if same else None


@contextmanager
def _no_reports() -> Iterator[None]:
    """Hide the bars of transformers, and its report about the missing weights of the new head."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
