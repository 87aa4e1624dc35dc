# SPDX-License-Identifier: Apache-2.0
"""Encoders of CMC that do not fold into one: each part has its own subfolder, and all readers join them."""

import copy
import json
import math
import os
import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from example_facts import new_facts
from forks import Forks
from hub_server import HubServer
from messages import mentions
from PIL import Image
from tiers import in_tiers
from transformers import (
    AutoModel,
    ConvNextConfig,
    ConvNextV2Config,
    Dinov2Config,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
)

from hf_ssl import SimCLRConfig, SimCLRForPreTraining
from hf_ssl.building import build_model
from hf_ssl.cards import write_card
from hf_ssl.cards.privacy import public_facts
from hf_ssl.errors import UserError
from hf_ssl.evaluation import attention_maps, has_attention, load_encoder
from hf_ssl.hub import export_encoder, image_processor
from hf_ssl.hub.export import export_model, same_bits
from hf_ssl.hub.publish import encoder_files, publish
from hf_ssl.methods.cmc.configuration_cmc import CMCConfig
from hf_ssl.methods.cmc.modeling_cmc import CMCForPreTraining
from hf_ssl.modeling.backbones import encode, encode_without_columns, feature_size
from hf_ssl.modeling.encoder_parts import PARTS, describe_views
from hf_ssl.modeling.fast_layers import choose_attention
from hf_ssl.modeling.loading import load_config, load_weights
from hf_ssl.modeling.narrow_encoders import feature_width, joined_config, narrow_configs
from hf_ssl.modeling.parallel_encoders import ParallelEncoders, ParallelResNets
from hf_ssl.modeling.parameter_groups import layer_depths
from hf_ssl.recipe import load_recipe
from hf_ssl.views import COLOR_SPACES, to_color_space

SIDE = 32
TOKENS = {"num_hidden_layers": 2, "image_size": SIDE, "patch_size": 8}
CONFIGS = {
    "resnet": ResNetConfig(layer_type="basic", embedding_size=8, depths=[1, 1], hidden_sizes=[12, 17]),
    "convnext": ConvNextConfig(hidden_sizes=[9, 14], depths=[1, 1], num_stages=2, patch_size=2),
    "convnextv2": ConvNextV2Config(hidden_sizes=[9, 14], depths=[1, 1], num_stages=2, patch_size=2),
    "vit": ViTConfig(hidden_size=20, num_attention_heads=5, intermediate_size=30, **TOKENS),
    "dinov2": Dinov2Config(hidden_size=20, num_attention_heads=5, **TOKENS),
}
MEAN, STD = (0.41, 0.52, 0.33), (0.21, 0.27, 0.3)
SPACES = {"lab": None, "ydbdr": [2, 1], "rgb": None}
CASES = [(kind, space) for kind in CONFIGS for space in SPACES if (kind, space[:3]) != ("resnet", "rgb")]
CASES.remove(("resnet", "ydbdr"))  # these fold
SAMPLED = [("resnet", "lab"), ("convnextv2", "ydbdr"), ("vit", "lab")]


def build(kind="resnet", space="lab", **settings):
    """Return a model whose weights and statistics no initialization has."""
    torch.manual_seed(0)
    views = {"size": SIDE, "count": 1, "mean": MEAN, "std": STD}
    settings = {"channel_groups": SPACES[space], "projection_size": 8, **settings}
    model = CMCForPreTraining(
        CMCConfig(backbone_config=CONFIGS[kind], color_space=space, views=views, **settings)
    )
    with torch.no_grad():
        for name, value in model.backbone.named_parameters():
            if "pooler" not in name:
                value += 0.1 * torch.randn_like(value)
        model.backbone.train()(images())
    return model.eval()


