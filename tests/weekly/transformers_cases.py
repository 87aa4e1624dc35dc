# SPDX-License-Identifier: Apache-2.0
"""The common tests of transformers for all methods. `transformers_tests.py` copies this file."""

import copy
import unittest
from typing import Any, ClassVar

import numpy as np
import torch
from common.test_configuration_common import ConfigTester
from common.test_modeling_common import ModelTesterMixin, floats_tensor

import hf_ssl.auto  # noqa: F401
from hf_ssl.methods import METHODS
from hf_ssl.recipe import load_recipe

VIT = (
    "{model_type: vit, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 37, "
    "patch_size: %d}"
)
# Tests that do not apply, with the reason: (methods, beginning of the name) -> reason.
EVERY = tuple(METHODS)
NOT_APPLICABLE = {
    (
        EVERY,
        "test_model_get_set_embeddings",
    ): "the input embedding of an image encoder is a convolution, as in ViTMAE",
    (
        tuple(name for name in METHODS if name != "mae"),
        "test_eager_matches_sdpa_inference",
    ): "the test passes ViTMAE's noise to each model whose forward names it; "
    "tests/modeling/test_fast_layers.py compares implementations",
    (
        ("simclr", "moco_v3", "barlow_twins", "vicreg", "cpc", "cmc"),
        "test_batching_equivalence",
    ): "the loss compares the images of a batch, so it needs two and depends on all of them",
    **{
        (("cmc",), name): "its encoder is a ResNet, without attention weights and sequences"
        for name in (
            "test_attention_outputs",
            "test_hidden_states_output",
            "test_model_outputs_equivalence",
            "test_retain_grad_hidden_states_attentions",
        )
    },
    **{
        (("cmc",), name): "transformers has no activation checkpoints for a ResNet; "
        "tests/modeling/test_outputs_and_checkpoints.py tests ours"
        for name in (
            "test_gradient_checkpointing",
            "test_peft_gradient_checkpointing",
            "test_training_gradient_checkpointing",
            "test_training_gradient_checkpointing_use_reentrant_false",
            "test_training_gradient_checkpointing_use_reentrant_true",
        )
    },
    **{
        (("cmc",), name): "a checkpoint without the narrow encoders is an error"
        for name in ("test_correct_missing_keys", "test_model_weights_reload_no_missing_tied_weights")
    },
    (("moco", "swav"), "test_init_weights_can_init_buffers"): "a queue starts with random unit vectors",
}


class Tester:
    """What `ModelTesterMixin` asks: a config, inputs and sizes."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.batch_size, self.is_training = 4, True
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4
        config, inputs = self.prepare_config_and_inputs_for_common()
        backbone = config.backbone_config.to_dict()
        self.image_size, self.patch_size = backbone.get("image_size"), backbone.get("patch_size")
        tokens = {"mae": 4, "ijepa": inputs.get("context_patches", torch.empty(1, 0)).shape[1]}
        self.seq_length = 1 + tokens.get(method, 16)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        size = 8 if self.method == "ijepa" else 4
        known = METHODS[self.method].model_class().backbone_types
        takes_vit = (known is None or "vit" in known) and self.method != "cmc"
        backbone = [f"backbone={VIT % size}"] if takes_vit else []
        recipe = load_recipe(f"smoke/{self.method}", [*backbone, "data.channels=3"])
        config: Any = recipe.config()
        if recipe.model_class.needs_sample_index:
            config.num_samples = 64
        side = recipe.views.final_size
        model = recipe.model_class(copy.deepcopy(config))
        inputs = {"pixel_values": floats_tensor([self.batch_size, model.minimum_views, 3, side, side])}
        if model.needs_sample_index:
            inputs["sample_index"] = torch.arange(self.batch_size)
        return config, inputs | model.sample_masks(np.arange(self.batch_size, dtype=np.uint64))


def make_tests(method: str) -> type[unittest.TestCase]:
    class Test(ModelTesterMixin, unittest.TestCase):
        all_model_classes: ClassVar = (METHODS[method].model_class(),)
        test_resize_embeddings = False

        def setUp(self) -> None:
            for (methods, name), reason in NOT_APPLICABLE.items():
                if method in methods and self._testMethodName.startswith(name):
                    self.skipTest(reason)
            self.model_tester = Tester(method)
            self.config_tester = ConfigTester(
                self, config_class=METHODS[method].config_class(), has_text_modality=False
            )

        def test_config(self) -> None:
            self.config_tester.run_common_tests()

    Test.__name__ = Test.__qualname__ = f"Test_{method}"
    return Test


for _method in METHODS:
    globals()[f"Test_{_method}"] = make_tests(_method)
