# SPDX-License-Identifier: Apache-2.0
"""I-JEPA against a slow version in plain torch and against transformers' IJepaModel."""

import copy
import math

import numpy as np
import pytest
import torch
from messages import mentions
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, IJepaModel

from hf_ssl.errors import UserError
from hf_ssl.methods.ijepa import modeling_ijepa
from hf_ssl.methods.ijepa.configuration_ijepa import IJEPAConfig
from hf_ssl.methods.ijepa.modeling_ijepa import IJEPAForPreTraining
from hf_ssl.modeling.backbones import layers
from hf_ssl.modeling.outputs import RunProgress
from hf_ssl.modeling.vit import PATCH_SELECTION_TYPES, special_tokens
from hf_ssl.random import image_seeds as seeds
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_trainer

ENCODER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 48, "patch_size": 8
}  # fmt: skip
METHOD = {
    "predictor_depth": 2,
    "predictor_hidden_size": 16,
    "predictor_attention_heads": 4,
    "context_more_than": 4,
}
COUNT, STEPS, TOTAL, RATE = 4, 2, 6, 0.5


def build(kind="ijepa", **fields):
    torch.manual_seed(0)
    width = {} if "dinov2" in kind else {"intermediate_size": 40}
    backbone = AutoConfig.for_model(kind, **ENCODER, **width)
    return IJEPAForPreTraining(IJEPAConfig(backbone_config=backbone, **METHOD | fields))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    shape = (COUNT, 1, 3, 48, 48)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def image_seeds(step=0, count=COUNT):
    return seeds(0, step, np.arange(count))


# The slow version: one image, one target block, one head at a time.


