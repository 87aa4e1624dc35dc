# SPDX-License-Identifier: Apache-2.0
"""CPC: agreement with public code, loops over patches and positions, receptive fields, bad settings."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from messages import mentions
from methods.authors import CPC_SHAPE, agree, layer, stored, wave, weights
from methods.test_authors_cpc import bolts_context, field

from hf_ssl.data import open_source, train_loader
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, evaluate_encoder
from hf_ssl.hub import image_processor
from hf_ssl.hub.export import export_model
from hf_ssl.losses import cpc_info_nce
from hf_ssl.methods.cpc import modeling_cpc
from hf_ssl.methods.cpc.configuration_cpc import CPCConfig
from hf_ssl.methods.cpc.modeling_cpc import (
    CPCForPreTraining,
    GatedContext,
    ResidualContext,
    step_losses,
    turned,
)
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.random import image_seeds
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model, open_labeled_splits

CASES = stored()
BACKBONE = {
    "model_type": "convnextv2", "num_stages": 2, "patch_size": 2, "hidden_sizes": [4, 6], "depths": [1, 1]
}  # fmt: skip
VIEWS = {"size": 12, "enlarge": 48, "count": 1}


def build(backbone=BACKBONE, views=VIEWS, **fields):
    fields = {"patch_size": 4, "patch_stride": 2, "prediction_steps": 2, "projection_size": 5} | fields
    torch.manual_seed(0)
    return CPCForPreTraining(CPCConfig(backbone_config=dict(backbone), views=views, **fields)).double().eval()


def views(count=3, side=48):
    small = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return F.interpolate(small, side, mode="bilinear", align_corners=False), small


def noise_of(indices, shape, steps, skip):
    """Return the noise (B, K, G, N) that selects the negatives of a stored case.

    Its lists vary the image fastest, ours the column.
    """
    images, rows, columns = shape
    count = len(indices[0]) // (images * (rows - 1 - skip) * columns)
    noise = torch.zeros(images, steps, rows * columns, count, dtype=torch.float64)
    for step, drawn in enumerate(indices):
        left = rows - step - 1 - skip
        total = images * left * columns
        for place, found in enumerate(drawn):
            position, negative = divmod(place, count)
            row, rest = divmod(position, columns * images)
            target_row, target_rest = divmod(found, columns * images)
            target_column, target_image = divmod(target_rest, images)
            ours = (target_image * left + target_row) * columns + target_column
            noise[rest % images, step, row * columns + rest // images, negative] = (ours + 0.5) / total
    return noise


# Agreement with public code: Greedy InfoMax and CPCV2-PyTorch, pytorch-lightning-bolts.


@pytest.mark.parametrize(
    "case", CASES["cpc_loss"], ids=lambda case: f"skip{case['skip']}-scale{case['scale']}"
)
def test_loss_of_greedy_infomax(case):
    """Their maps multiply the encoding, ours the context: c . (W z) = (W^T c) . z.

    Their loss is -log(p + 1e-11). Ours is -log(p). This matters for p near 1e-11 (scale 8).
    """
    images, _, rows, columns = CPC_SHAPE
    leaves = [case["scale"] * wave(*CPC_SHAPE, phase=0.1), wave(*CPC_SHAPE, phase=0.2),
              wave(3, 3, phase=0.3), wave(3, 3, phase=1.3)]  # fmt: skip
    encoding, context, *maps = [leaf.requires_grad_() for leaf in leaves]
    flat = context.permute(0, 2, 3, 1).flatten(1, 2)
    predictions = torch.stack([flat @ matrix for matrix in maps], dim=1)
    targets, noise = encoding.permute(0, 2, 3, 1), noise_of(
        case["indices"], (images, rows, columns), 2, case["skip"]
    )  # fmt: skip
    losses = step_losses(predictions, targets, skip_step=case["skip"], noise=noise)
    if case["scale"] == 1:
        agree(losses, case["loss_per_step"])
        agree(losses.mean(), case["loss"])
        gradients = torch.autograd.grad(losses.mean(), leaves)
        expected = [case["gradient_z"], case["gradient_c"], *case["gradient_w"]]
        for found, wanted in zip(gradients, expected, strict=True):
            agree(found, wanted)
        return
    for step, (loss, wanted) in enumerate(zip(losses, case["loss_per_step"], strict=True)):
        ahead = step + 1 + case["skip"]
        candidates = targets[:, ahead:].flatten(0, 2)
        kept = (rows - ahead) * columns
        drawn = (noise[:, step, :kept].flatten(0, 1) * len(candidates)).long()
        anchors = predictions[:, step, :kept].flatten(0, 1)
        each = torch.stack([
            cpc_info_nce(anchors[n : n + 1], candidates, torch.tensor([n]), drawn[n : n + 1])
            for n in range(len(anchors))
        ])  # fmt: skip
        agree(loss, each.mean().item())
        agree(-torch.log(torch.exp(-each) + 1e-11).mean(), wanted)
        assert loss > wanted


def load_gated(context: GatedContext) -> GatedContext:
    """Fill a gated context with the weights of the stored cases, which are in the order of construction."""
    number, context = 0, context.double()
    with torch.no_grad():
        for gated in context.layers:
            parts = [gated.vertical, gated.to_horizontal, gated.horizontal, gated.residual, gated.output]
            for part in [part for part in parts if part is not None]:
                shape = list(part.weight.shape)
                if part is gated.vertical:
                    shape[2] = 3  # the last row is masked there
                part.weight.copy_(weights(shape, number)[:, :, : part.weight.shape[2]])
                part.bias.copy_(weights(part.bias.shape, number + 1))
                number += 2
        weight, bias = layer(number, *context.last.weight.shape)
        context.last.weight.copy_(weight)
        context.last.bias.copy_(bias)
    return context


def test_gated_context_of_greedy_infomax():
    context = load_gated(GatedContext(3, 4))
    agree(context.contexts(wave(1, *CPC_SHAPE[1:], phase=0.6)), CASES["cpc_context"]["gated"])
    assert field(context.contexts, 3) == CASES["cpc_context"]["gated_field"]


def test_directions_of_cpcv2():
    case, (images, width, rows, columns) = CASES["cpc_directions"], CPC_SHAPE
    fields = {"directions": 4, "negatives": 2, "context": "gated", "context_layers": 4}
    model = build(
        BACKBONE | {"hidden_sizes": [4, width]}, projection_size=None, prediction_scale=1.0, **fields
    )
    load_gated(model.context)
    with torch.no_grad():
        for direction, predictor in enumerate(model.predictors):
            maps = [wave(width, width, phase=0.5 + 2 * direction + step).T for step in range(2)]
            predictor.weight.copy_(torch.cat(maps))
    given = wave(images, rows, columns, width, phase=0.4).requires_grad_()
    noise = [
        noise_of(case["indices"][2 * direction : 2 * direction + 2], shape, 2, 1)
        for direction in range(4)
        for shape in [(images, rows, columns) if direction % 2 == 0 else (images, columns, rows)]
    ]
    embeddings = model.predict(given)
    losses = torch.stack([
        step_losses(
            embeddings["predictions"][:, direction], turned(embeddings["targets"], direction),
            skip_step=1, noise=noise[direction],
        ).mean()
        for direction in range(4)
    ])  # fmt: skip
    agree(losses, case["loss_per_direction"])
    loss = model.objective(embeddings | {"noise": torch.stack(noise, dim=1).flatten(1)}).loss
    agree(loss, case["loss"])
    agree(torch.autograd.grad(loss, given)[0], case["gradient"])


def test_loss_of_bolts():
    """Its steps share one map, and its loss weights step i by i. Context: see `ResidualContext`."""
    case, (_, width, rows, _) = CASES["cpc_bolts"], CPC_SHAPE
    encoding = (3 * wave(*CPC_SHAPE, phase=0.6)).requires_grad_()
    targets = F.conv2d(encoding, *layer(0, 4, width, 1, 1)).permute(0, 2, 3, 1)
    matrix, bias = layer(2, 4, width, 1, 1)
    predictions = 0.1 * F.conv2d(bolts_context(encoding), 20 * matrix, bias)
    predictions = predictions.permute(0, 2, 3, 1).flatten(1, 2)[:, None].expand(-1, rows - 2, -1, -1)
    losses = step_losses(predictions, targets, skip_step=1)
    agree(losses, case["loss_per_offset"])
    loss = (torch.arange(1, rows - 1) * losses).sum()
    agree(loss, case["loss"])
    agree(torch.autograd.grad(loss, encoding)[0], case["gradient"])


# Context networks.


def test_residual_context_position_by_position():
    """Written with sums over neighbors. Positions outside of the grid are zero."""
    torch.manual_seed(0)
    context = ResidualContext(3, 4, 2).double()
    z = wave(2, 3, 4, 5, phase=0.3)
    found = context.contexts(z)
    for block in context.layers:
        narrow, beside, above, wide = block.narrow, block.beside, block.above, block.wide
        rows, columns = z.shape[2:]
        inner = torch.einsum("bchw,oc->bohw", z, narrow.weight[:, :, 0, 0]) + narrow.bias[:, None, None]
        inner, new = inner.relu(), z.clone()
        row_sum = torch.zeros_like(inner)
        for i in range(rows):
            for j in range(columns):
                row_sum[:, :, i, j] = beside.bias
                for offset in (-1, 0, 1):
                    if 0 <= j + offset < columns:
                        kernel = beside.weight[:, :, 0, 1 + offset]
                        row_sum[:, :, i, j] += inner[:, :, i, j + offset] @ kernel.T
        for i in range(rows):
            for j in range(columns):
                total = above.bias + row_sum[:, :, i, j] @ above.weight[:, :, 1, 0].T
                if i > 0:
                    total = total + row_sum[:, :, i - 1, j] @ above.weight[:, :, 0, 0].T
                new[:, :, i, j] += total.relu() @ wide.weight[:, :, 0, 0].T + wide.bias
        z = new
    torch.testing.assert_close(found, z.relu(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["residual", "gated"])
@pytest.mark.parametrize("direction", range(4))
def test_a_prediction_sees_its_row_and_earlier_rows_of_its_direction(kind, direction):
    width = {"context_hidden_size": 8} if kind == "residual" else {}
    model = build(context=kind, context_layers=5, directions=4, **width)
    grid = torch.randn(1, 9, 9, 6, dtype=torch.float64, requires_grad=True)
    predictions = model.predict(grid)["predictions"]  # (B, T, K, G, P)
    for row, column in ((0, 0), (4, 4), (8, 2)):
        (gradient,) = torch.autograd.grad(
            predictions[:, direction, :, 9 * row + column].sum(), grid, retain_graph=True
        )
        seen = turned(gradient.abs().sum(3), direction)[0] > 0
        assert not seen[row + 1 :].any()
        assert seen[row, max(0, column - 1) : column + 2].all()
        assert row == 0 or seen[row - 1, column]


@pytest.mark.parametrize("direction", range(4))
def test_a_direction_turns_the_grid_clockwise(direction):
    grid = torch.arange(6).view(1, 2, 3)
    expected = grid
    for _ in range(direction):
        rows, columns = expected.shape[1:]
        new = [[int(expected[0, rows - 1 - j, i]) for j in range(rows)] for i in range(columns)]
        expected = torch.tensor(new)[None]
    assert torch.equal(turned(grid, direction), expected)


# The whole method.


@pytest.mark.parametrize("fields", [{}, {"directions": 3, "skip_step": 0}, {"projection_size": None}])
def test_a_batch_equals_loops_over_patches_steps_and_positions(fields):
    model = build(**fields)
    large, small = views()
    output = model(large[:, None])
    config, size = model.config, range(0, 9, 2)
    with torch.no_grad():
        encodings = torch.stack([
            torch.stack([
                torch.stack([
                    model.backbone(
                        F.interpolate(image[None, :, top : top + 4, left : left + 4], 16, mode="bilinear")
                    ).pooler_output[0]
                    for left in size
                ])
                for top in size
            ])
            for image in small
        ])  # fmt: skip
    terms, targets = [], model.target(encodings)
    information = [[] for _ in range(2)]
    for direction in range(config.directions):
        grid, aims = turned(encodings, direction), turned(targets, direction)
        context = model.context(grid)
        width = aims.shape[-1]
        weight, bias = model.predictors[direction].weight, model.predictors[direction].bias
        for step in (1, 2):
            block = slice((step - 1) * width, step * width)
            losses = []
            for b in range(3):
                for i in range(5 - step - config.skip_step):
                    for j in range(5):
                        prediction = weight[block] @ context[b, i, j]
                        prediction = 0.1 * (prediction if bias is None else prediction + bias[block])
                        scores = aims @ prediction
                        own = scores[b, i + step + config.skip_step, j]
                        losses.append(scores.logsumexp((0, 1, 2)) - own)
            terms.append(sum(losses) / len(losses))
            information[step - 1].append(math.log(75) - terms[-1])
    torch.testing.assert_close(output.loss, sum(terms) / len(terms), rtol=1e-6, atol=1e-8)
    for step in (1, 2):
        expected = sum(information[step - 1]) / config.directions
        torch.testing.assert_close(
            output.terms[f"information_step_{step}"], expected.detach(), rtol=1e-5, atol=1e-7
        )
    assert output.embeddings.shape == (3, 1, targets.shape[-1])


@pytest.mark.parametrize(("negatives", "candidates"), [(None, 75), (4, 5)])
def test_equal_scores_contain_no_information(negatives, candidates):
    model = build(negatives=negatives)
    for predictor in model.predictors:
        torch.nn.init.zeros_(predictor.weight)
    output = model(views()[0][:, None])
    assert output.loss.item() == pytest.approx(math.log(candidates), rel=1e-12)
    assert output.terms["information_step_1"].item() == pytest.approx(0, abs=1e-12)


def test_negatives_and_patches_of_an_image_depend_on_its_seed_alone():
    model = build(negatives=3, patch_crop=3, color_dropping=0.5, directions=2)
    seeds = image_seeds(0, 0, np.arange(4, dtype=np.uint64))
    whole, last = model.sample_masks(seeds), model.sample_masks(seeds[3:])
    assert whole.keys() == {"patch_parameters", "noise"}
    for name, value in whole.items():
        assert torch.equal(value[3:], last[name])
    assert whole["noise"].shape == (4, 2 * 2 * 25 * 3)
    images = views(4)[0][:, None]
    embeddings = [model.embed({"pixel_values": images[part]} | {k: v[part] for k, v in whole.items()})
                  for part in (slice(0, 2), slice(2, 4))]  # fmt: skip
    joined = {name: torch.cat([each[name] for each in embeddings]) for name in embeddings[0]}
    torch.testing.assert_close(model.objective(joined).loss, model(images, **whole).loss, rtol=1e-9, atol=0)


def test_sampled_negatives_are_targets_of_the_step():
    """With noise 0 every negative is the first target; with the largest one, the last."""
    predictions, targets = torch.randn(2, 1, 12, 3).double(), torch.randn(2, 4, 3, 3).double()
    for value, own in ((0.0, targets[0, 2, 0]), (1.0, targets[1, 3, 2])):
        noise = torch.full((2, 1, 12, 2), value)
        found = step_losses(predictions, targets, skip_step=1, noise=noise)
        losses = []
        for b in range(2):
            for i in range(2):
                for j in range(3):
                    prediction = predictions[b, 0, 3 * i + j]
                    positive = prediction @ targets[b, i + 2, j]
                    both = torch.stack([positive, prediction @ own, prediction @ own])
                    losses.append(both.logsumexp(0) - positive)
        torch.testing.assert_close(found[0], sum(losses) / 12, rtol=1e-12, atol=1e-12)


def test_patches_are_augmented_and_repeatable():
    model = build(patch_augmentation={"jitter": 1.0, "flip": 0.5}, patch_crop=3)
    images = views()[0][:, None]
    masks = model.sample_masks(image_seeds(0, 0, np.arange(3, dtype=np.uint64)))
    loss = model(images, **masks).loss
    assert torch.equal(model(images, **masks).loss, loss)
    plain = copy.deepcopy(model)
    plain._fixed_table = build()._fixed_table
    plain.layout = build().layout
    assert plain(images).loss != loss
    torch.manual_seed(0)
    first = model(images).loss
    torch.manual_seed(0)
    assert torch.equal(model(images).loss, first)  # from torch's generator
    assert not torch.equal(model(images).loss, first)


def test_parameters_of_patches_stay_on_the_host():
    recipe = load_recipe("smoke/cpc")
    model = build_model(recipe, seed=0)
    loader = train_loader(open_source(recipe.data), recipe.views, config=recipe.data, seed=0, batch_size=4)
    inputs = next(iter(loader)).inputs("meta", model.sample_masks)
    assert inputs["pixel_values"].is_meta and inputs["patch_parameters"].device.type == "cpu"


def test_encoding_patches_in_parts_changes_nothing(monkeypatch):
    model, images = build(), views()[0]
    whole = model.encode_grid(images)
    monkeypatch.setattr(modeling_cpc, "_CPU_PIXELS", 0)
    monkeypatch.setattr(modeling_cpc, "_LEAST_PATCHES", 7)
    torch.testing.assert_close(model.encode_grid(images), whole, rtol=1e-9, atol=1e-10)


def test_whole_images_are_enlarged_like_patches():
    config = build().config
    processor = image_processor(config.views, 3)
    assert config.enlargement == 4
    assert processor.size["shortest_edge"] == processor.crop_size["height"] == 12 * config.enlargement


def test_both_features_are_evaluated_without_a_setting(tmp_path):
    """The grid is that of the method, for a model, its exported encoder and a folder."""
    recipe = load_recipe("smoke/cpc", ["evaluation.max_train_images=60", "evaluation.max_test_images=40"])
    model, splits = build_model(recipe, seed=0), open_labeled_splits(recipe.data, recipe.evaluation)
    assert model.patch_grid == [16, 8]
    export_model(model, tmp_path)
    settings, processor = EvaluationConfig(linear=False, neighbors=[5]), str(tmp_path)
    results = [
        evaluate_encoder(each, *splits, settings, processor)
        for each in (model, model.exported_encoder, str(tmp_path))
    ]
    given = EvaluationConfig(linear=False, neighbors=[5], patch_grid=[16, 8])
    results.append(evaluate_encoder(model, *splits, given, processor))
    assert all(result["poolings"].keys() == {"image", "grid"} for result in results)
    assert all(result["poolings"] == results[0]["poolings"] for result in results)
    none = EvaluationConfig(linear=False, neighbors=[5], patch_grid=[])
    assert "poolings" not in evaluate_encoder(model, *splits, none, processor)


def test_the_grid_of_the_method_does_not_stop_an_evaluation(tmp_path):
    """Images of another size are evaluated without the grid, and the result says so."""
    recipe = load_recipe("smoke/cpc", ["evaluation.max_train_images=60", "evaluation.max_test_images=40"])
    model, splits = build_model(recipe, seed=0), open_labeled_splits(recipe.data, recipe.evaluation)
    processor = image_processor({**recipe.views.to_dict(), "enlarge": 30}, 3)
    settings = EvaluationConfig(linear=False, neighbors=[5])
    found = evaluate_encoder(model, *splits, settings, processor)
    assert "poolings" not in found and any("30 pixels" in reason for reason in found["skipped"])


def test_other_methods_do_not_keep_the_grid():
    """Also not those that start from an encoder of CPC."""
    encoder = build().exported_encoder.float()
    assert encoder.config.published_patch_grid == [16, 8]
    other = SimCLRForPreTraining.from_backbone(encoder, views={"size": 32})
    assert "published_patch_grid" not in other.exported_encoder.config.to_dict()
    assert encoder.config.published_patch_grid == [16, 8]


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ("[16,5]", ["32 pixels", 16, 5]),
        ("[40,8]", ["32 pixels", 40]),
        ("[2,1]", ["convnextv2", "2 pixels"]),
        ("[16]", ["[patch, stride]"]),
    ],
)
def test_a_grid_that_cannot_be_evaluated_is_an_error_before_the_run(grid, parts):
    with pytest.raises(UserError, match=mentions("evaluation.patch_grid", *parts)):
        load_recipe("smoke/cpc", [f"evaluation.patch_grid={grid}"])
    assert load_recipe("smoke/cpc", ["evaluation.patch_grid=[]"]).evaluation.patch_grid == []


def test_defaults_make_the_grid_of_the_papers():
    for size in (32, 64, 128, 224, 256):
        layout = CPCConfig(views={"size": size, "count": 1}).layout
        assert layout.shape == (7, 7) and layout.size == size // 4


@pytest.mark.parametrize("backbone", ["resnet", "convnextv2"])
def test_batch_norm_gets_a_warning_with_the_reason(backbone, caplog):
    resnet = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 4, "depths": [1],
              "hidden_sizes": [6]}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        build(resnet if backbone == "resnet" else BACKBONE)
    assert ("BatchNorm mixes the patches" in caplog.text) == (backbone == "resnet")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["method.patch_size=5"], ["views.size", 8, 5]),
        (["method.patch_size=8"], ["views.size", "two patches per row", 8]),
        (["method.prediction_steps=3"], ["method.prediction_steps", "at most 2", "3 rows", 3]),
        (["method.skip_step=1"], ["method.prediction_steps", "at most 1", "method.skip_step=1", 2]),
        (["method.prediction_steps=0"], ["method.prediction_steps", "at least 1"]),
        (["method.patch_size=9"], ["method.patch_size", "1 to 8", 9]),
        (["method.patch_stride=0"], ["method.patch_stride", "at least 1"]),
        (["method.patch_crop=5"], ["method.patch_crop", "1 to 4", 5]),
        (["method.color_dropping=1.5"], ["method.color_dropping", "probability", 1.5]),
        (
            ["method.color_dropping=0.5", "data.channels=1", "views.mean=[0.5]", "views.std=[0.5]",
             "method.patch_augmentation=null"],
            ["method.color_dropping", "no color"],
        ),
        (["method.patch_rotation=-1.0"], ["method.patch_rotation", "0 to 180", -1.0]),
        (["method.patch_shear=1.0"], ["method.patch_shear", "less than 1", 1.0]),
        (["method.patch_augmentation={hue: 2.0, jitter: 1.0}"], ["method.patch_augmentation.hue", 2.0]),
        (["method.patch_augmentation={scale: [0.5, 1.0]}"], ["method.patch_augmentation.scale"]),
        (["method.directions=5"], ["method.directions", "1 to 4"]),
        (["method.negatives=0"], ["method.negatives", "at least 1"]),
        (["method.context=lstm"], ["method.context", "residual, gated", "lstm"]),
        (["method.context_layers=0"], ["method.context_layers", "at least 1"]),
        (["method.context_hidden_size=0"], ["method.context_hidden_size", "at least 1"]),
        (
            ["method.context=gated", "method.context_hidden_size=16"],
            ["method.context_hidden_size", "method.context=gated", 16],
        ),
        (["method.projection_size=0"], ["method.projection_size", "at least 1"]),
        (["method.prediction_scale=0"], ["method.prediction_scale", "above 0"]),
        (["views.enlarge=20"], ["views.enlarge", "multiple of views.size=8", 20]),
        (["views.count=2"], ["views.count", "exactly 1", 2]),
        (["training.batch_size=1"], ["training.batch_size", "at least 2"]),
    ],
)  # fmt: skip
def test_bad_settings(overrides, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        load_recipe("smoke/cpc", overrides)


def test_patches_below_the_stride_of_the_encoder():
    """ConvNeXt V2 with four stages needs 32 pixels. The message names the enlargement."""
    backbone = {"model_type": "convnextv2", "hidden_sizes": [4, 4, 4, 4], "depths": [1, 1, 1, 1]}
    with pytest.raises(UserError, match=mentions("views.enlarge", 128, "patches of 8 pixels", "to 32")):
        build(backbone, {"size": 32, "count": 1}, patch_size=8, patch_stride=4)
    build(backbone, {"size": 32, "enlarge": 128, "count": 1}, patch_size=8, patch_stride=4)


def test_views_of_another_size():
    with pytest.raises(ValueError, match=mentions("images", "(3, 12, 12)", "(3, 8, 8)")):
        build()(torch.zeros(2, 1, 3, 32, 32, dtype=torch.float64))
