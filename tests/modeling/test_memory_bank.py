# SPDX-License-Identifier: Apache-2.0
"""The memory bank against versions that handle one image at a time, and the banks of the authors' code."""

import json
import math

import numpy as np
import pytest
import torch
from forks import Forks
from messages import mentions
from methods.authors import (
    BANK_ROWS,
    MOMENTUM,
    TEMPERATURE,
    WIDTH,
    agree,
    embeddings,
    stored,
    unit_rows,
    wave,
)
from torch import nn

from hf_ssl.errors import UserError
from hf_ssl.losses import memory_nce, memory_scores, memory_softmax
from hf_ssl.methods.pirl.configuration_pirl import PIRLConfig
from hf_ssl.methods.pirl.modeling_pirl import PIRLForPreTraining
from hf_ssl.modeling.configuration import BankConfig
from hf_ssl.modeling.memory import ImageRows
from hf_ssl.modeling.memory_bank import MemoryBank, MemoryBankModel, NCEConstants
from hf_ssl.modeling.outputs import RunProgress, SSLOutput
from hf_ssl.random import FIRST_METHOD_NUMBER, image_seeds
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model, train

RESNET = {
    "model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1], "hidden_sizes": [6]
}  # fmt: skip


def seeds_of(count, epoch=0):
    return torch.from_numpy(image_seeds(3, epoch, np.arange(count, dtype=np.uint64)).view(np.int64))


@pytest.mark.parametrize("start", ["unit", "uniform"])
@pytest.mark.parametrize("dims", [7, 8])
def test_the_first_rows_are_random_and_a_function_of_the_seed(start, dims):
    bank = MemoryBank(3000, dims, start=start)
    rows = bank.rows.double()
    if start == "unit":
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(3000).double())
    else:
        assert rows.abs().max() <= math.sqrt(3 / dims) and rows.abs().max() > 0.99 * math.sqrt(3 / dims)
    # The mean of x x^T is the identity / D for both, up to the standard error of 3000 rows.
    torch.testing.assert_close(rows.T @ rows / 3000, torch.eye(dims).double() / dims, rtol=0, atol=0.015)
    assert rows.mean(0).abs().max() < 4 / math.sqrt(3000 * dims)
    assert torch.equal(bank.rows, MemoryBank(3000, dims, start=start).rows)
    assert torch.equal(bank.rows[:20], MemoryBank(20, dims, start=start).rows)
    for other in ({"seed": 1}, {"number": 1}):
        assert not torch.isclose(bank.rows, MemoryBank(3000, dims, start=start, **other).rows).all(1).any()


@pytest.mark.parametrize("start", ["unit", "uniform"])
def test_the_first_rows_depend_on_the_seed_of_the_run(start):
    def of_run(seed):
        recipe = load_recipe(
            "smoke/cmc", ["method.loss=nce", "method.negatives=4", f"method.bank_start={start}"]
        )
        return [bank.rows for bank in build_model(recipe, seed).banks]

    first, again, other = of_run(1), of_run(1), of_run(2)
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    for one in first:
        assert not any(torch.isclose(one, rows).all(1).any() for rows in other)


def test_making_a_bank_does_not_change_random_weights():
    weights = [built(bank_start=start).projector.weight for start in ("unit", "images")]
    assert torch.equal(*weights)


def test_a_run_fills_the_rows_of_all_images(tmp_path):
    """Also the rows of the images that do not fill a batch."""
    overrides = ["method.bank_start=images", "training.batch_size=500", "training.max_steps=1"]
    recipe = load_recipe("smoke/pirl", [*overrides, f"training.output_dir={tmp_path}"])
    rows = train(recipe).method.bank.rows
    assert len(rows) % 500 > 0
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(rows)))


def test_a_bank_of_images_starts_with_their_embeddings():
    model, batch = built(bank_start="images"), batch_of([3, 7, 1])
    assert model.needs_memory_warmup and not built().needs_memory_warmup
    assert not model.bank.rows.any()
    expected = model.embed(batch)["projections"]
    model.fill_memory(batch)
    torch.testing.assert_close(model.bank.rows[batch["sample_index"]], expected.detach())
    assert not model.bank.rows[[0, 2, 11]].any()


