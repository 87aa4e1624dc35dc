# SPDX-License-Identifier: Apache-2.0
"""PIRL against the numbers of the public code (authors.py), a slow loop of three steps, and its parts."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from messages import mentions
from methods.authors import (
    BANK_ROWS,
    MOMENTUM,
    NEGATIVES,
    TEMPERATURE,
    WIDTH,
    agree,
    embeddings,
    stored,
    unit_rows,
    wave,
    weights,
)
from torch import nn
from transformers import ViTConfig, ViTModel

from hf_ssl.errors import UserError
from hf_ssl.methods.pirl.configuration_pirl import PIRLConfig
from hf_ssl.methods.pirl.modeling_pirl import PIRLForPreTraining, _side_for_encoder, rotate
from hf_ssl.modeling.memory_bank import MemoryBank
from hf_ssl.modeling.outputs import RunProgress
from hf_ssl.random import image_seeds
from hf_ssl.recipe import load_recipe
from hf_ssl.views import cut_patches
from hf_ssl.views.patches import PATCH_COLUMNS

CASES = stored()
RESNET = {
    "model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1, 1],
    "hidden_sizes": [6, 5],
}  # fmt: skip
VIEWS = {"size": 24, "count": 1}
PROGRESS = RunProgress(step=0, total_steps=3, steps_per_epoch=3)


def built(**settings):
    torch.manual_seed(0)
    views = settings.pop("views", VIEWS)
    defaults = {"projection_size": WIDTH, "negatives": NEGATIVES, "num_samples": BANK_ROWS}
    config = PIRLConfig(backbone_config=RESNET, views=views, **(defaults | settings))
    return PIRLForPreTraining(config).double().train()


# The public code.


@pytest.mark.parametrize("kind", ["vissl_nce", "vissl_softmax", "pycontrast"])
def test_three_steps_of_the_losses_and_the_bank(kind, monkeypatch):
    case, model = CASES["pirl"][kind], built(loss=kind.removesuffix("_nce"))
    model.bank.rows.copy_(unit_rows(wave(BANK_ROWS, WIDTH, phase=1.1)))
    for step, expected in enumerate(case["steps"]):
        rows, indices = (CASES["bank_inputs"][name][step] for name in ("rows", "indices"))
        if kind == "pycontrast":
            leaves = {name: embeddings(step, phase) for name, phase in (("jigsaw", 4.0), ("image", 3.0))}
            drawn, vectors = [indices], leaves
        else:
            leaves = {
                name: (2 * wave(3, WIDTH, phase=phase + step)).requires_grad_()
                for name, phase in (("jigsaw", 4.0), ("image", 3.0))
            }
            drawn = CASES["bank_inputs"]["indices_of_two_terms"][step]
            vectors = {name: F.normalize(leaf, dim=1) for name, leaf in leaves.items()}
        monkeypatch.setattr(
            model.bank, "draw",
            lambda seeds, count, number, drawn=drawn: torch.tensor(drawn[number])[:, 1:],
        )  # fmt: skip
        assert [row[0] for row in indices] == rows
        output = model.loss_from_embeddings(
            {
                "projections": vectors["image"],
                "transformed": vectors["jigsaw"][:, None],
                "sample_index": torch.tensor(rows),
                "draw_seeds": torch.zeros(3, dtype=torch.int64),
            }
        )
        agree(output.loss, expected["loss"])
        for name, gradient in zip(leaves, torch.autograd.grad(output.loss, leaves.values()), strict=True):
            agree(output.terms[name], expected[f"loss_{name}"])
            agree(gradient, expected[f"gradient_{name}"])
        model.after_backward(PROGRESS)
        if kind == "vissl_nce":
            agree(model.constants.values[0], expected["z"])
    assert model.constants.are_set == (kind == "vissl_nce")
    agree(model.bank.rows, case["bank"], 1e-7)


@pytest.mark.parametrize("form", ["linear", "mlp"])
@pytest.mark.parametrize("source", ["pycontrast", "vissl"])
def test_heads(source, form):
    """The features have 5 dimensions, as those of the stored cases."""
    case, order = CASES["pirl_heads"][f"{source}_{form}"], list(range(9))
    model = built(head="linear" if form == "linear" else f"{source}_mlp")

    def fill(*modules):
        parameters = [parameter for module in modules for parameter in module.parameters()]
        for number, parameter in enumerate(parameters):
            parameter.data.copy_(weights(parameter.shape, number))

    fill(model.projector)
    fill(model.patch_projector, model.jigsaw_projector)
    patches, image = wave(18, 5, phase=6.0).view(2, 9, 5), wave(2, 5, phase=7.0)
    slots = torch.tensor(case.get("permutations", [order, order]))
    patches = torch.stack([each[slot] for each, slot in zip(patches, slots, strict=True)]).flatten(0, 1)
    for found, name in ((model.projector(image), "image"), (model.project_patches(patches), "jigsaw")):
        agree(unit_rows(found) if source == "pycontrast" else found, case[name])


def test_the_layout_of_255_pixels_is_that_of_the_public_code():
    layout = built(views={"size": 255, "count": 1}).layout
    assert (layout.cell, layout.sub_crop, layout.first) == ((85, 85), 64, (0, 0))
    assert CASES["pirl_layout"]["pycontrast"]["patch"] == [layout.size, layout.size]
    # PyContrast's offsets are from 0 to 21, and so are ours.
    model = built(views={"size": 255, "count": 1})
    table = model.sample_masks(image_seeds(0, 0, np.arange(300, dtype=np.uint64)))["patch_parameters"]
    columns = dict(zip(PATCH_COLUMNS, table.flatten(0, 1).T, strict=True))
    for name, cell in (("top", columns["cell"] // 3), ("left", columns["cell"] % 3)):
        assert sorted(set((columns[name] - 85 * cell).tolist())) == list(range(22))


# A slow loop.


class Loop:
    """PIRL with Python loops over images, patches and negatives, from section 3 of the paper and VISSL."""

    def __init__(self, model, loss):
        self.model, self.loss = copy.deepcopy(model), loss
        self.bank = {row: vector for row, vector in enumerate(model.bank.rows.clone())}
        self.z = None

    def encode(self, images):
        outputs = self.model.backbone(pixel_values=images)
        return outputs.pooler_output.flatten(1)

    def embed(self, batch):
        views, model = batch["pixel_values"], self.model
        image = model.projector(self.encode(views[:, 0]))
        patches = []
        for view, rows in zip(views[:, -1], batch["patch_parameters"], strict=True):
            for row in rows:
                top, left = (int(row[PATCH_COLUMNS.index(name)]) for name in ("top", "left"))
                patch = view[:, top : top + 6, left : left + 6]
                patches.append(F.interpolate(patch[None], size=8, mode="bilinear")[0])
        features = model.patch_projector[0](self.encode(torch.stack(patches)))
        jigsaw = [model.jigsaw_projector(torch.cat(list(part))) for part in features.split(9)]
        return {
            "jigsaw": [vector / vector.norm() for vector in jigsaw],
            "image": [vector / vector.norm() for vector in image],
        }

    def step(self, batch, rate):
        index = batch["sample_index"].tolist()
        embedded, losses = self.embed(batch), {}
        bank = MemoryBank(BANK_ROWS, 1)
        for term, (name, vectors) in enumerate(embedded.items()):
            number = 0 if self.loss == "pycontrast" else term
            drawn = bank.draw(batch["draw_seeds"], NEGATIVES, number).tolist()
            exponentials = [
                [torch.exp(vector @ self.bank[other] / TEMPERATURE) for other in (row, *others)]
                for vector, row, others in zip(vectors, index, drawn, strict=True)
            ]
            if self.loss == "vissl":
                if self.z is None:
                    every = [value.item() for values in exponentials for value in values]
                    self.z = BANK_ROWS * sum(every) / len(every)
                noise, total = NEGATIVES / BANK_ROWS, 0.0
                for own, *others in exponentials:
                    total = total - torch.log(own / self.z / (own / self.z + noise + 2**-23))
                    for other in others:
                        total = total - torch.log(noise / (other / self.z + noise + 2**-23))
            else:
                total = -sum(torch.log(values[0] / sum(values)) for values in exponentials)
            losses[name] = total / len(index)
        loss = 0.3 * losses["jigsaw"] + 0.7 * losses["image"]
        optimizer = torch.optim.SGD(self.model.parameters(), rate)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for row, vector in zip(index, embedded["image"], strict=True):
            mixed = MOMENTUM * self.bank[row] + (1 - MOMENTUM) * vector.detach()
            self.bank[row] = mixed / mixed.norm()
        return [loss.item(), losses["jigsaw"].item(), losses["image"].item()]


def batch_of(model, step, views=1, size=24):
    index = torch.tensor([[1, 4, 7, 2], [4, 0, 9, 3], [2, 7, 1, 8]][step])
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randn(4, views, 3, size, size, generator=generator, dtype=torch.float64)
    seeds = image_seeds(5, step, index.numpy().astype(np.uint64))
    return {"pixel_values": pixels, "sample_index": index, **model.sample_masks(seeds)}


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("loss", ["vissl", "vissl_softmax", "pycontrast"])
def test_three_steps_equal_a_slow_loop(loss, views):
    model = built(loss=loss, pretext_weight=0.3, views={"size": 24, "count": views})
    loop, rate = Loop(model, loss), 0.1
    optimizer = torch.optim.SGD(model.parameters(), rate)
    model.hooks_are_called = True
    for step in range(3):
        batch = batch_of(model, step, views)
        output = model(**batch)
        output.loss.backward()
        model.after_backward(PROGRESS)
        optimizer.step()
        optimizer.zero_grad()
        found = [output.loss.item(), output.terms["jigsaw"].item(), output.terms["image"].item()]
        assert found == pytest.approx(loop.step(batch, rate), rel=1e-10)
    torch.testing.assert_close(model.bank.rows, torch.stack(list(loop.bank.values())), rtol=0, atol=1e-10)
    for (name, ours), theirs in zip(model.named_parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=name)


# Pretexts.


def test_rotation_turns_each_image():
    images = torch.arange(5 * 2 * 4 * 4.0).view(5, 2, 4, 4)
    turns = [0, 3, 1, 2, 1]
    found = rotate(images, torch.tensor(turns))
    for image, result, turn in zip(images, found, turns, strict=True):
        for row in range(4):
            for column in range(4):
                y, x = row, column
                for _ in range(turn):  # back by one clockwise turn
                    y, x = x, 3 - y
                assert torch.equal(result[:, row, column], image[:, y, x])


def test_rotations_are_equally_frequent():
    turns = built(pretext="rotation").sample_masks(image_seeds(0, 0, np.arange(4000, dtype=np.uint64)))
    assert turns.keys() == {"draw_seeds", "rotations"}
    counts = torch.bincount(turns["rotations"], minlength=4)
    assert len(counts) == 4 and ((counts - 1000) ** 2 / 1000).sum() < 16.3  # chi-square, p = 0.001


@pytest.mark.parametrize(
    ("pretext", "terms"),
    [("jigsaw", ["jigsaw"]), ("rotation", ["rotation"]), ("jigsaw_rotation", ["jigsaw", "rotation"])],
)
def test_each_pretext_has_a_term_and_a_head(pretext, terms):
    model = built(pretext=pretext, pretext_weight=0.3, loss="pycontrast")
    batch = batch_of(model, 0)
    output = model(**batch)
    assert list(output.terms) == [*terms, "image"] and output.embeddings.shape == (4, 1 + len(terms), WIDTH)
    losses = {name: term.item() for name, term in output.terms.items()}
    expected = 0.3 * sum(losses[name] for name in terms) / len(terms) + 0.7 * losses["image"]
    assert output.loss.item() == pytest.approx(expected)
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    names = {name.partition(".")[0] for name, _ in model.named_parameters()}
    assert ("jigsaw_projector" in names) == ("jigsaw" in terms)
    assert ("rotation_projector" in names) == ("rotation" in terms)
    if "rotation" in terms:  # the rotated view has its own head
        turned = torch.stack(
            [view.rot90(int(turn), (1, 2)) for view, turn in zip(
                batch["pixel_values"][:, 0], batch["rotations"], strict=True
            )]
        )  # fmt: skip
        model.eval()
        expected = F.normalize(model.rotation_projector(model.encode_views(turned[:, None])[:, 0]), dim=1)
        torch.testing.assert_close(model.embed(batch)["transformed"][:, -1], expected)


def test_the_last_view_is_the_source_of_the_jigsaw():
    model = built(views={"size": 24, "count": 2}).eval()
    batch = batch_of(model, 0, views=2)
    first = model.embed(batch)
    batch["pixel_values"][:, 0] += 1
    other_image = model.embed(batch)
    batch["pixel_values"][:, 1] += torch.randn(24).double()
    other_source = model.embed(batch)
    assert torch.equal(first["transformed"], other_image["transformed"])
    assert not torch.isclose(first["projections"], other_image["projections"]).all()
    assert torch.equal(other_image["projections"], other_source["projections"])
    assert not torch.isclose(other_image["transformed"], other_source["transformed"]).all()


# Sizes of patches.


@pytest.mark.parametrize(
    ("backbone", "size", "sub_crop", "side"),
    [
        (RESNET, 24, 6, 8),  # stride 8
        (RESNET, 96, 24, 24),
        ({"model_type": "resnet"}, 64, 15, 32),
        ({"model_type": "convnextv2", "num_stages": 4}, 96, 24, 32),
        ({"model_type": "convnextv2", "num_stages": 4}, 192, 48, 48),
        ({"model_type": "vit", "patch_size": 16, "image_size": 96}, 96, 24, 32),
        ({"model_type": "vit", "patch_size": 8, "image_size": 96}, 96, 24, 24),
    ],
)  # fmt: skip
def test_patches_are_enlarged_for_the_encoder(backbone, size, sub_crop, side):
    small = {
        "resnet": {"layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4] * 4, "depths": [1] * 4},
        "convnextv2": {"hidden_sizes": [4] * 4, "depths": [1] * 4},
        "vit": {
            "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8,
        },
    }[backbone["model_type"]]  # fmt: skip
    config = PIRLConfig(
        backbone_config=small | backbone, views={"size": size, "count": 1}, num_samples=8, negatives=2
    )
    model = PIRLForPreTraining(config)
    assert (model.layout.sub_crop, model.patch_size) == (sub_crop, side)


@pytest.mark.parametrize(("patch_size", "side"), [(16, 32), ([16, 16], 32), ([8, 16], 32), ([8, 8], 24)])
def test_the_patch_size_of_the_encoder_can_be_a_pair(patch_size, side):
    backbone = ViTModel(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=96,
            patch_size=patch_size,
        )
    )  # fmt: skip
    assert _side_for_encoder(backbone, SimpleNamespace(size=24, image_shape=(3, 96, 96))) == side


@pytest.mark.parametrize(("enlarge", "side"), [(None, 5), (48, 10), (36, 7)])
def test_sub_crops_are_enlarged_with_the_view(enlarge, side):
    """`sub_crop` is in pixels before the enlargement, so it keeps its share of the view."""
    model = built(views={"size": 24, "count": 1, "enlarge": enlarge}, sub_crop=5)
    assert (model.layout.image_shape[1], model.layout.sub_crop) == (enlarge or 24, side)


@pytest.mark.parametrize("settings", [{}, {"pretext": "rotation"}, {"head": "vissl_mlp"}])
def test_a_stored_config_with_defaults_is_valid(settings, tmp_path):
    PIRLConfig(views=VIEWS, **settings).save_pretrained(tmp_path)
    loaded = PIRLConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == PIRLConfig(views=VIEWS, **settings).to_dict()


def test_patches_of_a_chosen_side():
    model = built(patch_size=12, sub_crop=4)
    batch = batch_of(model, 0)
    seen = []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    model(**batch)
    assert [tuple(each.shape) for each in seen] == [(4, 3, 24, 24), (36, 3, 12, 12)]
    preset = {"mean": [0.5] * 3, "std": [0.5] * 3}
    patches = cut_patches(batch["pixel_values"][:, 0], model.layout, batch["patch_parameters"], **preset)
    expected = F.interpolate(patches.flatten(0, 1), size=[12, 12], mode="bilinear")
    torch.testing.assert_close(seen[1].contiguous(), expected)


def test_patches_with_their_own_augmentation():
    """Constant colors in the view differ between patches, because each patch changes its colors."""
    views = {"size": 24, "count": 1, "jitter": 1.0, "brightness": 0.4, "blur": 0.5}
    for augmented in (False, True):
        model = built(views=views, patch_augmentation=augmented)
        batch = batch_of(model, 0)
        batch["pixel_values"][:] = 0.1
        patches = cut_patches(
            batch["pixel_values"][:, 0], model.layout, batch["patch_parameters"],
            mean=[0.5] * 3, std=[0.5] * 3,
        )  # fmt: skip
        assert (patches.mean((2, 3, 4)).std(1) > 0.01).all() == augmented
        assert model(**batch).loss.isfinite()


# Mistakes.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"negatives": 11}, ("method.negatives", 10, 11)),
        ({"sub_crop": 9}, ("method.sub_crop", 8, 9)),
        ({"sub_crop": 9, "views": {"size": 24, "count": 1, "enlarge": 48}}, ("method.sub_crop", 8, 9)),
        ({"views": {"size": 5, "count": 1}}, ("views.size", 6, 5)),
    ],
)
def test_mistakes(settings, words):
    with pytest.raises(UserError, match=mentions(*words)):
        built(**settings)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method.projection_hidden_size=7"], ("method.projection_hidden_size", "method.head=linear", 7)),
        (["method.pretext=rotation", "method.sub_crop=2"], ("method.sub_crop", "method.pretext=rotation", 2)),
        (
            ["method.pretext=rotation", "method.patch_size=8"],
            ("method.patch_size", "method.pretext=rotation", 8),
        ),
        (
            ["method.pretext=rotation", "method.patch_augmentation=true"],
            ("method.patch_augmentation", "method.pretext=rotation", True),
        ),
    ],
)
def test_settings_without_effect(overrides, words):
    with pytest.raises(UserError, match=mentions(*words)):
        load_recipe("smoke/pirl", overrides)


@pytest.mark.parametrize(
    ("pretext", "missing"),
    [("jigsaw", "patch_parameters"), ("rotation", "rotations"), ("jigsaw", "draw_seeds")],
)
def test_missing_inputs(pretext, missing):
    model = built(pretext=pretext)
    batch = batch_of(model, 0)
    del batch[missing]
    with pytest.raises(ValueError, match=mentions(missing, "sample_masks")):
        model(**batch)


def test_filling_the_bank_encodes_only_images():
    model = built(bank_start="images", pretext="jigsaw_rotation")
    batch, seen = batch_of(model, 0), []
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["pixel_values"].shape)), with_kwargs=True
    )
    model.fill_memory(batch)
    assert seen == [(4, 3, 24, 24)]
    assert model.bank.rows[batch["sample_index"]].norm(dim=1).tolist() == pytest.approx([1.0] * 4)


def test_without_an_image_term_the_bank_still_contains_images():
    model = built(pretext_weight=1.0, loss="pycontrast")
    batch = batch_of(model, 0)
    before = model.bank.rows.clone()
    image = model.embed(batch)["projections"]
    output = model(**batch)
    assert output.loss.item() == output.terms["jigsaw"].item()
    model.after_backward(PROGRESS)
    index = batch["sample_index"]
    torch.testing.assert_close(model.bank.rows[index], unit_rows(before[index] + image.detach()))


def test_equal_scores_give_the_logarithm_of_the_number_of_rows():
    model = built(loss="vissl_softmax").eval()
    nn.init.zeros_(model.projector[-1].weight)
    nn.init.ones_(model.projector[-1].bias)
    model.bank.rows.fill_(WIDTH**-0.5)
    assert model(**batch_of(model, 0)).terms["image"].item() == pytest.approx(math.log(1 + NEGATIVES))
