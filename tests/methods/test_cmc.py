# SPDX-License-Identifier: Apache-2.0
"""CMC: color views, the pairs of its loss, and the encoder that its narrow encoders fold into."""

import copy
import math
from itertools import combinations

import numpy as np
import pytest
import torch
from messages import mentions
from methods.authors import BANK_ROWS, NEGATIVES, WIDTH, agree, embeddings, stored, unit_rows, wave
from PIL import Image
from tiers import in_tiers
from transformers import AutoImageProcessor, AutoModel, ResNetConfig, ResNetModel

from hf_ssl.errors import UserError
from hf_ssl.hub.export import export_model
from hf_ssl.methods.cmc.configuration_cmc import CMCConfig
from hf_ssl.methods.cmc.modeling_cmc import CMCForPreTraining
from hf_ssl.modeling.backbones import encode
from hf_ssl.modeling.fast_layers import choose_attention
from hf_ssl.modeling.memory_bank import MemoryBank
from hf_ssl.modeling.narrow_encoders import narrow_configs
from hf_ssl.modeling.outputs import RunProgress
from hf_ssl.modeling.parameter_groups import layer_depths
from hf_ssl.random import image_seeds
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model
from hf_ssl.views import COLOR_SPACES, gradient_magnitude, rgb_mean, to_color_space

SIZE = 32
BASIC = {"layer_type": "basic", "embedding_size": 12, "depths": [1, 2], "hidden_sizes": [12, 26]}
BOTTLENECK = {"layer_type": "bottleneck", "embedding_size": 16, "depths": [2, 1], "hidden_sizes": [32, 52]}
STEM = {**BASIC, "downsample_in_first_stage": True, "hidden_act": "gelu", "embedding_size": 10}
MEAN, STD = (0.41, 0.52, 0.33), (0.21, 0.27, 0.3)


def build(encoder=BASIC, mean=MEAN, std=STD, **settings):
    torch.manual_seed(0)
    views = {"size": SIZE, "count": 1, "mean": mean, "std": std}
    config = CMCConfig(
        backbone_config=ResNetConfig(**encoder), views=views, **{"projection_size": 8, **settings}
    )
    return CMCForPreTraining(config)


