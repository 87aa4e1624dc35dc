# SPDX-License-Identifier: Apache-2.0
"""Synchronized BatchNorm in two gloo processes equals torch's own in one process."""

import copy

import pytest
import torch
from forks import Forks
from messages import mentions
from timm.layers import BatchNormAct2d
from torch import nn

from hf_ssl.errors import UserError
from hf_ssl.modeling.batch_norm import (
    BatchNorm1dWithoutOffset,
    SynchronizedBatchNorm,
    split_batch_norm,
    synchronize_batch_norm,
    uses_global_batch_statistics,
)
from hf_ssl.modeling.gather import shuffle_over_processes

SCRIPT = """
import sys, torch, torch.distributed as dist
from torch import nn
from hf_ssl.modeling.batch_norm import synchronize_batch_norm
from hf_ssl.modeling.gather import gather, shuffle_over_processes, sum_over_processes
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=False)
results = []
for layer, x, weight in given:
    synchronize_batch_norm(holder := nn.Sequential(layer).double())
    x = x.chunk(2)[rank].clone().requires_grad_()
    y = holder(x)
    everything = gather(y)
    (everything * weight).sum().backward()  # each process computes the whole loss: gradients are doubled
    results.append((y.detach(), x.grad / 2, everything.detach(), holder.state_dict()))
rows = torch.arange(8.0)[:, None].chunk(2)[rank]
dealt, restore = shuffle_over_processes(rows, seed=3)
results.append((dealt, restore(dealt * 10)))
torch.save(results, f"{folder}/{rank}.pt")
from hf_ssl.modeling.gather import finish_communication
finish_communication()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("momentum", [None, 0.0, 0.3])
def test_parts_of_a_batch_update_the_statistics_with_any_momentum(momentum: float | None) -> None:
    """`momentum=None` is the mean of all batches, and 0.0 keeps the statistics, as in torch."""
    plain, holder = nn.BatchNorm1d(3, momentum=momentum), nn.Sequential(nn.BatchNorm1d(3, momentum=momentum))
    split_batch_norm(holder, 2)
    for number in range(3):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        x = x.repeat_interleave(2, 0)  # both parts are equal, so their statistics are those of the batch
        plain(x[::2]), holder(x)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(holder[0].get_buffer(name), buffer)


def test_two_processes_equal_the_whole_batch(forks: Forks, tmp_path):
    generator = torch.Generator().manual_seed(0)
    cases = []
    for layer, shape in (
        (nn.BatchNorm1d(3), (8, 3)),
        (nn.BatchNorm2d(4, momentum=None), (6, 4, 5, 5)),
        (BatchNorm1dWithoutOffset(3), (4, 3)),
    ):
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 100  # a large mean
        cases.append((layer, x, torch.randn(shape, generator=generator, dtype=torch.float64)))
    torch.save(cases, tmp_path / "given.pt")
    ranks = forks.together("hf_ssl", SCRIPT, [[str(rank), str(tmp_path)] for rank in range(2)])
    assert [(rank.returncode, rank.stderr) for rank in ranks] == [(0, "")] * 2
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    (dealt, back), (other_dealt, other_back) = (part.pop() for part in parts)
    assert sorted(torch.cat([dealt, other_dealt]).flatten().tolist()) == list(range(8))
    assert any(row >= 4 for row in dealt) and any(row < 4 for row in dealt)  # rows of both processes
    assert torch.cat([back, other_back]).flatten().tolist() == [10.0 * row for row in range(8)]
    for (layer, x, weight), *halves in zip(cases, *parts, strict=True):
        layer, x = copy.deepcopy(layer).double(), x.clone().requires_grad_()
        y = layer(x)
        (y * weight).sum().backward()
        for index, expected in ((0, y.detach()), (1, x.grad)):
            got = torch.cat([half[index] for half in halves])
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        for half in halves:
            torch.testing.assert_close(half[2], y.detach(), rtol=1e-9, atol=1e-11)
            assert half[3].keys() == {f"0.{key}" for key in layer.state_dict()}
            for key, value in layer.state_dict().items():
                torch.testing.assert_close(half[3][f"0.{key}"], value, rtol=1e-9, atol=1e-11)


def test_in_one_process_it_is_ordinary_batch_norm():
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4, affine=False))
    )
    synchronized = copy.deepcopy(plain)
    synchronize_batch_norm(synchronized)
    assert isinstance(synchronized[1], SynchronizedBatchNorm)
    assert isinstance(synchronized[2][0], SynchronizedBatchNorm)
    x = torch.randn(4, 3, 2, 2)
    for training in (True, False):
        assert torch.equal(plain.train(training)(x), synchronized.train(training)(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, synchronized.state_dict()[name]), name
    with pytest.raises(ValueError, match=mentions(2, 1)):
        synchronized[1](torch.ones(3))


def test_without_offset_there_is_none():
    layer = BatchNorm1dWithoutOffset(3)
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    torch.testing.assert_close(layer(torch.randn(64, 3)).mean(0), torch.zeros(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4, 5)])
def test_parts_of_a_batch_are_normalized_separately(shape):
    """Sample i belongs to part i modulo 4; running statistics are the mean of what the parts alone leave."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    whole = kind(3).double()
    nn.init.uniform_(whole.weight)
    nn.init.uniform_(whole.bias)
    split_batch_norm(holder := nn.Sequential(copy.deepcopy(whole)), 4)
    got, expected, alone = holder(x), torch.empty_like(x), [copy.deepcopy(whole) for _ in range(4)]
    for part, layer in enumerate(alone):
        expected[part::4] = layer(x[part::4])
    torch.testing.assert_close(got, expected)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(layer, name) for layer in alone]).mean(0)
        torch.testing.assert_close(getattr(holder[0], name), mean)
    assert not uses_global_batch_statistics(holder) and uses_global_batch_statistics(whole)
    synchronize_batch_norm(holder)  # leaves it alone
    torch.testing.assert_close(holder.eval()(x), holder[0].eval()(x))
    assert holder.state_dict().keys() == nn.Sequential(whole).state_dict().keys()
    with pytest.raises(UserError, match=mentions("training.batch_size", 10, "method.batch_norm_splits=4")):
        holder.train()(x[:10])
    before = holder[0].running_mean.clone()
    holder[0].track_running_stats = False  # the gradient cache encodes a batch twice
    torch.testing.assert_close(holder(x), expected)
    assert torch.equal(holder[0].running_mean, before)


def test_shuffling_can_be_restored():
    rows = torch.randn(9, 2)
    dealt, restore = shuffle_over_processes(rows, seed=1)
    assert not torch.equal(dealt, rows) and torch.equal(restore(dealt), rows)
    assert torch.equal(shuffle_over_processes(rows, seed=1)[0], dealt)
    assert not torch.equal(shuffle_over_processes(rows, seed=2)[0], dealt)


@pytest.mark.parametrize("replace", [synchronize_batch_norm, lambda module: split_batch_norm(module, 2)])
def test_a_batch_norm_that_computes_more_is_an_error(replace):
    """timm's holds its activation: without it another network would be trained than is published."""
    holder = nn.Sequential(BatchNormAct2d(4))
    with pytest.raises(UserError, match=mentions("BatchNormAct2d")):
        replace(holder)