def test_the_first_training_batch_sets_the_constants_not_the_filling_of_the_bank():
    model = PIRLForPreTraining(
        PIRLConfig(
            backbone_config=RESNET, views={"size": 24, "count": 1}, projection_size=4, negatives=5,
            num_samples=12, bank_start="images", loss="vissl",
        )
    ).train()  # fmt: skip
    batch = {
        "pixel_values": torch.randn(3, 1, 3, 24, 24), "sample_index": torch.tensor([3, 7, 1]),
        **model.sample_masks(np.arange(3, dtype=np.uint64)),
    }  # fmt: skip
    model.fill_memory(batch)
    assert model.bank.rows.any() and not model.constants.are_set
    model(**batch)
    model.after_backward(RunProgress(step=0, total_steps=1, steps_per_epoch=1))
    assert model.constants.are_set


def test_random_rows_are_those_of_a_scalar_version():
    """Box-Muller with SplitMix64 in Python's own integers."""

    def uniform(seed, position):
        return splitmix64(seed, position) / 2**64 // 2**-53 * 2**-53

    for number, row in enumerate(MemoryBank(3, 5, seed=9).rows.tolist()):
        seed = int(image_seeds(9, 2**32, np.array([number], np.uint64))[0])
        pairs = [(uniform(seed, i), uniform(seed, 3 + i)) for i in range(3)]
        lengths = [math.sqrt(-2 * math.log(1 - first)) for first, _ in pairs]
        normal = [r * math.cos(2 * math.pi * second) for r, (_, second) in zip(lengths, pairs, strict=True)]
        normal += [r * math.sin(2 * math.pi * second) for r, (_, second) in zip(lengths, pairs, strict=True)]
        length = math.hypot(*normal[:5])
        assert row == pytest.approx([value / length for value in normal[:5]], abs=1e-6)


def splitmix64(seed, position):
    bits = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB % 2**64
    return bits ^ bits >> 31


@pytest.mark.parametrize("number", [0, 3])
def test_negatives_are_those_of_a_scalar_version(number):
    bank, seeds = MemoryBank(1000, 2), image_seeds(3, 1, np.arange(4, dtype=np.uint64))
    found = bank.draw(torch.from_numpy(seeds.view(np.int64)), 50, number)
    first = FIRST_METHOD_NUMBER + number * 2**32
    assert found.tolist() == [
        [(splitmix64(seed, first + i) >> 1) % 1000 for i in range(50)] for seed in seeds.tolist()
    ]


def test_negatives_depend_on_the_seed_of_the_image_and_on_the_draw_alone():
    bank, seeds = MemoryBank(30, 2), seeds_of(6)
    whole = bank.draw(seeds, 40)
    assert torch.equal(torch.cat([bank.draw(part, 40) for part in seeds.split(2)]), whole)
    assert torch.equal(bank.draw(seeds, 15), whole[:, :15])
    for other in (bank.draw(seeds, 40, 1), bank.draw(seeds_of(6, epoch=1), 40), whole.roll(1, 0)):
        assert (other == whole).float().mean() < 0.2