def images(count=6, side=SIZE):
    """Return normalized images (B, 1, 3, H, W) in float64."""
    return torch.randn(
        count, 1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def trained(model):
    """Return the model in float64 and eval mode, with weights and statistics that no initialization has."""
    model = model.double().train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for _ in range(2):
            model(images())
    return model.eval()


FOLDED = [
    (encoder, space, groups)
    for encoder in ("basic", "bottleneck", "stem")
    for space, groups in (
        ("ydbdr", None), ("ydbdr", [2, 1]), ("ydbdr", [1, 1, 1]), ("ycbcr", None), ("rgb", None),
        ("rgb", [1, 2]),
    )
]  # fmt: skip
ENCODERS = {"basic": BASIC, "bottleneck": BOTTLENECK, "stem": STEM}


@pytest.mark.parametrize(
    ("encoder", "space", "groups"),
    in_tiers(FOLDED, [("basic", "ydbdr", None), ("bottleneck", "rgb", None), ("stem", "ycbcr", None)]),
)
@torch.no_grad()
def test_the_narrow_encoders_fold_into_one(encoder, space, groups):
    model = trained(build(ENCODERS[encoder], color_space=space, channel_groups=groups))
    folded = model.exported_encoder
    assert type(folded) is ResNetModel and not folded.training
    batch = images()[:, 0]
    views = model.views.divide(batch)
    expected = [part(view) for part, view in zip(model.backbone.parts, views, strict=True)]
    found = folded(batch, output_hidden_states=True)
    for name in ("last_hidden_state", "pooler_output"):
        joined = torch.cat([output[name] for output in expected], dim=1)
        torch.testing.assert_close(found[name], joined, rtol=0, atol=1e-10)
        assert joined.std() > 0.01
    together = model.backbone(batch, output_hidden_states=True)
    for one, other in zip(found.hidden_states, together.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    torch.testing.assert_close(encode(folded, batch), encode(model.backbone, batch), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_precision_of_a_run_does_not_change_the_folded_encoder():
    """The first convolution is computed in float64 and rounded once."""
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        folded = model.exported_encoder.state_dict()
    exact = build().double().exported_encoder.state_dict()
    for name, value in folded.items():
        assert torch.equal(value, exact[name].to(value.dtype)), name


def test_the_folded_encoder_also_trains_like_its_parts():
    """BatchNorm uses the statistics of a batch, so the blocks do not influence each other in training."""
    model = trained(build()).train()
    choose_attention(model)  # as the trainer does
    folded = model.exported_encoder
    assert folded.training
    batch = images()[:, 0]
    torch.testing.assert_close(encode(folded, batch), encode(model.backbone, batch), rtol=0, atol=1e-10)


@torch.no_grad()
def test_every_weight_outside_of_the_blocks_is_zero():
    model = trained(build(BOTTLENECK, color_space="rgb"))
    folded, count = model.exported_encoder.state_dict(), 0
    for name, value in folded.items():
        if value.ndim == 4 and not name.startswith("embedder"):
            kept = sum(part.state_dict()[name].numel() for part in model.backbone.parts)
            assert value.count_nonzero() == kept < value.numel() / 2
            count += 1
    assert count == 11


@torch.no_grad()
def test_a_photo_has_the_same_features_in_plain_transformers(tmp_path):
    """Borders are equal because zeros are the mean color in both, so the image is not cropped here."""
    mean = rgb_mean("ydbdr")
    model = trained(build(mean=mean, std=(0.229, 0.224, 0.225))).float()
    export_model(model, tmp_path)
    encoder, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(encoder) is ResNetModel and not any(info.values())
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert processor.image_mean == pytest.approx(mean)
    photo = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    features = encoder.double().eval()(
        **processor(Image.fromarray(photo), return_tensors="pt").to(torch.float64)
    )
    # The authors' form: colors are converted, then normalized with the statistics of the color space.
    space = COLOR_SPACES["ydbdr"]
    color = to_color_space(torch.from_numpy(photo).permute(2, 0, 1).double() / 255, "ydbdr")
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (space.mean, space.std)
    )
    parts = [part.double().eval() for part in model.backbone.parts]
    views = ((color - mean) / std)[None].split((1, 2), dim=1)
    expected = torch.cat([part(view).pooler_output for part, view in zip(parts, views, strict=True)], dim=1)
    torch.testing.assert_close(features.pooler_output, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_another_mean_makes_an_error_at_the_borders():
    """The reverse of the test before: a shift after the first convolution's zero padding is not exact."""
    model = trained(build())
    batch = images()[:, 0]
    moved = batch + 0.5  # another image_mean
    inside = encode(model.exported_encoder, moved) - encode(model.backbone, batch)
    assert inside.abs().max() > 1e-3


@pytest.mark.parametrize("space", ["ydbdr", "ycbcr", "rgb"])
def test_the_rgb_mean_has_the_mean_of_the_color_space(space):
    color = torch.tensor(rgb_mean(space), dtype=torch.float64)[:, None, None]
    found = to_color_space(color, space).flatten().tolist()
    assert found == pytest.approx(COLOR_SPACES[space].mean, abs=1e-12)


def test_only_linear_color_spaces_have_an_rgb_mean():
    with pytest.raises(ValueError, match=mentions("space", "ydbdr", "ycbcr", "rgb", "lab")):
        rgb_mean("lab")


@pytest.mark.parametrize("space", COLOR_SPACES)
def test_color_views_are_converted_and_normalized_colors(space):
    mean = MEAN if space == "lab" else rgb_mean(space)
    division = build(color_space=space, channel_groups=[1, 1, 1], mean=mean).views
    batch = images()[:, 0].sigmoid()
    restored = division.restore(batch)
    plain = batch * torch.tensor(STD)[:, None, None].double() + torch.tensor(mean)[:, None, None].double()
    torch.testing.assert_close(restored, plain, rtol=1e-6, atol=1e-6)
    found, color = COLOR_SPACES[space], to_color_space(restored, space)
    for number, view in enumerate(division.divide(batch)):
        expected = (color[:, number : number + 1] - found.mean[number]) / found.std[number]
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-9)
    assert division.names == list(found.channels)


def slow_loss(views, pairs, temperature):
    """Return the sum of the losses of pairs in both directions, with loops over images."""
    total = 0.0
    for first, second in pairs:
        for anchors, others in ((views[first], views[second]), (views[second], views[first])):
            for image, anchor in enumerate(anchors):
                scores = torch.stack([anchor @ other / temperature for other in others])
                total = total + (scores.logsumexp(0) - scores[image]) / len(anchors)
    return total


@pytest.mark.parametrize("graph", ["core", "full"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"color_space": "rgb"}, {"color_space": "rgb", "gradient_view": True}],
    ids=["2", "3", "4"],
)
def test_the_loss_is_the_sum_over_pairs_of_views(graph, settings):
    model = build(graph=graph, **settings).double()
    batch = images()
    output = model(batch)
    count = output.embeddings.shape[1]
    pairs = (
        [(0, other) for other in range(1, count)] if graph == "core" else list(combinations(range(count), 2))
    )
    expected = slow_loss(output.embeddings.unbind(1), pairs, 0.07)
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=1e-12)
    losses = [value for name, value in output.terms.items() if name.startswith("info_nce_")]
    bounds = [value for name, value in output.terms.items() if name.startswith("information_")]
    assert len(losses) == len(bounds) == len(pairs) == len(output.terms) // 2
    torch.testing.assert_close(2 * torch.stack(losses).sum(), output.loss.detach())
    for loss, bound in zip(losses, bounds, strict=True):
        assert (loss + bound).item() == pytest.approx(math.log(len(batch) - 1))