def images(count=4, side=SIDE):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def listing(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(("kind", "space"), in_tiers(CASES, SAMPLED))
def test_the_parts_share_the_widths_and_the_features_are_joined(kind, space):
    model, batch = build(kind, space), images()
    backbone, full = model.backbone, CONFIGS[kind]
    assert type(backbone) is ParallelEncoders and model.exported_encoder is backbone
    space_config = COLOR_SPACES[space]
    colors = batch * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    channels = to_color_space(colors, space)
    means = space_config.mean if space == "lab" else to_color_space(torch.tensor(MEAN)[:, None, None], space)
    scaled = (channels - torch.as_tensor(means).reshape(3, 1, 1)) / torch.tensor(space_config.std)[
        :, None, None
    ]
    with torch.no_grad():
        outputs = [
            part(view)
            for part, view in zip(backbone.parts, scaled.split(list(model.config.groups), dim=1), strict=True)
        ]
        joined = backbone(batch)
    expected = torch.cat([output.pooler_output.flatten(1) for output in outputs], dim=1)
    width = full.hidden_size if kind in ("vit", "dinov2") else full.hidden_sizes[-1]
    assert expected.shape == (4, width) and expected.std() > 0.01
    assert feature_size(backbone) == width == sum(backbone.feature_sizes)
    torch.testing.assert_close(joined.pooler_output, expected, rtol=1e-4, atol=1e-4)
    last = [output.last_hidden_state for output in outputs]
    torch.testing.assert_close(
        joined.last_hidden_state, torch.cat(last, dim=2 if last[0].ndim == 3 else 1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("groups", [(1, 2), (1, 1, 1)])
def test_the_joined_config_is_the_inverse(kind, groups):
    full = CONFIGS[kind]
    narrow = narrow_configs(full, groups)
    assert [each.num_channels for each in narrow] == list(groups)
    joined, expected = joined_config(narrow).to_dict(), full.to_dict()
    if kind == "vit":
        expected["pooler_output_size"] = 20
    assert joined == expected
    widths = [feature_width(each) for each in narrow]
    assert sum(widths) == feature_width(full) and min(widths) > 0
    if kind in ("vit", "dinov2"):  # every head has the same width
        assert {each.hidden_size // each.num_attention_heads for each in narrow} == {4}
    if kind == "vit":
        assert {each.intermediate_size / each.hidden_size for each in narrow} == {1.5}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ViTConfig(num_attention_heads=1), ("backbone.num_attention_heads", 2, 1)),
        (
            ViTConfig(hidden_size=16, num_attention_heads=2, intermediate_size=33),
            ("backbone.intermediate_size", "num_attention_heads=2", 33),
        ),
        (
            ViTConfig(hidden_size=15, num_attention_heads=2),
            ("backbone.hidden_size", "num_attention_heads=2", 15),
        ),
        (ConvNextV2Config(hidden_sizes=[8, 1]), ("backbone.hidden_sizes", 2, 1)),
    ],
)
def test_encoders_that_cannot_be_divided_are_errors(config, words):
    with pytest.raises(UserError, match=mentions(*words)):
        narrow_configs(config, (1, 2))


@pytest.mark.parametrize(
    "changes",
    [{"hidden_act": "prelu"}, {"embedding_size": 13, "hidden_sizes": [12, 17]}],
    ids=["prelu", "first"],
)
def test_resnets_whose_folding_is_not_exact_are_published_in_parts(changes):
    """An activation with parameters, and shortcuts that only some of the encoders have."""
    full = ResNetConfig(**{**CONFIGS["resnet"].to_dict(), **changes})
    model = CMCForPreTraining(CMCConfig(backbone_config=full, views={"size": SIDE, "count": 1}))
    assert type(model.backbone) is ParallelEncoders
    same = CMCForPreTraining(CMCConfig(backbone_config=CONFIGS["resnet"], views={"size": SIDE, "count": 1}))
    assert type(same.backbone) is ParallelResNets and type(same.exported_encoder) is ResNetModel


def test_hidden_states_and_attention_weights_are_joined():
    model, batch = build("vit"), images()
    model.set_attn_implementation("eager")
    output = model(batch[:, None], output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in output.hidden_states] == [(4, 17, 20)] * 3
    assert [weights.shape for weights in output.attentions] == [(4, 5, 17, 17)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(4, 5, 17))
    assert isinstance(model.backbone(batch, return_dict=False), tuple)
    with pytest.raises(UserError, match=mentions("output_attentions", "ParallelEncoders")):
        build("resnet")(batch[:, None], output_attentions=True)


@torch.no_grad()
def test_images_of_another_size_interpolate_the_positions():
    model = build("vit")
    assert encode(model.backbone, images(side=40)).shape == (4, 20)


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_gradient_view_trains_an_encoder_that_is_not_published(kind):
    model = build(kind, gradient_view=True).train()
    model(images()[:, None]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert model.exported_encoder.subfolders == ["view_l", "view_ab"]
    if kind == "vit":
        assert not model.gradient_backbone.pooler.dense.weight.requires_grad


@pytest.mark.parametrize(
    ("kind", "space"),
    in_tiers([(kind, "lab") for kind in CONFIGS], [("vit", "lab"), ("convnextv2", "lab")]),
)
def test_further_image_columns_train_encoders_that_are_not_published(kind, space):
    columns = {"depth": "gray", "parts": "classes"}
    found, model = [], build(kind, space, further_image_columns=columns, gradient_view=True).train()
    assert model.view_names == ["l", "ab", "depth", "parts", "gradient"]
    assert [backbone.config.num_channels for backbone in model.column_backbones] == [1, 3]
    widths = [feature_width(backbone.config) for backbone in model.column_backbones]
    assert widths == [model.backbone.feature_sizes[0]] * 2
    assert model.exported_encoder.subfolders == ["view_l", "view_ab"]
    assert not any(p.requires_grad for name, p in model.named_parameters() if "pooler.dense" in name)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "mask_token" in name)
    batch = torch.randn(4, 1, 7, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).double()
    rgb = batch[:, 0, :3]
    torch.testing.assert_close(
        encode_without_columns(copy.deepcopy(model).double().eval().exported_encoder, batch[:, 0]),
        encode(copy.deepcopy(model).double().eval().backbone, rgb),
    )
    for enable in (False, True):
        each = copy.deepcopy(model)
        if enable:
            each.gradient_checkpointing_enable()
            for backbone in each.column_backbones:
                assert any("forward" in vars(module) for module in backbone.modules())
        each.double()(batch).loss.backward()
        found.append({name: p.grad for name, p in each.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["resnet", "convnextv2", "vit"])
def test_activation_checkpoints_do_not_change_gradients(kind):
    found, model = [], build(kind).train()
    for enable in (False, True):
        each = copy.deepcopy(model)
        if enable:
            each.gradient_checkpointing_enable()
        each.double()(images()[:, None].double()).loss.backward()
        found.append({name: parameter.grad for name, parameter in each.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("kind", ["convnextv2", "vit", "dinov2"])
def test_layer_decay_gives_all_parts_the_depths_of_one_encoder(kind):
    names = [name for name, _ in build(kind).backbone.named_parameters()]
    depths, full = layer_depths(names), AutoModel.from_config(CONFIGS[kind])
    expected = layer_depths([name for name, _ in full.named_parameters()])
    assert len(set(expected.values())) == 4
    assert depths == {name: expected[name.split(".", 2)[2]] for name in names}


# Export and loading.


@pytest.mark.parametrize(("kind", "space"), in_tiers(CASES, SAMPLED))
def test_an_exported_encoder_is_loaded_bit_for_bit(kind, space, tmp_path):
    model = build(kind, space)
    choose_attention(model)  # as the trainer does
    export_model(model, tmp_path)
    names = [each["subfolder"] for each in describe_views(model.views)["encoders"]]
    weights = [f"{name}/{file}" for name in names for file in ("config.json", "model.safetensors")]
    pretraining = ["pretraining/config.json", "pretraining/model.safetensors"]
    assert set(listing(tmp_path)) == {PARTS, "preprocessor_config.json", *weights, *pretraining}
    assert set(encoder_files(tmp_path)) == set(listing(tmp_path))
    for name, part in zip(names, model.backbone.parts, strict=True):
        loaded, info = AutoModel.from_pretrained(tmp_path, subfolder=name, output_loading_info=True)
        assert type(loaded) is type(part) and not any(info.values())
        own = part.state_dict()
        assert all(same_bits(value, own[key]) for key, value in loaded.state_dict().items())
    encoder, processor = load_encoder(str(tmp_path))
    assert type(encoder) is ParallelEncoders and not encoder.training and encoder.views == model.views
    torch.testing.assert_close(encode(encoder, images()), encode(model.backbone, images()))
    assert processor.image_mean == pytest.approx(MEAN)
    assert load_config(str(tmp_path)).num_channels == 3 and encoder.name_or_path == str(tmp_path)
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(tmp_path)
    same = AutoModel.from_pretrained(tmp_path, subfolder=names[0])
    assert same.config.num_channels == model.config.groups[0]


def test_the_file_describes_the_views(tmp_path):
    export_model(build(), tmp_path)
    assert json.loads((tmp_path / PARTS).read_text()) == {
        "color_space": "lab",
        "image_mean": list(MEAN),
        "image_std": list(STD),
        "encoders": [
            {"subfolder": "view_l", "channels": ["l"], "mean": [50.0], "std": [50.0]},
            {
                "subfolder": "view_ab",
                "channels": ["a", "b"],
                "mean": [6.025, -6.6895],
                "std": [92.208, 101.1675],
            },
        ],
    }
    linear = describe_views(build("vit", "ydbdr").views)["encoders"]
    assert [each["subfolder"] for each in linear] == ["view_ydb", "view_dr"]
    color = torch.tensor(MEAN, dtype=torch.float64)
    for each in linear:
        found = torch.tensor(each["matrix"]).double() @ color + torch.tensor(each["offset"])
        assert found.tolist() == pytest.approx(each["mean"], abs=1e-6)


# This program cannot import hf_ssl. It executes the code of each card.
WITHOUT_HF_SSL = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_ssl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import os, re
import torch

os.chdir(sys.argv[1])
found = {}
for name in sys.argv[2:]:
    code = re.search(r"```python\\n(.*?)```", open(f"{name}/README.md").read(), re.S)[1]
    scope = {}
    exec(code, scope)
    found[name] = scope["features"]
assert "hf_ssl" not in sys.modules
torch.save(found, "found.pt")
"""


def test_the_code_of_the_card_computes_the_same_features(forks: Forks, tmp_path: Path):
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.jpg")
    expected = {}
    for kind, space, pooling in (
        ("resnet", "lab", "pooler"), ("convnextv2", "ydbdr", "mean"), ("vit", "rgb", "cls"),
    ):  # fmt: skip
        model, name = build(kind, space), f"{kind}_{space}"
        export_model(model, tmp_path / name)
        facts = new_facts()
        facts["name"] = name
        facts["backbone"] |= {
            "class_name": type(model.backbone.parts[0]).__name__,
            "pooling": pooling,
            "parts": describe_views(model.views),
        }
        write_card(tmp_path / name, facts)
        processor = load_encoder(str(tmp_path / name))[1]
        with torch.inference_mode():
            photo = processor(Image.open(tmp_path / "photo.jpg"), return_tensors="pt")["pixel_values"]
            outputs = model.backbone(photo)
        last = outputs.last_hidden_state
        expected[name] = {
            "pooler": outputs.pooler_output,
            "mean": last.flatten(2).mean(2),
            "cls": last[:, 0],
        }[pooling]
        card = (tmp_path / name / "README.md").read_text()
        assert f"({type(model.backbone.parts[0]).__name__}` of transformers)" in card.replace("(`", "(")
    done = forks.run("transformers", WITHOUT_HF_SSL, str(tmp_path), *expected)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    for name, features in expected.items():
        assert features.std() > 0.01
        torch.testing.assert_close(found[name], features, rtol=1e-5, atol=1e-5)


def other_encoder():
    torch.manual_seed(1)
    return ResNetModel(CONFIGS["resnet"]).eval()


def processor():
    return image_processor({"size": SIDE, "mean": MEAN, "std": STD}, 3)


def test_a_second_export_replaces_only_the_encoder(tmp_path):
    export_encoder(build().exported_encoder, processor(), tmp_path)
    parts = set(listing(tmp_path))
    own = ("README.md", "view_l/notes.txt", "view_ab/model_best.safetensors")
    for name in own:
        (tmp_path / name).write_text("old")
    export_encoder(other_encoder(), processor(), tmp_path)
    single = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert set(listing(tmp_path)) == {*single, *own}
    assert type(load_weights(str(tmp_path))) is ResNetModel
    export_encoder(build("vit", "rgb").exported_encoder, processor(), tmp_path)
    export_encoder(build().exported_encoder, processor(), tmp_path)
    assert set(listing(tmp_path)) == {*parts, *own} and not (tmp_path / "view_r").exists()
    assert type(load_weights(str(tmp_path))) is ParallelEncoders


def loads(folder: Path) -> bool:
    """Return whether a user without hf_ssl could load an encoder, or all parts of one."""
    try:
        for name in ("view_l", "view_ab"):
            AutoModel.from_pretrained(folder, subfolder=name)
    except (OSError, ValueError):
        try:
            AutoModel.from_pretrained(folder)
        except (OSError, ValueError):
            return False
    return True


MOVES = list(product(range(7), ["parts", "single", "none"]))


@pytest.mark.parametrize(("moves", "before"), in_tiers(MOVES, MOVES[::4]))
def test_an_interrupted_export_leaves_no_mixture(tmp_path, monkeypatch, before, moves):
    """The description replaces a file in the staging folder first. Then there are 6 files: the processor, two
    weights, two configs and the description, which is the last.
    """
    old, new = build(), build()
    with torch.no_grad():
        for value in old.backbone.parameters():
            value += 1
    if before != "none":
        export_encoder(old.exported_encoder if before == "parts" else other_encoder(), processor(), tmp_path)
    first, replace, done = listing(tmp_path), os.replace, []

    def killed(source, target) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr("hf_ssl.hub.export.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        export_encoder(new.exported_encoder, processor(), tmp_path)
    monkeypatch.undo()
    if moves == 0:
        assert listing(tmp_path) == first
        return
    with pytest.raises(UserError):
        load_weights(str(tmp_path))
    if loads(tmp_path):  # only the description is missing
        assert moves == 6
        for name, part in zip(("view_l", "view_ab"), new.backbone.parts, strict=True):
            loaded = AutoModel.from_pretrained(tmp_path, subfolder=name).state_dict()
            assert all(same_bits(value, loaded[key]) for key, value in part.state_dict().items())
    export_encoder(new.exported_encoder, processor(), tmp_path)
    assert loads(tmp_path) and type(load_weights(str(tmp_path))) is ParallelEncoders


def test_a_part_that_differs_after_loading_is_an_error(tmp_path, monkeypatch):
    model = build()
    first, other = model.backbone.parts[0], copy.deepcopy(model.backbone.parts[0])
    with torch.no_grad():
        other.embedder.embedder.normalization.running_mean[0] += 1
    monkeypatch.setattr(first, "save_pretrained", other.save_pretrained, raising=True)
    with pytest.raises(
        UserError, match=mentions("ResNetModel", "embedder.embedder.normalization.running_mean")
    ):
        export_model(model, tmp_path)
    assert listing(tmp_path) == {}


BROKEN = {
    "no json": ("{", "JSON"),
    "no encoders": (json.dumps({"color_space": "lab"}), "encoders"),
    "a path": (json.dumps({"encoders": [{"subfolder": "../view_l"}]}), "../view_l"),
    "no space": (json.dumps({"encoders": [{"subfolder": "view_l"}]}), PARTS),
}


@pytest.mark.parametrize("case", [*BROKEN, "another mean", "another space", "a missing part", "one part"])
def test_damaged_folders_are_errors(case, tmp_path):
    export_model(build(), tmp_path)
    described = json.loads((tmp_path / PARTS).read_text())
    text, word = BROKEN.get(case, ("", PARTS))
    if case == "another mean":
        described["encoders"][0]["mean"] = [49.0]
        text, word = json.dumps(described), "encoders"
    elif case == "another space":
        text, word = json.dumps({**described, "color_space": "hsv"}), PARTS
    elif case == "a missing part":
        shutil.rmtree(tmp_path / "view_ab")
        text, word = json.dumps(described), "view_ab"
    elif case == "one part":  # the weights of the other channels
        shutil.rmtree(tmp_path / "view_ab")
        shutil.copytree(tmp_path / "view_l", tmp_path / "view_ab")
        text, word = json.dumps(described), "[1, 1]"
    (tmp_path / PARTS).write_text(text)
    with pytest.raises(UserError, match=mentions("encoder", word)) as caught:
        load_encoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_it_is_loaded_from_the_hub_at_one_commit(online: HubServer, tmp_path):
    first, second = build(), build()
    with torch.no_grad():
        for value in second.backbone.parameters():
            value += 0.01
    commits = []
    for model in (first, second):
        export_model(model, tmp_path)
        facts = new_facts()
        facts["backbone"]["parts"], facts["pictures"] = describe_views(model.views), {}
        (tmp_path / "facts.json").write_text(json.dumps(public_facts(facts)))
        write_card(tmp_path, facts)
        commits.append(publish(tmp_path, "someone/parts").commit)
    for revision, model in ((None, second), (commits[0], first), (commits[1], second)):
        encoder, loaded_processor = load_encoder("someone/parts", revision)
        assert type(encoder) is ParallelEncoders and loaded_processor.image_std == pytest.approx(STD)
        own = model.backbone.state_dict()
        assert all(same_bits(value, own[name]) for name, value in encoder.state_dict().items())
        assert encoder.config._commit_hash == (revision or commits[1])
    export_encoder(other_encoder(), processor(), tmp_path)
    done = publish(tmp_path, "someone/parts")
    assert PARTS in done.deleted and "view_ab/config.json" in done.deleted and "config.json" in done.uploaded
    assert type(load_encoder("someone/parts")[0]) is ResNetModel


# Readers.


def test_training_continues_from_the_parts(tmp_path):
    model = build()
    export_model(model, tmp_path)
    settings = {"projection_size": 8, "views": {"size": SIDE, "count": 1}}
    started = CMCForPreTraining.from_backbone(tmp_path, color_space="lab", **settings)
    assert started.continues and started.config.views["mean"] == pytest.approx(MEAN)
    own = model.backbone.state_dict()
    assert all(same_bits(value, own[name]) for name, value in started.backbone.state_dict().items())
    recipe = load_recipe(
        "smoke/cmc",
        ["method.color_space=lab", "views.enlarge=32", f"backbone={{init_from: {tmp_path}}}"],
    )
    built = build_model(recipe, seed=0)
    assert recipe.backbone["model_type"] == "resnet" and built.continues
    assert all(same_bits(value, own[name]) for name, value in built.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ("backbone.init_from", "color_space")),  # rgb, whose encoders fold
        (["method.color_space=lab", "method.channel_groups=[2,1]"], ("backbone.init_from", "channel_groups")),
        (["method.color_space=lab", "views.mean=[0.4,0.4,0.4]"], ("backbone.init_from", "views.mean")),
    ],
)
def test_other_color_views_are_no_start(overrides, words, tmp_path):
    export_model(build(), tmp_path)
    recipe = load_recipe("smoke/cmc", [*overrides, "views.enlarge=32", f"backbone={{init_from: {tmp_path}}}"])
    with pytest.raises(UserError, match=mentions(*words)):
        build_model(recipe, seed=0)


def test_other_methods_cannot_start_from_parts(tmp_path):
    export_model(build(), tmp_path)
    with pytest.raises(UserError, match=mentions("backbone.init_from", "simclr", "cmc")):
        SimCLRForPreTraining.from_backbone(tmp_path)
    with pytest.raises(UserError, match=mentions("backbone.init_from", "CMC")):
        build().start_from(other_encoder())
    with pytest.raises(UserError, match=mentions("from_pretrained", "from_backbone")):
        CMCForPreTraining.from_pretrained(tmp_path)
    assert SimCLRConfig().backbone_config.model_type == "resnet"


def test_attention_maps_need_one_vision_transformer():
    encoder = build("vit").exported_encoder
    assert not has_attention(encoder)
    with pytest.raises(UserError, match=mentions("model", "one vision transformer", "narrow")):
        attention_maps(encoder, images())


def test_a_method_model_is_the_same_after_loading(tmp_path):
    model = build("vit", gradient_view=True)
    model.save_pretrained(tmp_path)
    loaded = CMCForPreTraining.from_pretrained(tmp_path).eval()
    own = model.state_dict()
    assert all(same_bits(value, own[name]) for name, value in loaded.state_dict().items())
    with torch.no_grad():
        losses = [each(images()[:, None]).loss.item() for each in (model, loaded)]
    assert math.isclose(*losses, rel_tol=1e-6)


def test_the_card_names_the_parts(tmp_path):
    facts = new_facts()
    facts["backbone"] |= {"parts": describe_views(build().views), "class_name": "ResNetModel"}
    for name in facts["pictures"]:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    write_card(tmp_path, facts)
    card = (tmp_path / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert (
        'folders = ["view_l", "view_ab"]' in code and "subfolder=name" in code and "def to_lab(rgb)" in code
    )
    assert "encoders.json" in card and "2 narrow encoders (`ResNetModel` of transformers)" in card
