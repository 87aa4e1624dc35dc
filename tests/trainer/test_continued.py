# SPDX-License-Identifier: Apache-2.0
"""Runs that begin with a trained encoder: its weights, layer-wise rates, the head's warmup, the guard."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from messages import mentions
from transformers import (
    Aimv2VisionModel,
    AutoModel,
    BitImageProcessor,
    CLIPVisionModel,
    ConvNextV2Config,
    Dinov2Config,
    ResNetConfig,
    SamVisionModel,
    SwinConfig,
    TimmWrapperConfig,
    TimmWrapperModel,
    ViTConfig,
)

from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SSLTrainingArguments
from hf_ssl.errors import UserError
from hf_ssl.evaluation.classifiers import new_classifier
from hf_ssl.modeling.parameter_groups import layer_depths
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model, build_trainer, pretrain, train
from hf_ssl.trainer.alarms import FeatureGuard
from hf_ssl.trainer.optimizers import build_optimizer, parameter_groups_by_name

SMALL = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def continued(finished_run: Path, *overrides: str, method: str = "simclr"):
    """A smoke recipe on the encoder that another run left."""
    return load_recipe(f"smoke/{method}", [f"backbone={{init_from: {finished_run}}}", *overrides])


@pytest.mark.parametrize(
    ("config", "first", "middle", "last", "blocks"),
    [
        (ViTConfig(**SMALL), "embeddings.cls_token", "layers.1.mlp.fc1.weight", "layernorm.bias", 3),
        (Dinov2Config(**SMALL), "embeddings.mask_token", "encoder.layer.1.norm1.weight", "layernorm.bias", 3),
        (
            ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 1], layer_type="basic"),
            "embedder.embedder.convolution.weight",
            "encoder.stages.0.layers.1.layer.0.convolution.weight",
            None,
            3,
        ),
        (
            ConvNextV2Config(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2),
            "embeddings.patch_embeddings.weight",
            "encoder.stages.1.layers.0.dwconv.weight",
            "layernorm.weight",
            3,
        ),
        (
            SwinConfig(embed_dim=8, depths=[1, 2], num_heads=[1, 2], image_size=32),
            "embeddings.patch_embeddings.projection.weight",
            "encoder.layers.1.blocks.0.attention.q_proj.weight",
            "layernorm.weight",
            3,
        ),
    ],
    ids=["vit", "dinov2", "resnet", "convnextv2", "swin"],
)
def test_depth_of_parameters(config, first, middle, last, blocks):
    with torch.device("meta"):
        found = layer_depths([name for name, _ in AutoModel.from_config(config).named_parameters()])
    assert set(found.values()) == set(range(blocks + (2 if last else 1)))
    assert (found[first], found[middle]) == (0, 2)
    assert last is None or found[last] == blocks + 1


@pytest.mark.parametrize(
    ("kind", "settings", "first", "last"),
    [
        (CLIPVisionModel, {}, ["pre_layrnorm.weight", "embeddings.class_embedding"], "post_layernorm.weight"),
        (Aimv2VisionModel, {}, ["embeddings.patch_embed.weight"], "head.cls_token"),
        (
            SamVisionModel,
            {"output_channels": 8},
            ["pos_embed", "patch_embed.projection.weight"],
            "neck.conv1.weight",
        ),
    ],
)
def test_depth_of_parameters_before_and_after_the_blocks(kind, settings, first, last):
    """Before, CLIP's LayerNorm before the first block had the learning rate of the head."""
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.device("meta"):
        encoder = kind(kind.config_class(**size, **settings))
    names = [name for name, _ in encoder.named_parameters()]
    start = "vision_encoder." if kind is SamVisionModel else ""
    found = layer_depths(names)
    assert [found[f"{start}{name}"] for name in (*first, last)] == [0] * len(first) + [3]
    assert layer_depths(["head.weight", *names])["head.weight"] == 3


@pytest.mark.parametrize(
    ("architecture", "first", "middle", "last"),
    [
        ("regnetx_002", "stem.conv.weight", "s2.b1.conv1.conv.weight", "s4.b7.conv1.conv.weight"),
        ("mobilenetv3_small_050", "conv_stem.weight", "blocks.1.0.conv_pw.weight", "conv_head.weight"),
    ],
)
def test_depth_of_parameters_of_timm(architecture, first, middle, last):
    pytest.importorskip("timm")
    encoder = TimmWrapperModel(TimmWrapperConfig(architecture=architecture))
    found = layer_depths([name for name, _ in encoder.named_parameters()])
    depths = [found[f"timm_model.{name}"] for name in (first, middle, last)]
    assert depths == [0, 2, max(found.values())]