@torch.no_grad()
def test_a_view_changes_only_with_its_own_channels():
    model = build(color_space="rgb", gradient_view=True).double().eval()
    batch = images()
    before = model.embed({"pixel_values": batch})["projections"]
    torch.testing.assert_close(before.norm(dim=-1), torch.ones(6, 4).double())
    batch[:, :, 1] += torch.randn_like(batch[:, :, 1])
    changed = (model.embed({"pixel_values": batch})["projections"] - before).abs().amax((0, 2))
    assert (changed > 1e-3).tolist() == [False, True, False, True]


@torch.no_grad()
def test_the_gradient_view_is_the_gradient_of_the_colors():
    model = build(gradient_view=True).double().eval()
    batch = images()
    rgb = batch[:, 0] * torch.tensor(STD).double()[:, None, None] + torch.tensor(MEAN).double()[:, None, None]
    features = encode(model.gradient_backbone, gradient_magnitude(rgb) / 0.05)
    expected = torch.nn.functional.normalize(model.heads[2](features), dim=-1)
    found = model.embed({"pixel_values": batch})["projections"][:, 2]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_gradient_view_is_not_published():
    model = trained(build(gradient_view=True))
    without = copy.deepcopy(model)
    without.gradient_backbone = None
    for name, value in model.exported_encoder.state_dict().items():
        assert torch.equal(value, without.exported_encoder.state_dict()[name])


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("count", [2, 3])
def test_narrow_widths_add_up(layer_type, count):
    full = ResNetConfig(layer_type=layer_type)
    narrow = narrow_configs(full, (1,) * count)
    assert sum(each.embedding_size for each in narrow) == 64
    assert [
        sum(sizes) for sizes in zip(*(each.hidden_sizes for each in narrow), strict=True)
    ] == full.hidden_sizes
    sums = [sum(size // 4 for size in sizes) for sizes in zip(*(e.hidden_sizes for e in narrow), strict=True)]
    assert layer_type == "basic" or sums == [size // 4 for size in full.hidden_sizes]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_sizes": [12, 1]}, ("backbone.hidden_sizes", 2, 1)),
        ({"embedding_size": 1}, ("backbone.embedding_size", 2, 1)),
        ({**BOTTLENECK, "hidden_sizes": [32, 50]}, ("backbone.hidden_sizes", "multiple of 4", 50)),
        ({**BOTTLENECK, "embedding_size": 4}, ("backbone.embedding_size", "multiple of 4", 8)),
        ({"num_channels": 1}, ("data.channels", 3, 1)),
    ],
)
def test_encoders_that_cannot_be_divided_are_errors(changes, words):
    with pytest.raises(UserError, match=mentions(*words)):
        narrow_configs(ResNetConfig(**BASIC | changes), (1, 2))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.color_space=hsv", ("method.color_space", "hsv", "rgb")),
        ("method.loss=mse", ("method.loss", "info_nce", "nce", "softmax", "mse")),
        ("method.negatives=0", ("method.negatives", "at least 1", 0)),
        ("method.negatives=16", ("method.negatives", "method.loss=info_nce", 16)),
        ("method.bank_momentum=0.9", ("method.bank_momentum", "method.loss=info_nce", 0.9)),
        ("method.bank_start=images", ("method.bank_start", "method.loss=info_nce", "images")),
        ("method.bank_precision=float16", ("method.bank_precision", "method.loss=info_nce", "float16")),
        (
            "method.projection_hidden_size=9",
            ("method.projection_hidden_size", "method.projection_layers=1", 9),
        ),
        ("method.graph=ring", ("method.graph", "full", "core", "ring")),
        ("method.channel_groups=[3]", ("method.channel_groups", "at least two", "[3]")),
        ("method.channel_groups=[1,1]", ("method.channel_groups", "sum 3", "[1, 1]")),
        ("method.channel_groups=[3,0]", ("method.channel_groups", "at least 1", "[3, 0]")),
        ("method.channel_groups=[]", ("method.channel_groups", "sum 3", "[]")),
        ("method.projection_layers=0", ("method.projection_layers", "at least 1", 0)),
        ("views.count=2", ("views.count", "exactly 1", 2)),
        ("backbone.hidden_sizes=[8,2]", ("backbone.hidden_sizes", 3, 2)),
        ("backbone={model_type: swin}", ("backbone.model_type", "resnet", "vit", "swin")),
    ],
)
def test_wrong_settings_of_a_recipe_are_errors(override, words):
    with pytest.raises(UserError, match=mentions(*words)):
        load_recipe("smoke/cmc", [override])


