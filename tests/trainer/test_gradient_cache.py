# SPDX-License-Identifier: Apache-2.0
"""Embedding a batch in chunks changes neither its loss nor its gradient."""

from contextlib import nullcontext
from functools import cache, partial
from itertools import product

import pytest
import torch
from forks import Forks
from messages import mentions
from priming import prime
from tiers import in_tiers
from torch import Tensor

from hf_ssl.data import open_source, train_loader
from hf_ssl.data.batch import LoadedBatch
from hf_ssl.errors import UserError
from hf_ssl.methods import METHODS
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model, build_trainer
from hf_ssl.trainer.gradient_cache import cached_backward, check_chunking

BATCH = 12
VIT = (
    "backbone={model_type: vit, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 4, "
    "intermediate_size: 32, patch_size: 8, hidden_dropout_prob: %s}"
)


@cache
def first_batch(method: str) -> LoadedBatch:
    recipe = load_recipe(f"smoke/{method}", [])
    loader = train_loader(
        open_source(recipe.data), recipe.views, config=recipe.data, seed=0, batch_size=BATCH
    )
    return next(iter(loader))


@pytest.fixture
def loaded() -> LoadedBatch:
    return first_batch("simclr")


def without_batch_norm(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.modules.batchnorm._BatchNorm):
                setattr(module, name, torch.nn.GroupNorm(1, child.num_features))
    return model


def without_dropout(method: str) -> str | None:
    """Return a ViT without dropout, or None (the recipe's own encoder) for a method that trains none."""
    known = load_recipe(f"smoke/{method}").model_class.backbone_types
    return VIT % 0.0 if known is None or "vit" in known else None


def build(method: str, backbone: str | None = None, *, batch_norm: bool = False):
    model = build_model(load_recipe(f"smoke/{method}", [backbone] if backbone else []), seed=0)
    return (model if batch_norm else without_batch_norm(model)).double().train()


def in_double(part, model=None) -> dict[str, Tensor]:
    """Return the inputs of a model in float64, with its masks if it is given."""
    inputs = part.inputs("cpu") if model is None else part.inputs("cpu", model.sample_masks)
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cached(model, loaded, size, *, backward=Tensor.backward, precision=nullcontext):
    chunks = [partial(in_double, part, model) for part in loaded.split(size)]
    return cached_backward(model, chunks, backward=backward, precision=precision)


# Every method with chunks of which the last is smaller, and one method with chunks of every kind.
SIZES = (1, 5, 6, 12, 40)
SAMPLED = [*product(list(METHODS)[::3], [5]), *product(["simclr"], (1, 6, 12, 40))]


@pytest.mark.parametrize(("method", "size"), in_tiers(product(METHODS, SIZES), SAMPLED))
def test_loss_and_gradient_are_those_of_the_whole_batch(method, size):
    loaded = first_batch(method)
    whole, chunked = (build(method, without_dropout(method)) for _ in range(2))
    if not whole.couples_samples:
        named = mentions("training.contrastive_chunk_size", type(whole).__name__)
        with pytest.raises(UserError, match=named):
            check_chunking(whole)
        return
    for model in (whole, chunked):
        prime(model, in_double(loaded, model))
    expected = whole(**in_double(loaded, whole))
    expected.loss.backward()
    output = cached(chunked, loaded, size)
    torch.testing.assert_close(output.loss, expected.loss.detach(), rtol=0, atol=1e-10)
    wanted, got = gradients(whole), gradients(chunked)
    assert wanted.keys() == got.keys() and any(value.abs().max() > 1e-4 for value in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10, msg=name)
    assert output.terms.keys() == expected.terms.keys()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(chunked.state_dict()[name], value, msg=name)


def drawing(objective, embeddings):
    torch.rand(1)
    return objective(embeddings)


@pytest.mark.parametrize("backbone", [VIT % 0.3, None], ids=["dropout", "batch-norm"])
def test_random_draws_and_statistics_are_those_of_the_chunks(backbone, loaded):
    """Dropout is drawn once and replayed; BatchNorm normalizes a chunk with its own statistics, in both
    passes, and counts it once."""
    whole, chunked = (build("simclr", backbone, batch_norm=True) for _ in range(2))
    for model in (whole, chunked):  # a loss that draws, after the embeddings
        model.objective = partial(drawing, model.objective)
    torch.manual_seed(1)
    parts = [whole.embed(in_double(part)) for part in loaded.split(4)]
    expected = whole.objective({name: torch.cat([part[name] for part in parts]) for name in parts[0]}).loss
    expected.backward()
    after = torch.rand(3)
    torch.manual_seed(1)
    output = cached(chunked, loaded, 4)
    assert torch.equal(torch.rand(3), after)
    torch.testing.assert_close(output.loss, expected.detach(), rtol=0, atol=1e-10)
    for name, value in gradients(whole).items():
        torch.testing.assert_close(gradients(chunked)[name], value, rtol=0, atol=1e-10, msg=name)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(chunked.state_dict()[name], value, rtol=0, atol=1e-12, msg=name)
    assert all(
        layer.track_running_stats
        for layer in chunked.modules()
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    )