@pytest.mark.parametrize("depths", [[2, 2], [1]])
def test_the_last_block_has_the_decay_in_pretraining_and_in_fine_tuning(depths, tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16][: len(depths)], "layer_type": "basic"}
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=ResNetConfig(**sizes, depths=depths)))
    found = parameter_groups_by_name(model, SSLTrainingArguments(str(tmp_path), layer_decay=0.75))
    name = f"encoder.stages.{len(depths) - 1}.layers.{depths[-1] - 1}.layer.1.convolution.weight"
    classifier = new_classifier(model.backbone, 3, torch.zeros(1, 3, 16, 16), "pooler", native=False)
    groups = classifier.parameter_groups(1.0, 0.0, 0.75, "fine_tune.layer_decay")
    weight = classifier.model.encoder.get_parameter(name)
    (rate,) = [group["lr"] for group in groups if any(each is weight for each in group["params"])]
    assert found[f"backbone.{name}"].learning_rate_scale == rate == 0.75


@pytest.mark.parametrize("architecture", [pytest.param("vgg11", marks=pytest.mark.slow), "densenet121"])
def test_layer_decay_needs_numbered_blocks(architecture, tmp_path):
    pytest.importorskip("timm")
    config = SimCLRConfig(backbone_config=TimmWrapperConfig(architecture=architecture))
    with pytest.raises(UserError, match=mentions("training.layer_decay", "TimmWrapperModel")):
        parameter_groups_by_name(
            SimCLRForPreTraining(config), SSLTrainingArguments(str(tmp_path), layer_decay=0.5)
        )


def test_layers_learn_at_falling_rates_and_heads_alone_at_first(tmp_path):
    vit = (
        "backbone={model_type: vit, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
        "patch_size: 8}"
    )
    recipe = load_recipe(
        "smoke/simclr",
        [vit, "training.layer_decay=0.5", "training.head_warmup_epochs=2", f"training.output_dir={tmp_path}"],
    )
    args = recipe.training_arguments()
    model = build_model(recipe, seed=0)
    found = parameter_groups_by_name(model, args)
    rates = {
        "backbone.embeddings.patch_embeddings.projection.weight": 0.125,
        "backbone.layers.0.mlp.fc1.weight": 0.25,
        "backbone.layers.1.mlp.fc1.bias": 0.5,
        "backbone.layernorm.weight": 1.0,
    }
    assert {name: found[name].learning_rate_scale for name in rates} == rates
    heads = [name for name in found if not name.startswith("backbone.")]
    assert heads and all(found[name].learning_rate_scale == 1.0 for name in heads)
    assert all(found[name].frozen_epochs == (2 if name.startswith("backbone.") else 0) for name in found)
    optimizer = build_optimizer(model, args)
    used = {
        id(p): group["lr"] / args.learning_rate for group in optimizer.param_groups for p in group["params"]
    }
    parameters = dict(model.named_parameters())
    assert {name: pytest.approx(used[id(parameters[name])]) for name in rates} == rates


@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_training_begins_with_the_encoder_its_teacher_too(finished_run, method, tmp_path):
    recipe = continued(finished_run, f"training.output_dir={tmp_path}", method=method)
    model = build_model(recipe, seed=0)
    expected = AutoModel.from_pretrained(finished_run).state_dict()
    for part in ["backbone", *(["teacher_backbone"] if method == "byol" else [])]:
        for name, value in model.get_submodule(part).state_dict().items():
            assert torch.equal(value, expected[name]), f"{part}.{name}"


def test_the_trunk_stays_while_the_head_warms_up(finished_run, tmp_path, no_curves):
    overrides = ["training.head_warmup_epochs=100", "training.monitor_steps=0", "training.disable_tqdm=true"]
    trainer = train(continued(finished_run, *overrides, f"training.output_dir={tmp_path}"))
    before = AutoModel.from_pretrained(finished_run).state_dict()
    fresh = build_model(continued(finished_run, f"training.output_dir={tmp_path}"), seed=0)
    parameters = dict(trainer.model.named_parameters())
    for name, value in parameters.items():
        if name.startswith("backbone."):
            assert torch.equal(value, before[name.removeprefix("backbone.")]), name
    moved = [
        not torch.equal(value, dict(fresh.named_parameters())[name])
        for name, value in parameters.items()
        if not name.startswith("backbone.")
    ]
    assert moved and all(moved)


def test_the_facts_compare_with_the_start_and_tell_no_folder(finished_run, tmp_path):
    recipe = continued(finished_run, f"training.output_dir={tmp_path}", "training.monitor_steps=0")
    facts = pretrain(recipe)
    assert {"trained", "start", "raw_pixels"} == set(facts["results"])
    text = (tmp_path / "facts.json").read_text() + (tmp_path / "README.md").read_text()
    assert "the encoder that training began with" in text and str(finished_run.parent) not in text
    assert json.loads((tmp_path / "facts.json").read_text())["backbone"]["base_model"] is None


def metrics(*accuracies: float) -> list[dict]:
    return [
        {"step": 10 * number, "eval_knn": value, "eval_embedding_std": 0.9}
        for number, value in enumerate(accuracies)
    ]