def test_every_row_is_drawn_equally_often():
    counts = torch.bincount(MemoryBank(100, 2).draw(seeds_of(1000), 100).flatten(), minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 149  # chi-square with 99 degrees of freedom, p = 0.001


def slow_update(rows, index, vectors, momentum):
    """Change one row after the other. The old rows are those before the batch."""
    before = [list(row) for row in rows]
    for number, vector in zip(index, vectors, strict=True):
        mixed = [momentum * a + (1 - momentum) * b for a, b in zip(before[number], vector, strict=True)]
        rows[number] = [value / math.hypot(*mixed) for value in mixed]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_moving_average(momentum):
    bank = MemoryBank(6, 3, momentum=momentum).double()
    slow, generator = bank.rows.tolist(), torch.Generator().manual_seed(0)
    for index in ([4, 0, 2], [1, 4, 4], [5, 5, 5], [3, 0, 1]):  # the last of equal numbers counts
        vectors = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        before = bank.rows.clone()
        bank.update(torch.tensor(index), vectors.requires_grad_())
        assert torch.equal(bank.rows, before)
        bank.write()
        slow_update(slow, index, vectors.tolist(), momentum)
        torch.testing.assert_close(bank.rows, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-14)
        assert not bank.rows.requires_grad
        bank.write()  # there is nothing left to write
        torch.testing.assert_close(bank.rows, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-14)
    bank.update(torch.tensor([0]), torch.ones(1, 3))
    bank.discard()
    bank.write()
    torch.testing.assert_close(bank.rows, torch.tensor(slow, dtype=torch.float64), rtol=0, atol=1e-14)


def test_rows_of_several_views_and_repeated_images():
    memory = ImageRows(2, 5, 3)
    memory.rows.zero_()
    new = torch.arange(24.0).view(2, 4, 3)
    memory.replace_rows(torch.tensor([3, 1, 3, 0]), new)
    for image, place in ((0, 3), (1, 1), (3, 2)):
        assert torch.equal(memory.rows[:, image], new[:, place])
    assert not memory.rows[:, [2, 4]].any()


@pytest.mark.parametrize(("precision", "dtype"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_half_precision(precision, dtype):
    """New rows are computed in float32 and then rounded."""
    bank, whole = MemoryBank(20, 4, precision=precision), MemoryBank(20, 4)
    assert bank.rows.dtype == dtype and torch.equal(bank.rows, whole.rows.to(dtype))
    whole.rows.copy_(bank.rows)
    vectors = unit_rows(wave(3, 4, phase=0.2)).float()
    for each in (bank, whole):
        each.update(torch.tensor([1, 5, 7]), vectors)
        each.write()
    assert torch.equal(bank.rows, whole.rows.to(dtype))
    loaded = MemoryBank(20, 4, precision=precision)
    loaded.load_state_dict(bank.state_dict())
    assert torch.equal(loaded.rows, bank.rows) and loaded.rows.dtype == dtype


def test_the_constants_are_those_of_the_first_batch():
    constants, scores = NCEConstants(2, temperature=0.5).double(), [wave(5, 7, phase=p) for p in (0.1, 0.2)]
    pairs = [(each[:, 0], each[:, 1:]) for each in scores]
    expected = [9 * sum(math.exp(2 * value) for value in each.flatten()) / 35 for each in scores]
    for number in range(2):
        agree(constants.get(number, *pairs[number], 9), expected[number], 1e-12)
    constants.update(*reversed(pairs), num_rows=9)
    constants.discard()
    constants.write()
    assert not constants.are_set
    constants.update(*pairs, num_rows=9)
    constants.write()
    constants.update(*reversed(pairs), num_rows=9)
    constants.write()
    loaded = NCEConstants(2, temperature=0.5).double()
    assert not loaded.are_set
    loaded.load_state_dict(constants.state_dict())
    for each in (constants, loaded):
        assert each.are_set
        agree(each.get(0, *pairs[1], 9), expected[0], 1e-12)
        agree(each.get(1, *pairs[0], 9), expected[1], 1e-12)


# The authors' code: three steps in float64.


def authors_bank(phase, normalized):
    bank = MemoryBank(BANK_ROWS, WIDTH, momentum=MOMENTUM).double()
    rows = wave(BANK_ROWS, WIDTH, phase=phase)
    bank.rows.copy_(unit_rows(rows) if normalized else rows / math.sqrt(WIDTH / 3))
    return bank


def authors_inputs(step):
    case = stored()["bank_inputs"]
    return torch.tensor(case["rows"][step]), torch.tensor(case["indices"][step])


@pytest.mark.parametrize("kind", ["nce", "softmax", "pycontrast"])
def test_instance_discrimination_of_the_authors(kind):
    case, constants = stored()["instance_discrimination"][kind], NCEConstants(1, TEMPERATURE).double()
    bank = authors_bank(1.1, True) if kind == "pycontrast" else authors_bank(0.9, False)
    for step, expected in enumerate(case["steps"]):
        (rows, indices), anchors = authors_inputs(step), embeddings(step, 3.0)
        scores = memory_scores(anchors, bank.rows, indices)
        pair = scores[:, 0], scores[:, 1:]
        if kind == "nce":
            z = constants.get(0, *pair, BANK_ROWS)
            loss = memory_nce(*pair, num_rows=BANK_ROWS, z=z, temperature=TEMPERATURE)
            agree(z, expected["z"])
        else:
            loss = memory_softmax(*pair, temperature=TEMPERATURE)
        constants.update(pair, num_rows=BANK_ROWS)
        bank.update(rows, anchors)
        agree(loss, expected["loss"])
        agree(torch.autograd.grad(loss, anchors)[0], expected["gradient"])
        for memory in (bank, constants):
            memory.write()
    agree(bank.rows, case["bank"], 1e-7)


@pytest.mark.parametrize("kind", ["nce", "softmax", "pycontrast"])
def test_two_banks_of_cmc(kind):
    case, constants = stored()["cmc"][kind], NCEConstants(2, TEMPERATURE).double()
    phases, normalized = ((1.2, 1.3), True) if kind == "pycontrast" else ((0.7, 0.8), False)
    banks = [authors_bank(phase, normalized) for phase in phases]
    for step, expected in enumerate(case["steps"]):
        (rows, indices), views = authors_inputs(step), [embeddings(step, phase) for phase in (1.0, 2.0)]
        losses, pairs = [], []
        for number, (view, bank) in enumerate(zip(views, reversed(banks), strict=True)):
            scores = memory_scores(view, bank.rows, indices)
            pairs.append((scores[:, 0], scores[:, 1:]))
            if kind == "nce":
                z = constants.get(number, *pairs[-1], BANK_ROWS)
                agree(z, expected[f"z_{('l', 'ab')[number]}"])
                losses.append(memory_nce(*pairs[-1], num_rows=BANK_ROWS, z=z, temperature=TEMPERATURE))
            else:
                losses.append(memory_softmax(*pairs[-1], temperature=TEMPERATURE))
        if kind == "pycontrast":
            agree(torch.stack(losses), expected["losses"])
        else:
            agree(torch.stack(losses), [expected["loss_l"], expected["loss_ab"]])
        constants.update(*pairs, num_rows=BANK_ROWS)
        constants.write()
        for bank, view in zip(banks, views, strict=True):
            bank.update(rows, view)
            bank.write()
    for bank, name in zip(banks, ("1", "2") if kind == "pycontrast" else ("l", "ab"), strict=True):
        agree(bank.rows, case[f"bank_{name}"], 1e-7)


# A method with a memory bank.


class InstanceConfig(BankConfig):
    model_type = "ssl_instances_of_this_test"
    num_samples: int = 12
    negatives: int = 5


class Instances(MemoryBankModel):
    """Instance discrimination with the softmax loss."""

    config_class = InstanceConfig
    memory_inputs = ("projections", "sample_index")

    def __init__(self, config):
        super().__init__(config)
        self.projector = nn.Linear(6, 4)
        self.bank = self.make_bank(4)
        self.post_init()

    def embed(self, inputs):
        vectors = nn.functional.normalize(self.project_views(inputs["pixel_values"])[:, 0], dim=1)
        return self.image_keys(inputs) | {"projections": vectors}

    def objective(self, embeddings):
        negatives = self.bank.draw(embeddings["draw_seeds"], self.config.negatives)
        indices = torch.cat((embeddings["sample_index"][:, None], negatives), dim=1)
        scores = memory_scores(embeddings["projections"], self.bank.rows, indices)
        loss = memory_softmax(scores[:, 0], scores[:, 1:], temperature=0.1)
        return SSLOutput(loss=loss, terms={}, embeddings=embeddings["projections"][:, None])

    def update_banks(self, embeddings):
        self.bank.update(embeddings["sample_index"], embeddings["projections"])


def built(**settings):
    torch.manual_seed(0)
    return Instances(InstanceConfig(backbone_config=RESNET, **settings)).double().train()


def batch_of(images, *, epoch=0):
    index = torch.tensor(images)
    return {
        "pixel_values": wave(len(images), 1, 3, 8, 8, phase=float(epoch))
        + index[:, None, None, None, None] / 9,
        "sample_index": index,
        "draw_seeds": seeds_of(12, epoch)[index],
    }


PROGRESS = RunProgress(step=0, total_steps=4, steps_per_epoch=2)


def step(model, *batches):
    """Make an optimizer step of micro-batches, as the trainer does. Return the losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1), []
    model.hooks_are_called = True
    for number, batch in enumerate(batches):
        model.ends_batch = number == len(batches) - 1
        loss = model(**batch).loss
        (loss / len(batches)).backward()
        losses.append(loss.item())
    model.after_backward(PROGRESS)
    optimizer.step()
    optimizer.zero_grad()
    return losses


def test_the_bank_changes_after_the_backward_pass_only():
    model, first = built(), batch_of([3, 7, 1])
    before = model.bank.rows.clone()
    expected = model.embed(first)["projections"].detach()
    step(model, first)
    changed = (model.bank.rows != before).any(1).nonzero().flatten().tolist()
    assert changed == [1, 3, 7]
    mixed = unit_rows(before[first["sample_index"]] + expected)
    torch.testing.assert_close(model.bank.rows[first["sample_index"]], mixed)


def test_micro_batches_write_once_and_draw_the_same_negatives(monkeypatch):
    """The encoder has BatchNorm, so the embeddings are given."""
    whole, parts = built(), built()
    batch = batch_of([3, 7, 1, 0, 4, 9])
    given = whole.embed(batch)["projections"].detach()
    for model in (whole, parts):
        monkeypatch.setattr(
            model, "embed",
            lambda inputs: {**inputs, "projections": inputs["pixel_values"]},
        )  # fmt: skip
        model.hooks_are_called = True
    batch["pixel_values"] = given[:, None, :, None, None].clone().requires_grad_()
    seen = []
    for model, size in ((whole, 6), (parts, 2)):
        losses = []
        for start in range(0, 6, size):
            model.ends_batch = start + size == 6
            part = {name: value[start : start + size] for name, value in batch.items()}
            embedded = {**part, "projections": part.pop("pixel_values")[:, 0, :, 0, 0]}
            losses.append(model.loss_from_embeddings(embedded).loss)
        torch.stack(losses).mean().backward()
        model.after_backward(PROGRESS)
        seen.append((torch.stack(losses).mean(), batch["pixel_values"].grad.clone()))
        batch["pixel_values"].grad = None
    torch.testing.assert_close(seen[0], seen[1])
    assert torch.equal(whole.bank.rows, parts.bank.rows)


def test_an_aborted_step_leaves_the_bank_as_it_was():
    model = built()
    before = model.bank.rows.clone()
    model.hooks_are_called = True
    model(**batch_of([3, 7, 1]))  # an error in the backward pass
    model.discard_batch()
    model.after_backward(PROGRESS)
    assert torch.equal(model.bank.rows, before)


def test_a_resumed_model_continues_exactly():
    whole, resumed = built(), built()
    for epoch in range(4):
        batch = batch_of([(3 * epoch + i) % 12 for i in range(4)], epoch=epoch)
        losses = step(whole, batch)
        if epoch == 1:
            resumed.load_state_dict(whole.state_dict())
        elif epoch > 1:
            assert step(resumed, batch) == losses
    assert torch.equal(whole.bank.rows, resumed.bank.rows)
    assert "bank.rows" in whole.state_dict()


def test_a_loaded_bank_keeps_its_settings(tmp_path):
    settings = {"bank_precision": "float16", "bank_momentum": 0.9, "bank_start": "uniform"}
    model = Instances(InstanceConfig(backbone_config=RESNET, **settings))
    assert model.bank.rows.norm(dim=1).std() > 0.1
    model.bank.rows.neg_()
    model.save_pretrained(tmp_path)
    loaded = Instances.from_pretrained(tmp_path).bank
    assert loaded.rows.dtype == torch.float16 and torch.equal(loaded.rows, model.bank.rows)
    assert loaded.momentum == 0.9


TWO_PROCESSES = """
import json, sys, torch, torch.distributed as dist
from hf_ssl.modeling.gather import finish_communication
from modeling.test_memory_bank import PROGRESS, built, halves, scores_of_first_batch
from hf_ssl.modeling.memory_bank import NCEConstants
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model, part = built(), halves()[rank]
model.loss_from_embeddings(part)
model.after_backward(PROGRESS)
z = NCEConstants(1, 0.5).get(0, *scores_of_first_batch()[rank], 9)
print(json.dumps([model.bank.rows.tolist(), z.item()]))
finish_communication()
dist.destroy_process_group()
"""


def halves():
    """Return embeddings of six images in two parts."""
    batch = batch_of([3, 7, 1, 0, 4, 9])
    whole = {**batch, "projections": unit_rows(wave(6, 4, phase=0.4))}
    return [{name: value[start : start + 3] for name, value in whole.items()} for start in (0, 3)]


def scores_of_first_batch():
    """Return positive and negative scores of two processes."""
    return [(part[:, 0], part[:, 1:]) for part in wave(6, 5, phase=0.3).split(3)]


def test_two_processes_hold_the_bank_and_the_constant_of_one(forks: Forks, tmp_path):
    one = built()
    one.loss_from_embeddings({name: torch.cat([half[name] for half in halves()]) for name in halves()[0]})
    one.after_backward(PROGRESS)
    z = NCEConstants(1, 0.5).get(
        0, *(torch.cat(part) for part in zip(*scores_of_first_batch(), strict=True)), 9
    )
    done = forks.together("hf_ssl", TWO_PROCESSES, [[str(rank), str(tmp_path)] for rank in range(2)])
    assert [part.returncode for part in done] == [0, 0], done[0].stderr[-3000:]
    for part in done:
        rows, constant = json.loads(part.stdout.splitlines()[-1])
        assert torch.equal(torch.tensor(rows, dtype=torch.float64), one.bank.rows)
        assert constant == pytest.approx(z.item(), rel=1e-12)


def test_more_negatives_than_rows():
    with pytest.raises(UserError, match=mentions("method.negatives", 12, 13)):
        built(negatives=13)
    assert built(negatives=12).bank.draw(seeds_of(2), 12).shape == (2, 12)


@pytest.mark.parametrize("missing", ["sample_index", "draw_seeds"])
def test_images_without_row_numbers_or_seeds(missing):
    batch = batch_of([0, 1])
    del batch[missing]
    with pytest.raises(ValueError, match=missing):
        built()(**batch)