def test_gray_images_are_an_error():
    gray = ["data.channels=1", "views.mean=[0.5]", "views.std=[0.2]"]
    with pytest.raises(UserError, match=mentions("data.channels", 3, 1)):
        load_recipe("smoke/cmc", gray)


def test_one_view_of_all_channels_and_the_gradient_are_two_views():
    model = build(color_space="rgb", channel_groups=[3], gradient_view=True)
    assert model.view_names == ["rgb", "gradient"] and model.pairs == [(0, 1)]


@torch.no_grad()
def test_training_continues_from_a_published_encoder(tmp_path):
    model = trained(build(color_space="ydbdr")).float()
    export_model(model, tmp_path)
    settings = {"projection_size": 8, "views": {"size": SIZE, "count": 1}}
    started = CMCForPreTraining.from_backbone(tmp_path, **settings)
    assert started.continues and started.config.views["mean"] == pytest.approx(MEAN)
    for (name, found), expected in zip(
        started.backbone.named_parameters(), model.backbone.parameters(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    batch = images()[:, 0].float()
    found, expected = (encode(each.backbone.eval(), batch) for each in (started, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_other_encoders_are_no_start(tmp_path):
    other = ResNetModel(ResNetConfig(**BASIC))
    with pytest.raises(UserError, match=mentions("backbone.init_from", "CMC", "color_space")):
        build().start_from(other)
    with pytest.raises(UserError, match=mentions("backbone.init_from", "CMC", "color_space")):
        build(color_space="rgb").start_from(trained(build()).float().exported_encoder)
    wider = trained(build({**BASIC, "hidden_sizes": [12, 28]})).float().exported_encoder
    with pytest.raises(UserError, match=mentions("backbone.init_from")):
        build().start_from(wider)
    other.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=mentions("from_pretrained", "from_backbone")):
        CMCForPreTraining.from_pretrained(tmp_path)


# Memory banks.


def with_banks(loss, rows=BANK_ROWS, **settings):
    settings = {"num_samples": rows, "negatives": NEGATIVES, "projection_size": WIDTH, **settings}
    return build(loss=loss, **settings).double().train()


@pytest.mark.parametrize("kind", ["nce", "softmax", "pycontrast"])
def test_three_steps_with_memory_banks_equal_the_authors_code(kind, monkeypatch):
    case, first = stored()["cmc"][kind], 1.2 if kind == "pycontrast" else 0.7
    model = with_banks("nce" if kind == "nce" else "softmax")
    for number, bank in enumerate(model.banks):
        rows = wave(BANK_ROWS, WIDTH, phase=first + 0.1 * number)
        bank.rows.copy_(unit_rows(rows) if kind == "pycontrast" else rows / math.sqrt(WIDTH / 3))
    for step, expected in enumerate(case["steps"]):
        drawn = torch.tensor(stored()["bank_inputs"]["indices"][step])
        monkeypatch.setattr(MemoryBank, "draw", lambda *_, drawn=drawn: drawn[:, 1:])
        views = [embeddings(step, phase) for phase in (1.0, 2.0)]
        output = model.loss_from_embeddings(
            {
                "projections": torch.stack(views, dim=1),
                "sample_index": torch.tensor(stored()["bank_inputs"]["rows"][step]),
                "draw_seeds": torch.zeros(3, dtype=torch.int64),
            }
        )
        pycontrast = kind == "pycontrast"
        losses = expected["losses"] if pycontrast else [expected["loss_l"], expected["loss_ab"]]
        names = None if pycontrast else ("gradient_l", "gradient_ab")
        gradients = expected["gradients"] if pycontrast else [expected[name] for name in names]
        agree(output.loss, sum(losses))
        agree(output.terms[f"{model.config.loss}_y_dbdr"], sum(losses) / 2)
        for found, gradient in zip(torch.autograd.grad(output.loss, views), gradients, strict=True):
            agree(found, gradient)
        model.after_backward(RunProgress(step=step, total_steps=3, steps_per_epoch=3))
        if kind == "nce":
            agree(model.constants.values, [expected["z_l"], expected["z_ab"]])
    names = ("bank_1", "bank_2") if kind == "pycontrast" else ("bank_l", "bank_ab")
    for bank, name in zip(model.banks, names, strict=True):
        agree(bank.rows, case[name], 1e-7)


def bank_batch(model, count=6, rows=BANK_ROWS):
    """Return inputs of images with row numbers and seeds."""
    seeds = image_seeds(0, 0, np.arange(count, dtype=np.uint64))
    return {
        "pixel_values": images(count),
        "sample_index": torch.arange(count) % rows,
        **model.sample_masks(seeds),
    }


@pytest.mark.parametrize("loss", ["nce", "softmax"])
@pytest.mark.parametrize("graph", ["core", "full"])
def test_each_direction_reads_the_bank_of_the_other_view(loss, graph):
    """Four views, compared with a loop over directions."""
    model = with_banks(loss, graph=graph, color_space="rgb", gradient_view=True)
    batch = bank_batch(model)
    output = model(**batch)
    views, total = output.embeddings.unbind(1), 0.0
    drawn = model.banks[0].draw(batch["draw_seeds"], NEGATIVES)
    pairs = [(0, 1), (0, 2), (0, 3)] if graph == "core" else list(combinations(range(4), 2))
    for first, second in pairs:
        entropies = []
        for anchor, other in ((first, second), (second, first)):
            rows = torch.cat((batch["sample_index"][:, None], drawn), 1)
            scores = torch.stack(
                [
                    model.banks[other].rows[index] @ view
                    for index, view in zip(rows, views[anchor], strict=True)
                ]
            )
            entropies.append((scores / 0.07).logsumexp(1).mean() - scores[:, 0].mean() / 0.07)
            if loss == "softmax":
                total = total + entropies[-1]
                continue
            odds = (scores / 0.07).exp() / ((scores / 0.07).exp().mean().detach() * BANK_ROWS)
            noise = NEGATIVES / BANK_ROWS
            total = total - (odds[:, 0] / (odds[:, 0] + noise + 1e-7)).log().mean()
            total = total - (noise / (odds[:, 1:] + noise + 1e-7)).log().sum(1).mean()
        name = f"information_{model.view_names[first]}_{model.view_names[second]}"
        bound = math.log(NEGATIVES) - torch.stack(entropies).mean()
        torch.testing.assert_close(output.terms[name], bound.detach())
    torch.testing.assert_close(output.loss, total, rtol=1e-9, atol=1e-9)


def test_the_banks_of_the_views_start_with_different_rows():
    banks = with_banks("softmax", bank_start="uniform").banks
    assert not torch.equal(banks[0].rows, banks[1].rows)
    assert all(bank.start == "uniform" for bank in banks)


def test_only_memory_banks_need_row_numbers():
    banks = ["method.loss=nce", "method.negatives=16"]
    words = ("data.streaming", "cmc", "in-batch negatives", "method.loss=info_nce")
    with pytest.raises(UserError, match=mentions(*words)):
        load_recipe("smoke/cmc", [*banks, "data.streaming=true"])
    assert load_recipe("smoke/cmc", ["data.streaming=true"]).data.streaming
    model = build_model(load_recipe("smoke/cmc", banks), seed=0)
    assert model.config.num_samples == len(model.banks[0].rows) > 1000
    with pytest.raises(UserError, match=mentions("num_samples", 5)):
        model.check_source(streaming=False, num_rows=5)
    with pytest.raises(UserError, match=mentions(*words)):
        model.check_source(streaming=True, num_rows=None)
    assert build_model(load_recipe("smoke/cmc"), seed=0).config.num_samples == 0


def test_only_in_batch_negatives_compare_the_images_of_a_batch():
    assert build().couples_samples and build().memory_inputs == ()
    assert build().sample_masks(np.zeros(2, np.uint64)) == {}
    for loss in ("nce", "softmax"):
        assert not with_banks(loss).couples_samples
    one = "training.batch_size=1"
    with pytest.raises(UserError, match=mentions("training.batch_size", "at least 2", "cmc")):
        load_recipe("smoke/cmc", [one])
    assert load_recipe("smoke/cmc", [one, "method.loss=nce"]).training_arguments().batch_size == 1
    with pytest.raises(UserError, match=mentions("training.batch_size", "at least 2", "cmc")):
        build().check_batch_size(1, build().config)
    model = with_banks("nce")
    model.check_batch_size(1, model.config)


def test_more_negatives_than_images_are_an_error():
    with pytest.raises(UserError, match=mentions("method.negatives", BANK_ROWS, BANK_ROWS + 1)):
        with_banks("nce", negatives=BANK_ROWS + 1)


@pytest.mark.parametrize("missing", ["sample_index", "draw_seeds"])
def test_a_bank_without_row_numbers_or_seeds_is_an_error(missing):
    model = with_banks("softmax")
    batch = bank_batch(model)
    del batch[missing]
    with pytest.raises(ValueError, match=missing):
        model(**batch)


@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_a_model_with_banks_is_the_same_after_loading(loss, tmp_path):
    model = with_banks(loss).float()
    batch = {name: x.float() if x.is_floating_point() else x for name, x in bank_batch(model).items()}
    model(**batch).loss.backward()
    model.after_backward(RunProgress(step=0, total_steps=2, steps_per_epoch=2))
    model.save_pretrained(tmp_path)
    loaded = CMCForPreTraining.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with torch.no_grad():
        losses = [each.eval().double()(**bank_batch(model)).loss for each in (model, loaded)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


# What the base class does with the encoder.


def test_hidden_states_are_those_of_the_published_encoder():
    model = trained(build())
    batch = images()
    with torch.no_grad():
        output = model(batch, output_hidden_states=True)
        tuples = model.backbone(batch[:, 0], return_dict=False)
        expected = model.exported_encoder(batch[:, 0], output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(expected) == 3
    for one, other in zip(output.hidden_states, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert isinstance(tuples, tuple)
    torch.testing.assert_close(tuples[0], expected[-1], rtol=0, atol=1e-10)
    with pytest.raises(UserError, match=mentions("output_attentions", "ParallelResNets")):
        model(batch, output_attentions=True)


@pytest.mark.parametrize("gradient_view", [False, True])
def test_activation_checkpoints_do_not_change_gradients(gradient_view):
    found = []
    for enable in (False, True):
        model = build(gradient_view=gradient_view).double().train()
        if enable:
            model.gradient_checkpointing_enable()
            encoders = [model.backbone, *([model.gradient_backbone] if gradient_view else [])]
            for encoder in encoders:
                assert any("forward" in vars(module) for module in encoder.modules())
        model(images()).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-10, msg=name)


def test_layer_decay_gives_all_narrow_encoders_the_same_depths():
    names = [name for name, _ in build().backbone.named_parameters()]
    depths = layer_depths(names)
    assert sorted(set(depths.values())) == [0, 1, 2, 3]
    for name in names:
        assert depths[name] == depths[name.replace("parts.1.", "parts.0.")]