def test_under_autocast_every_parameter_gets_its_gradient(loaded):
    """Autocast keeps weights that it has cast: those of the pass without a graph must not serve the other."""
    whole, chunked = (without_batch_norm(build_model(load_recipe("smoke/simclr", []), seed=0)) for _ in "ab")
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    with autocast():
        expected = whole.train()(**loaded.inputs("cpu")).loss
    expected.backward()
    chunks = [partial(part.inputs, "cpu") for part in loaded.split(5)]
    output = cached_backward(chunked.train(), chunks, backward=Tensor.backward, precision=autocast)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-2)
    wanted, got = gradients(whole), gradients(chunked)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        error = (got[name] - value).norm() / value.norm().clamp_min(1e-3)
        assert error < 0.1, f"{name}: {error}"


def test_a_scaled_loss_scales_the_gradient_and_gradients_add_up(loaded):
    model, scaled = (build("simclr", VIT % 0.0) for _ in range(2))
    cached(model, loaded, 5)
    cached(scaled, loaded, 5, backward=lambda loss: (2 * loss).backward())
    cached(scaled, loaded, 4)
    for name, value in gradients(model).items():
        torch.testing.assert_close(gradients(scaled)[name], 3 * value, rtol=1e-9, atol=1e-12, msg=name)


def test_activations_of_one_chunk_exist_at_a_time(loaded):
    """Counted: the rows that the backbone sees at once, and how often each image is encoded."""
    model = build("simclr")
    seen = []
    model.backbone.register_forward_hook(
        lambda module, arguments, output: seen.append(len(output.last_hidden_state))
    )
    cached(model, loaded, 5)
    assert seen == [10, 10, 4] * 2


def test_the_trainer_embeds_chunks_in_its_own_precision(tmp_path):
    """bf16 is accelerate's, which puts it around `forward` alone; chunks do not go through that."""
    overrides = ["training.bf16=true", "training.contrastive_chunk_size=5", "training.monitor_steps=0"]
    recipe = load_recipe("smoke/simclr", [*overrides, f"training.output_dir={tmp_path}"])
    trainer = build_trainer(recipe, recipe.training_arguments())
    seen = []
    trainer.method.projector[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}


def test_a_loss_that_compares_no_images_needs_no_chunks(tmp_path):
    overrides = ["training.contrastive_chunk_size=5", f"training.output_dir={tmp_path}"]
    recipe = load_recipe("smoke/byol", overrides)
    advice = "training.gradient_accumulation_steps"
    with pytest.raises(
        UserError, match=mentions("training.contrastive_chunk_size", "BYOLForPreTraining", advice)
    ):
        build_trainer(recipe, recipe.training_arguments())


RANK = """
import sys; sys.path.insert(0, sys.argv[2])
import torch, torch.distributed as dist
from functools import cache, partial
from hf_ssl.modeling.gather import average_gradients
from tests_trainer_gradient_cache import build, cached, gradients, VIT
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
half = torch.load(f"{folder}/batch.pt", weights_only=False).split(6)[rank]
model = build("simclr", VIT % 0.0)
loss = cached(model, half, 4).loss
average_gradients(model.parameters())
torch.save((loss, gradients(model)), f"{folder}/{rank}.pt")
from hf_ssl.modeling.gather import finish_communication
finish_communication()
dist.destroy_process_group()
"""


def test_two_processes_in_chunks_equal_one_with_the_whole_batch(forks: Forks, loaded, tmp_path):
    torch.save(loaded, tmp_path / "batch.pt")
    (tmp_path / "tests_trainer_gradient_cache.py").write_text(open(__file__).read())
    ranks = forks.together("hf_ssl", RANK, [[str(rank), str(tmp_path)] for rank in range(2)])
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-3000:]
    whole = build("simclr", VIT % 0.0)
    expected = whole(**in_double(loaded)).loss
    expected.backward()
    for rank in range(2):
        loss, got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-10)
        for name, value in gradients(whole).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-10, msg=name)