@pytest.mark.parametrize(
    ("accuracies", "worse"),
    [
        ([0.8, 0.7], False),  # heads disturb at first
        ([0.8, 0.7, 0.65], True),
        ([0.8, 0.65, 0.7], False),  # recovering
        ([0.8, 0.79, 0.78], False),  # within the error of 1000 images
        ([0.8, 0.75, 0.75], True),  # 2.7 standard errors of both
        ([0.8, 0.77, 0.765], False),  # 1.9 standard errors
        ([0.8, 0.9, 0.7], False),
        ([0.8, 0.9, 0.7, 0.7], True),
    ],
)
def test_the_guard_speaks_when_two_in_a_row_are_clearly_worse(accuracies, worse):
    guard, control = (
        FeatureGuard(queries=1000),
        SimpleNamespace(should_training_stop=False, should_save=False),
    )
    history = metrics(*accuracies)
    state = SimpleNamespace(log_history=history)
    guard.on_evaluate(SimpleNamespace(on_worse="stop", device="cpu"), state, control, history[-1])
    assert (guard.message is not None) == control.should_training_stop == control.should_save == worse
    control.should_training_stop = False
    guard.on_evaluate(SimpleNamespace(on_worse="warn", device="cpu"), state, control, history[-1])
    assert not control.should_training_stop


def test_a_run_that_spoils_its_encoder_is_stopped(finished_run, tmp_path, no_curves):
    overrides = [
        "training.learning_rate=3.0", "training.optimizer=sgd", "training.max_steps=60",
        "training.monitor_steps=10", "training.on_worse=stop", "training.disable_tqdm=true",
        "training.max_grad_norm=1.0", f"training.output_dir={tmp_path}",
    ]  # fmt: skip
    with pytest.raises(UserError, match=mentions("k-NN", "training.learning_rate", "training.layer_decay")):
        train(continued(finished_run, *overrides))


def test_only_such_runs_are_guarded(finished_run, tmp_path):
    def guarded(recipe):
        trainer = build_trainer(recipe, recipe.training_arguments())
        assert set(trainer.alarms) <= set(trainer.callback_handler.callbacks)
        assert trainer.stop_reason is None
        found = any(isinstance(alarm, FeatureGuard) for alarm in trainer.alarms)
        with pytest.warns(FutureWarning, match="alarms"):
            assert (trainer.guard is not None) == found
        with pytest.warns(FutureWarning, match="collapse_alarm"):
            assert trainer.collapse_message is None
        return found

    output = f"training.output_dir={tmp_path}"
    assert guarded(continued(finished_run, output))
    assert not guarded(load_recipe("smoke/simclr", [output]))


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("{init_from: nowhere/at-all}", ["nowhere/at-all"]),
        (
            "{init_from: %s, depths: [1]}",
            ["backbone.depths", "backbone.init_from"],
        ),
        ("{init_from: %s, model_type: vit}", ["backbone.model_type", "backbone.init_from", "resnet", "vit"]),
        ("{init_from: %s/pretraining}", ["backbone.init_from", "pretraining"]),
    ],
)
def test_impossible_settings_raise_an_error(finished_run, backbone, parts):
    with pytest.raises(UserError, match=mentions(*parts)):
        load_recipe("smoke/simclr", ["backbone=" + backbone.replace("%s", str(finished_run))])


def test_a_start_replaces_the_encoder_of_the_recipe(finished_run, tmp_path):
    for override in (f"backbone.init_from={finished_run}", f"backbone={{init_from: {finished_run}}}"):
        recipe = load_recipe("smoke/simclr", [override])
        assert recipe.backbone == {"model_type": "resnet", "init_from": str(finished_run)}
    with pytest.raises(UserError, match=mentions("backbone.depths", "backbone.init_from")):
        load_recipe("smoke/simclr", [f"backbone.init_from={finished_run}", "backbone.depths=[1]"])
    random = load_recipe("smoke/simclr", ["backbone.init_from=null"])
    assert random.init_from is None and random.backbone == load_recipe("smoke/simclr").backbone
    part = tmp_path / "run" / "view_l"
    shutil.copytree(finished_run, part)
    (part.parent / "encoders.json").write_text("{}")
    with pytest.raises(UserError, match=mentions(f"backbone.init_from={part.parent}", "cmc")):
        load_recipe("smoke/simclr", [f"backbone.init_from={part}"])


def test_grey_data_need_an_encoder_of_grey_images(finished_run):
    with pytest.raises(UserError, match=mentions("data.channels", "backbone.init_from", 3, 1)):
        continued(finished_run, "data.channels=1", "views.mean=[0.5]", "views.std=[0.5]")


def test_the_views_follow_the_processor_of_the_start(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "start")
    processor = BitImageProcessor.from_pretrained(finished_run)
    processor.image_mean = [0.5, 0.25, 0.125]
    processor.save_pretrained(tmp_path / "start")
    start = f"backbone={{init_from: {tmp_path / 'start'}}}"
    recipe = load_recipe("smoke/simclr", [start])
    assert list(recipe.views.mean) == [0.5, 0.25, 0.125]
    assert list(load_recipe("smoke/simclr", [start, "views.mean=[0, 0, 0]"]).views.mean) == [0, 0, 0]


def test_an_encoder_of_another_shape_is_refused():
    recipe = load_recipe("smoke/simclr")
    other = AutoModel.from_config(
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    )
    with pytest.raises(UserError, match=mentions("backbone.init_from")):
        build_model(recipe, seed=0).start_from(other)