def slow_layer(layer, tokens, heads, eps):
    def norm(module, x):
        deviations = [(row - row.mean()) / (row.var(correction=0) + eps).sqrt() for row in x]
        return torch.stack(deviations) * module.weight + module.bias

    attention, x = layer.attention, norm(layer.layernorm_before, tokens)
    q, k, v = (part(x).chunk(heads, dim=1) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
    mixed = [
        (q[h] @ k[h].T / math.sqrt(q[h].shape[1])).exp().T for h in range(heads)
    ]  # keys by queries, not normalized
    mixed = [(weights / weights.sum(0)).T @ v[h] for h, weights in enumerate(mixed)]
    tokens = tokens + attention.o_proj(torch.cat(mixed, dim=1))
    x = layer.mlp.fc1(norm(layer.layernorm_after, tokens))
    return tokens + layer.mlp.fc2(x * (1 + torch.erf(x / math.sqrt(2))) / 2)


def slow_position(patch, dims, columns=6):
    """One half of the dims for the column, the other for the row; in each, sines and then cosines. Rounded as
    a model has them.
    """
    row, column = divmod(patch, columns)
    angles = [[place / 10_000 ** (i / (dims // 4)) for i in range(dims // 4)] for place in (column, row)]
    return torch.tensor(
        [wave(angle) for half in angles for wave in (math.sin, math.cos) for angle in half]
    ).double()


def slow_encode(encoder, image, patches):
    """The tokens of some patches of one image (C, H, W)."""
    kernel = encoder.embeddings.patch_embeddings.projection
    tokens = []
    for patch in patches:
        row, column = divmod(patch, 6)
        pixels = image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        tokens.append(kernel.weight.flatten(1) @ pixels.flatten() + kernel.bias + slow_position(patch, 24))
    tokens = torch.stack(tokens)
    for layer in encoder.layers:
        tokens = slow_layer(layer, tokens, heads=2, eps=1e-12)
    return encoder.layernorm(tokens)


def slow_predict(predictor, context, context_patches, target_patches):
    seen = predictor.embed(context) + torch.stack([slow_position(patch, 16) for patch in context_patches])
    asked = [predictor.mask_token[0, 0] + slow_position(patch, 16) for patch in target_patches]
    tokens = torch.cat([seen, torch.stack(asked)])
    for layer in predictor.layers:
        tokens = slow_layer(layer, tokens, heads=4, eps=1e-6)
    return predictor.features(predictor.norm(tokens[len(seen) :]))


def slow_loss(student, predictor, teacher, images, masks, distance):
    total, count, squares = 0.0, 0, 0.0
    rows = zip(images[:, 0], masks["context_patches"].tolist(), masks["target_patches"].tolist(), strict=True)
    for image, context_patches, blocks in rows:
        context = slow_encode(student, image, context_patches)
        with torch.no_grad():
            whole = slow_encode(teacher, image, range(36))
        for block in blocks:
            predictions = slow_predict(predictor, context, context_patches, block)
            for patch, predicted in zip(block, predictions, strict=True):
                target = (whole[patch] - whole[patch].mean()) / (whole[patch].var(correction=0) + 1e-5).sqrt()
                squares = squares + (predicted - target).square().sum()
                for d in (predicted - target).abs():
                    total = total + (d**2 / 2 if d < 1 else d - 0.5)
                    count += 1
    return total / count if distance == "smooth_l1" else squares / COUNT / 4  # 4 blocks of each image


@pytest.mark.parametrize("distance", ["smooth_l1", "squared_l2"])
def test_steps_equal_the_slow_version(batches, distance, monkeypatch):
    rate = RATE if distance == "smooth_l1" else RATE / 1000  # the sum over features has larger gradients
    monkeypatch.setitem(globals(), "RATE", rate)
    model = build(momentum=0.8, distance=distance).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # far from where norms, biases and the mask token start
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.copy_teachers()
    student, teacher, predictor = (
        copy.deepcopy(part) for part in (model.backbone, model.teacher_backbone, model.predictor)
    )
    moving = [p for p in (*student.parameters(), *predictor.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE)
    lengths = set()
    for step, images in enumerate(batches):
        model.before_step(RunProgress(step, TOTAL, TOTAL))
        masks = model.sample_masks(image_seeds(step))
        lengths.add(masks["target_patches"].shape[2])
        loss = model(pixel_values=images, **masks).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(RunProgress(step + 1, TOTAL, TOTAL))

        slow = slow_loss(student, predictor, teacher, images, masks, distance)
        assert loss.item() == pytest.approx(slow.item(), rel=1e-11)
        momentum = 0.8 + 0.2 * step / TOTAL  # a straight line to 1
        with torch.no_grad():
            for parameter, gradient in zip(moving, torch.autograd.grad(slow, moving), strict=True):
                parameter -= RATE * gradient
            for slow_one, fast_one in zip(teacher.parameters(), student.parameters(), strict=True):
                slow_one.copy_(momentum * slow_one + (1 - momentum) * fast_one)
    pairs = ((model.backbone, student), (model.teacher_backbone, teacher), (model.predictor, predictor))
    for part, expected in pairs:
        for (name, value), other in zip(part.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)
    assert not torch.equal(teacher.layers[0].mlp.fc1.weight, student.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize("kind", PATCH_SELECTION_TYPES)
def test_the_encoder_computes_the_context_alone_and_the_predictor_one_block_at_a_time(kind, batches):
    model = build(kind).double().train()
    model.before_step(RunProgress(3, 10, 5))
    masks, lengths = model.sample_masks(image_seeds()), []
    for layer in [
        *layers(model.backbone),
        *model.predictor.layers,
        *layers(model.teacher_backbone),
    ]:
        layer.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[:2]))
    model(pixel_values=batches[0], **masks).loss.backward()
    special, shown = special_tokens(model.backbone), masks["context_patches"].shape[1]
    asked = masks["target_patches"].shape[2]
    assert 4 < shown < 25 and masks["target_patches"].shape == (COUNT, 4, asked)
    assert lengths == (
        [(COUNT, special + shown)] * 2
        + [(COUNT, special + 36)] * 2
        + [(COUNT * 4, special + shown + asked)] * 2
    )
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert [name for name in without if not name.endswith(("k_proj.bias", "key.bias"))] == []


def test_predictions_see_nothing_of_the_patches_that_are_hidden(batches):
    """Other pixels there change the targets and no prediction."""
    model = build().double().eval()
    masks = model.sample_masks(image_seeds())
    hidden = torch.ones(COUNT, 36, dtype=torch.bool).scatter(1, masks["context_patches"], False)
    mask = hidden.view(COUNT, 1, 1, 6, 6).repeat_interleave(8, -1).repeat_interleave(8, -2)
    with torch.no_grad():
        first, other = (
            model.embed({"pixel_values": images} | masks) for images in (batches[0], batches[0] + 3 * mask)
        )
    torch.testing.assert_close(other["predictions"], first["predictions"], rtol=0, atol=1e-12)
    assert not torch.allclose(first["targets"], other["targets"])


# Masks of a batch.


def test_masks_follow_from_step_and_seeds():
    model, again = build().train(), build().train()
    drawn = []
    for each in (model, again):
        each.before_step(RunProgress(5, 10, 5))
        drawn.append(each.sample_masks(image_seeds(count=64)))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    sizes = set()
    for step in range(20):
        model.before_step(RunProgress(step, 100, 5))
        sizes.add(model.sample_masks(image_seeds(count=2))["target_patches"].shape[2])
    assert len(sizes) > 1
    model.eval()  # measurements of a run can be compared
    measured = model.sample_masks(image_seeds(count=64))
    model.before_step(RunProgress(77, 100, 5))
    assert all(
        torch.equal(value, measured[name])
        for name, value in model.sample_masks(image_seeds(count=64)).items()
    )


def test_processes_that_train_use_the_shortest_context_of_all(batches, monkeypatch):
    model, asked = build().double().train(), []

    def least(number, device):
        asked.append(number)
        return 6

    monkeypatch.setattr(modeling_ijepa, "min_over_processes", least)
    masks = model.sample_masks(image_seeds())
    assert asked == []  # sampling does not communicate
    shorter = {**masks, "context_patches": masks["context_patches"][:, :6]}
    loss = model(pixel_values=batches[0], **masks).loss
    assert asked == [masks["context_patches"].shape[1]] != [6]
    torch.testing.assert_close(model(pixel_values=batches[0], **shorter).loss, loss, rtol=1e-12, atol=0)
    model.eval()(pixel_values=batches[0], **masks)
    assert len(asked) == 2


def test_masks_are_needed(batches):
    with pytest.raises(UserError, match=mentions("context_patches", "target_patches", "sample_masks")):
        build().double()(pixel_values=batches[0])


# Weights: published ones, tables, what is exported.


def assert_fixed_table(encoder, special):
    table = encoder.embeddings.position_embeddings
    expected = torch.stack([slow_position(patch, 24) for patch in range(36)])
    assert not table[0, : table.shape[1] - 36].any()
    torch.testing.assert_close(table[0, -36:].double(), expected, rtol=0, atol=1e-7)
    assert not table.requires_grad


@pytest.mark.parametrize("kind", PATCH_SELECTION_TYPES)
def test_tables_are_there_however_a_model_is_made(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    bare = {name: value for name, value in model.state_dict().items() if "position" not in name}
    empty, _ = IJEPAForPreTraining.from_pretrained(
        None, config=model.config, state_dict=bare, output_loading_info=True
    )
    resumed = build(kind)
    resumed.load_state_dict(model.state_dict())
    for each in (model, AutoModelForPreTraining.from_pretrained(tmp_path), empty, resumed):
        for encoder in (each.backbone, each.teacher_backbone):
            assert_fixed_table(encoder, each.num_special_tokens)
        expected = torch.stack([slow_position(patch, 16) for patch in range(36)])
        torch.testing.assert_close(
            each.predictor.positions.table[0, each.num_special_tokens :].double(), expected, rtol=0, atol=1e-7
        )
        assert not each.predictor.positions.table[0, : each.num_special_tokens].any()
        assert "predictor.positions.table" in each.state_dict()


def test_a_published_encoder_gives_its_own_features_and_goes_on_learning(batches, tmp_path):
    torch.manual_seed(1)
    published = IJepaModel(AutoConfig.for_model("ijepa", **ENCODER, intermediate_size=40)).double()
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # its table too is one that was learned
    published.save_pretrained(tmp_path)
    config = IJEPAConfig(backbone_config=published.config.to_dict(), **METHOD)
    model, info = IJEPAForPreTraining.from_pretrained(
        tmp_path, config=config, dtype=torch.float64, output_loading_info=True
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert {key.split(".")[0] for key in info["missing_keys"]} == {
        "predictor",
        "teacher_backbone",
        "momentum",
    }
    features = published.eval()(batches[0][:, 0]).last_hidden_state
    whole = torch.arange(36).expand(COUNT, -1)
    for encoder in (model.backbone, model.exported_encoder):
        assert torch.equal(encoder.embeddings.position_embeddings, published.embeddings.position_embeddings)
        assert not encoder.embeddings.position_embeddings.requires_grad
        mine = encoder.eval()(batches[0][:, 0]).last_hidden_state
        torch.testing.assert_close(mine, features, rtol=0, atol=1e-13)
        kept = modeling_ijepa.encode_patches(encoder, batches[0][:, 0], whole)
        torch.testing.assert_close(kept, features, rtol=0, atol=1e-13)
    model.train()(pixel_values=batches[0], **model.sample_masks(image_seeds())).loss.backward()
    assert model.momentum.item() == pytest.approx(0.996)


def test_what_is_exported_is_the_teacher_as_transformers_knows_it(tmp_path):
    model = build()
    with torch.no_grad():
        model.backbone.layernorm.weight.add_(1)
    assert type(model.exported_encoder) is IJepaModel
    model.exported_encoder.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is IJepaModel and not any(info.values())
    for name, value in model.teacher_backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert not torch.equal(loaded.layernorm.weight, model.backbone.layernorm.weight)


def test_a_new_model_is_drawn_as_the_authors_draw_it():
    """Every weight from N(0, 0.02), the mask token too: what they scale by depth they draw again later."""
    model = build(predictor_hidden_size=64, predictor_depth=3)
    for part in (model.backbone, model.predictor):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.15), name
                assert not module.bias.any()
    assert model.predictor.mask_token.std().item() == pytest.approx(0.02, rel=0.4)


def test_encoder_and_predictor_are_drawn_as_wide_as_each_is_told():
    torch.manual_seed(0)
    encoder = AutoConfig.for_model("ijepa", **ENCODER, initializer_range=0.1)
    method = METHOD | {"predictor_hidden_size": 64, "initializer_range": 0.3}
    model = IJEPAForPreTraining(IJEPAConfig(backbone_config=encoder, **method))
    for part, width in ((model.backbone, 0.1), (model.teacher_backbone, 0.1), (model.predictor, 0.3)):
        for name, module in part.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                assert module.weight.std().item() == pytest.approx(width, rel=0.15), name
    assert model.predictor.mask_token.std().item() == pytest.approx(0.3, rel=0.4)


# What the monitor is told, and mistakes.


def test_measurements_and_embeddings():
    model = build().eval()
    targets = torch.randn(5, 4, 6, 24)
    explained = [
        model.measurements({"predictions": made, "targets": targets})["explained_variance"]
        for made in (targets, targets.mean((0, 1, 2)).expand_as(targets), -targets)
    ]
    assert explained[:2] == pytest.approx([1, 0], abs=1e-5) and explained[2] < -2
    images = torch.randn(3, 1, 3, 48, 48)
    with torch.no_grad():
        made = model.embed({"pixel_values": images} | model.sample_masks(image_seeds(count=3)))
        whole = model.teacher_backbone(images[:, 0]).last_hidden_state
    expected = torch.nn.functional.layer_norm(whole, (24,)).mean(1)
    torch.testing.assert_close(model.objective(made).embeddings[:, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "crippled"])
def test_the_alarm(whole, tmp_path, monkeypatch, no_curves):
    """Without the teacher, when targets learn too, all images soon look the same, and the monitor says so."""
    settings = [
        "max_steps=60", "batch_size=64", "learning_rate=3e-3", "monitor_steps=20", "logging_steps=20",
        "save_strategy='no'", "disable_tqdm=true", "monitor_bank_images=32", "monitor_query_images=32",
        f"output_dir={tmp_path}",
    ]  # fmt: skip
    recipe = load_recipe("smoke/ijepa", [f"training.{setting}" for setting in settings])
    trainer = build_trainer(recipe, recipe.training_arguments())
    model = trainer.method

    def teach_oneself(images):
        patches = modeling_ijepa.encode_patches(model.backbone, images)
        return torch.nn.functional.layer_norm(patches, patches.shape[-1:])

    if not whole:
        monkeypatch.setattr(model, "teacher_features", teach_oneself)
        monkeypatch.setattr(modeling_ijepa, "latent_smooth_l1", torch.nn.functional.smooth_l1_loss)
    trainer.train()
    assert (trainer.collapse_alarm.message is None) == whole, trainer.collapse_alarm.message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        (
            "method.context_more_than=25",
            ["method.context_more_than", "6 x 6", 25],
        ),
        (
            "method.target_scale=[0.2, 0.1]",
            ["method.target_scale", 0.2, 0.1],
        ),
        ("method.target_aspect_ratio=[1]", ["method.target_aspect_ratio", 0]),
        ("method.predictor_hidden_size=15", ["predictor_hidden_size", 4, 15]),
        ("method.momentum=1.5", ["method.momentum", 0, 1, 1.5]),
        ("backbone.patch_size=48", ["2 x 2", "1 x 1"]),
        ("views.count=2", ["views.count", 1, 2]),
        ("backbone={model_type: resnet}", ["backbone.model_type", "vit", "resnet"]),
    ],
)
def test_mistakes_get_a_sentence(override, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        load_recipe("smoke/ijepa", [override])
