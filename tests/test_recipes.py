# SPDX-License-Identifier: Apache-2.0
"""Every recipe loads and builds its configs; every mistake in one gets a sentence that names it."""

import json
import math
import os
import re
import tempfile
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from messages import mentions
from tiers import in_tiers
from transformers import ResNetConfig, ResNetModel

from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.methods import METHODS
from hf_ssl.methods.pirl.configuration_pirl import PIRLConfig
from hf_ssl.recipe import Recipe, load_recipe, read_sections
from hf_ssl.resources import recipe_files
from hf_ssl.sections import convert_values, to_dataclass, transformers_config
from hf_ssl.trainer.arguments import DEFAULT_BATCH_SIZE, SSLTrainingArguments
from hf_ssl.views import ViewPreset

SMOKE = "smoke/simclr"


def load(name: str, *overrides: str) -> Recipe:
    """A recipe, given data where it leaves them to the user."""
    sections = yaml.safe_load(recipe_files()[name].read_text())
    given = ["data.path=digits"] if sections["data"]["path"] == "???" else []
    if sections["backbone"].get("init_from") == "???":
        given.append(f"backbone.init_from={some_encoder()}")
    return load_recipe(name, [*given, *overrides])


@cache
def some_encoder() -> str:
    folder = tempfile.mkdtemp(dir=os.environ["HF_HOME"])
    ResNetConfig().save_pretrained(folder)
    return folder


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    return path


def test_no_output_folder_is_the_default_one() -> None:
    for given in ("", "null"):
        recipe = load_recipe("smoke/simclr", [f"training.output_dir={given}", "training.report_to=null"])
        assert recipe.output_dir == Path("runs/smoke/simclr")
        assert recipe.training_arguments().report_to == []


@pytest.mark.parametrize("name", in_tiers(zip(recipe_files()), list(zip(recipe_files()))[::3]))
def test_recipe_builds_what_it_describes(name: str) -> None:
    recipe = load(name)
    config = recipe.config()
    assert config.model_type == f"ssl_{recipe.method['name']}"
    assert config.backbone_config.model_type == recipe.backbone["model_type"]
    assert ViewPreset.from_dict(config.views) == recipe.views
    arguments = recipe.training_arguments()
    for key, value in recipe.training.items():
        found = asdict(arguments.lars) if key == "lars" else getattr(arguments, key)
        assert found == value or key == "report_to", key
    assert isinstance(recipe.data, DataConfig) and isinstance(recipe.evaluation, EvaluationConfig)


@pytest.mark.parametrize("name", recipe_files())
def test_recipe_says_what_it_is(name: str) -> None:
    header = recipe_files()[name].read_text().split("\nmethod:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert re.search(rf"Command: .*pretrain(\.py)? {name}\b", header) or name == "demo"
    for word in (
        "Hardware:",
        "Command:",
        *(() if name.startswith("smoke/") else ("Paper:", "Differs:", "Result:")),
    ):
        assert word in header, word


def test_the_kernel_of_the_blur_of_local_views_is_wide_enough() -> None:
    """The authors blur with Pillow. The default kernel, a tenth of a view, would cut the Gaussian off."""
    found = {}
    for name, file in recipe_files().items():
        preset = ViewPreset.from_dict(yaml.safe_load(file.read_text())["views"])
        local = preset.expand()[-1]
        if preset.local_count and local.blur:
            found[name] = local.blur_kernel_size // 2 / local.blur_sigma[1]
    assert {name: sigmas for name, sigmas in found.items() if sigmas < 3} == {}
    assert {"dino_vit_small", "swav_resnet50_imagenet"} <= found.keys()


# These authors do not synchronize BatchNorm. VISSL: vissl/config/defaults.yaml, SYNC_BN_CONFIG.
@pytest.mark.parametrize(
    "name",
    [
        "moco_v1_resnet50_imagenet",
        "moco_v2_resnet50_imagenet",
        "pirl_resnet50_imagenet",
        "pirl_resnet50_imagenet_200ep",
    ],
)
def test_batch_norm_of_each_process_is_separate_as_in_the_code_of_the_authors(name: str) -> None:
    assert load(name).training["sync_batch_norm"] is False


WIDE = [name for name in recipe_files() if re.search("resnet50x[24]", name)]


@pytest.mark.parametrize("name", WIDE)
def test_wide_encoders_have_the_published_number_of_parameters(name: str) -> None:
    """94 and 375 million (SimCLR, table 6), as the authors' code of SwAV (resnet50w2, resnet50w4)."""
    with torch.device("meta"):
        encoder = ResNetModel(load(name).backbone_config())
    expected = {"x2": 93_907_072, "x4": 375_378_176}[re.search("x[24]", name)[0]]
    assert sum(parameter.numel() for parameter in encoder.parameters()) == expected


def test_every_method_has_a_smoke_recipe() -> None:
    assert {load(f"smoke/{name}").method["name"] for name in METHODS} == set(METHODS)


def test_recipe_survives_json_and_yaml(tmp_path: Path) -> None:
    plain = load(
        SMOKE, "views.local={count: 2, size: 4}", "method.temperature=1", "training.learning_rate=1"
    ).to_dict()
    sections = json.loads(json.dumps(plain))
    del sections["name"]
    again = load_recipe(write(tmp_path, yaml.safe_dump(sections)))
    assert again.to_dict() == plain | {"name": "own"}


def test_overrides_win_in_order() -> None:
    recipe = load(
        SMOKE,
        "training.learning_rate=1e-3",
        "training.learning_rate=2e-3",
        "views.local.count=2",
        "views.local.scale=[0.1, 0.5]",
        "method.temperature=1",
        "publish.tags=[a, b]",
        "data.name=null",
        "evaluation.temperatures=[1]",
    )
    assert recipe.training["learning_rate"] == 0.002
    assert (recipe.views.local.count, recipe.views.local.scale) == (2, (0.1, 0.5))
    assert recipe.config().temperature == 1.0 and isinstance(recipe.config().temperature, float)
    assert recipe.publish.tags == ["a", "b"]
    assert recipe.data.name is None
    assert recipe.overrides[0] == "training.learning_rate=1e-3"


@pytest.mark.parametrize(
    ("of_file", "given", "expected"),
    [
        ({"base_learning_rate": 0.3, "learning_rate_rule": "linear"}, ["learning_rate=0.01"],
         {"learning_rate": 0.01, "learning_rate_rule": "none"}),
        ({"learning_rate": 0.01}, ["base_learning_rate=0.3"], {"learning_rate": 0.3}),
        ({"warmup_epochs": 10}, ["warmup_steps=5"], {"warmup_steps": 5, "warmup_epochs": 0}),
        ({"warmup_epochs": 10}, ["warmup_steps=0"], {"warmup_steps": 0, "warmup_epochs": 0}),
        ({"warmup_steps": 5}, ["warmup_epochs=10"], {"warmup_epochs": 10}),
        ({"max_steps": 8}, ["num_train_epochs=5"], {"max_steps": -1, "num_train_epochs": 5}),
        ({"num_train_epochs": 5}, ["max_steps=8"], {"max_steps": 8}),
        ({}, ["max_steps=8", "num_train_epochs=5"], {"max_steps": -1}),
        ({}, ["num_train_epochs=5", "max_steps=8"], {"max_steps": 8}),
        ({"bf16": True, "precision": "auto"}, ["precision=float32"], {"precision": "float32"}),
        ({"precision": "float32"}, ["bf16=true"], {"precision": "bfloat16"}),
    ],
)  # fmt: skip
def test_an_override_replaces_other_keys_of_the_recipe_for_the_same_setting(
    of_file: dict, given: list[str], expected: dict, tmp_path: Path
) -> None:
    """Before, `training.learning_rate=0.01` had no effect on recipes with `base_learning_rate`."""
    plain = yaml.safe_load(recipe_files()[SMOKE].read_text())
    used = ("max_steps", "learning_rate", "precision")
    plain["training"] = {key: of for key, of in plain["training"].items() if key not in used} | of_file
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(plain)), [f"training.{text}" for text in given])
    args = recipe.training_arguments()
    assert {key: getattr(args, key) for key in expected} == expected


def test_a_whole_section_can_be_replaced() -> None:
    recipe = load(SMOKE, "backbone={model_type: vit, patch_size: 4, hidden_size: 24, num_hidden_layers: 1}")
    assert recipe.backbone_config().hidden_size == 24
    assert "embedding_size" not in recipe.backbone


def test_the_encoder_follows_data_and_views() -> None:
    backbone = "backbone={model_type: vit, patch_size: 4, hidden_size: 24, num_hidden_layers: 1}"
    gray = ("data.channels=1", "views.mean=[0.5]", "views.std=[0.5]")
    config = load(SMOKE, backbone, *gray).backbone_config()
    assert (config.num_channels, config.image_size) == (1, 16)
    timm = pytest.importorskip("timm") and "backbone={model_type: timm_wrapper, architecture: resnet10t}"
    assert load(SMOKE, timm, *gray).backbone["model_args"] == {"in_chans": 1}
    assert "model_args" not in load(SMOKE, timm).backbone


@pytest.mark.parametrize("given", [224, [16, 16]])
def test_an_encoder_without_positions_can_have_any_image_size(given: object) -> None:
    """As with `backbone.init_from` and in Python."""
    sizes = "hidden_sizes: [8, 16], depths: [1, 1], num_stages: 2"
    recipe = load(SMOKE, f"backbone={{model_type: convnextv2, {sizes}, image_size: {given}}}")
    assert recipe.backbone_config().image_size == given


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (float, "1e-1", 0.1), (float, 1, 1.0), (float, np.float32(0.5), 0.5), (float, True, None),
        (float, "warm", None), (int, 3.0, 3), (int, "3", 3), (int, np.int64(3), 3), (int, 2.5, None),
        (int, True, None), (int, "two", None), (float, math.inf, None), (float, math.nan, None),
        (float, "inf", None), (bool, "true", True), (bool, "No", False), (bool, 0, False), (bool, 1.0, True),
        (bool, 2, None), (bool, "maybe", None), (str, 5, "5"), (str, 0.5, "0.5"), (str, True, None),
        (str, math.inf, None),
    ],
)  # fmt: skip
def test_values_of_all_settings_follow_one_rule(kind, given, expected, tmp_path) -> None:
    """In recipes and in Python: data, evaluation, protocols, views, methods and training."""
    in_data, in_evaluation, in_protocol, in_views, in_method, in_training = {
        float: (
            "max_broken_fraction",
            "cache_size",
            ("fine_tune", "flip"),
            "flip",
            "temperature",
            "weight_decay",
        ),
        int: ("max_images", "batch_size", ("mlp", "epochs"), "size", "negatives", "max_steps"),
        bool: ("streaming", "cache", ("mlp", "standardize"), None, "patch_augmentation", "channels_last"),
        str: ("name", "cache_dir", ("fine_tune", "folder"), None, None, "run_name"),
    }[kind]
    section, (protocol, key) = {in_training: given}, in_protocol
    backbone = {"backbone_config": ResNetConfig()}
    makes = [
        lambda: vars(DataConfig.of({in_data: given}))[in_data],
        lambda: vars(DataConfig.of(DataConfig(**{in_data: given})))[in_data],
        lambda: vars(to_dataclass(DataConfig, {in_data: given, "path": "x"}, "data"))[in_data],
        lambda: vars(EvaluationConfig.of({in_evaluation: given}))[in_evaluation],
        lambda: vars(EvaluationConfig(settings={protocol: {key: given}}).of_protocol(protocol))[key],
        lambda: convert_values(SSLTrainingArguments, section, "training")[in_training],
        lambda: vars(SSLTrainingArguments(output_dir=str(tmp_path), **section))[in_training],
    ]
    if in_method is not None:
        values = {in_method: given}
        makes.append(lambda: vars(PIRLConfig(**values, **backbone))[in_method])
        makes.append(lambda: vars(transformers_config(PIRLConfig, values, "method", **backbone))[in_method])
    if in_views is not None:
        for preset in (
            lambda: ViewPreset(**{in_views: given}),
            lambda: ViewPreset.from_dict({in_views: given}),
        ):
            makes.append(lambda preset=preset: preset().check(3) or vars(preset())[in_views])
    for make in makes:
        if expected is None:
            with pytest.raises((UserError, StrictDataclassError)):
                make()
        else:
            found = make()
            assert found == expected and type(found) in (kind, int)


def test_differences_are_what_the_defaults_are_not() -> None:
    found = load(SMOKE).differences()
    assert found["method.temperature"] == 0.5
    assert found["views.enlarge"] == 16
    assert found["training.max_steps"] == 8
    assert found["evaluation.settings"]["few_label_knn"]["labels_per_class"] == [5]
    same = load(
        SMOKE, "method.projection_layers=3", "views.size=224", "views.enlarge=null", "training.max_steps=-1"
    )
    assert found.keys() - same.differences().keys() == {
        "method.projection_layers",
        "views.size",
        "views.enlarge",
        "training.max_steps",
    }
    assert not {"method.name", "backbone.model_type", "data.path", "training.output_dir"} & found.keys()


def test_a_group_of_training_differs_by_its_own_keys() -> None:
    found = load(SMOKE, "training.lars.variant=larc", "training.lars.clip=false").differences()
    assert {key: value for key, value in found.items() if "lars" in key} == {"training.lars.variant": "larc"}


def test_a_difference_in_some_views_contains_only_the_keys_that_are_set() -> None:
    found = load(SMOKE, "views.second={solarize: 0.2}").differences()
    assert found["views.second"] == {"solarize": 0.2}


@pytest.mark.parametrize(
    "old",
    [
        ["training.lars_trust_coefficient=0.01", "training.lars_variant=larc"],
        [
            "training.lars.trust_coefficient=0.3",
            "training.lars_trust_coefficient=0.01",
            "training.lars_variant=larc",
        ],
        [
            "training={lars_trust_coefficient: 0.3, lars_variant: larc}",
            "training.lars.trust_coefficient=0.01",
        ],
    ],
)
def test_renamed_keys_of_the_command_line_work_in_order(old: list[str]) -> None:
    with pytest.warns(FutureWarning, match=mentions("training.lars_variant", "training.lars.variant")):
        recipe = load(SMOKE, *old)
    new = load(SMOKE, "training.lars={trust_coefficient: 0.01, variant: larc}")
    assert recipe.training["lars"] == new.training["lars"]
    assert recipe.training_arguments().lars == new.training_arguments().lars
    assert not [key for key in recipe.training if key.startswith("lars_")]


def test_renamed_keys_of_a_file_work_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    sections = yaml.safe_load(recipe_files()[SMOKE].read_text())
    sections["training"] |= {"lars_variant": "larc", "lars_clip": True}
    path = write(tmp_path, yaml.safe_dump(sections))
    with pytest.warns(FutureWarning, match=mentions("training.lars_clip", "training.lars.clip")):
        group = load_recipe(path, ["training.lars.variant=simclr"]).training_arguments().lars
    assert (group.variant, group.clip) == ("simclr", True)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("evaluation.neighbours=[3]", "evaluation.neighbors=[3]"),
        ("training.monitor_neighbours=3", "training.monitor_neighbors=3"),
    ],
)
def test_keys_in_british_spelling_work(old: str, new: str) -> None:
    with pytest.warns(FutureWarning, match=mentions(old.partition("=")[0], new.partition("=")[0])):
        recipe = load(SMOKE, old)
    assert recipe.to_dict() == load(SMOKE, new).to_dict()


def test_output_folder_has_a_default() -> None:
    assert load(SMOKE).training["output_dir"] == "runs/smoke/simclr"
    assert load(SMOKE, "training.output_dir=x").training["output_dir"] == "x"


# Mistakes of users, and the facts that the message must name.
MISTAKES = {
    "trainin.max_steps=3": ["trainin", "training"],
    "training.max_step=3": ["training.max_step", "training.max_steps"],
    "views.sise=3": ["views.sise", "views.size"],
    "views.local.cound=3": ["views.local.cound", "views.local.count"],
    "data.splitt=a": ["data.splitt", "data.split"],
    "publish.repo=a": ["publish.repo", "publish.repo_id"],
    "method.temprature=1": ["method.temprature", "method.temperature"],
    "method.views={}": ["method.views"],
    "method.dtype=float16": ["method.dtype"],
    "backbone.depth=[1]": ["backbone.depth", "backbone.depths"],
    "method.name=simcrl": ["method", "simcrl", "simclr"],
    "backbone.model_type=resnett": ["backbone.model_type", "resnett", "resnet"],
    "backbone.model_type=ssl_simclr": ["backbone.model_type", "ssl_simclr"],
    "backbone={depths: [1]}": ["backbone.model_type"],
    "method={temperature: 1}": ["method.name"],
    "data={channels: 3}": ["data.path"],
    "data.path=null": ["data.path", "None"],
    "training.max_steps=abc": ["training.max_steps", "whole number", "abc"],
    "training.max_steps=3.5": ["training.max_steps", "whole number", 3.5],
    "training.learning_rate=abc": ["training.learning_rate", "number", "abc"],
    "training.bf16=maybe": ["training.bf16", "true", "false", "maybe"],
    "training.optimizer=sgdd": ["training.optimizer", "sgd", "adamw", "lars", "sgdd"],
    "training.lars.variant=lamb": ["training.lars.variant", "barlowtwins", "simclr", "larc", "lamb"],
    "training.lars.cliip=true": ["training.lars.cliip", "training.lars.clip"],
    "training.lars.clip=maybe": ["training.lars.clip", "true", "false", "maybe"],
    "training.lars=larc": ["training.lars", "larc"],
    "training.lr_scheduler_type=foo": ["training", "foo"],
    "training.per_device_train_batch_size=3": ["training.per_device_train_batch_size", "training.batch_size"],
    "training.batch_size=1": ["training.batch_size", "simclr", 2, 1],
    "training.batch_size=-8": ["training.batch_size", -8],
    "views.scale=[1]": ["views.scale", 2, "[1]"],
    "views.scale=[a, b]": ["views.scale", 2, "a", "b"],
    "views.local=3": ["views.local", 3],
    "views.count=1": ["views.count", "simclr", 2, 1],
    "evaluation.neighbors=[a]": ["evaluation.neighbors", "whole numbers", "a"],
    "evaluation.test_split=train": ["evaluation", "test_split", "train_split", "train"],
    "method.temperature=abc": ["method.temperature", "number", "abc"],
    "method.temperature=0.0001": ["method.temperature", 0.003, 0.0001],
    "method.projection_layers=2.5": ["method.projection_layers", "whole number", 2.5],
    "backbone.depths=[1, a]": ["backbone.depths", "whole numbers", "a"],
    "backbone.layer_type=foo": ["backbone", "layer_type", "foo"],
    "backbone.num_channels=1": ["backbone.num_channels", "data.channels", 3, 1],
    "backbone={model_type: vit, image_size: 224}": ["backbone.image_size", 16, 224],
    "backbone={model_type: vit, patch_size: 7}": ["backbone.patch_size", 16, 7],
    "backbone={model_type: vit, patch_size: 4, hidden_act: foo}": ["backbone", "vit"],
    "backbone={model_type: bert}": ["backbone.model_type", "bert"],
    "backbone={model_type: timm_wrapper, architecture: resnet181}": ["backbone", "timm_wrapper", "resnet181"],
    "data.channels=2": ["data.channels", 3, 1, 2],
    "data.path=${oc.env:HOME}": ["data.path", "${oc.env:HOME}"],
    "data.path=[a": ["data.path=[a"],
    "max_steps=3": ["section.key=value", "max_steps=3"],
    "training.max_steps": ["section.key=value", "training.max_steps"],
    "backbone=3": ["backbone.key=value", "backbone=3"],
    "data.=3": ["data.key=value", "data.=3"],
    "=3": ["section.key=value", "=3"],
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_get_a_sentence(override: str) -> None:
    with pytest.raises(UserError, match=mentions(*MISTAKES[override])) as caught:
        load(SMOKE, override)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 300


def test_local_views_must_fit_the_patches_too() -> None:
    vit = "backbone={model_type: vit, patch_size: 8, hidden_size: 24, num_hidden_layers: 1}"
    load(SMOKE, vit, "views.local={count: 2, size: 4}")
    with pytest.raises(UserError, match=mentions("backbone.patch_size", 12, 8)):
        load(SMOKE, vit, "views.local={count: 2, size: 6}")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("smoke/simcrl", ["smoke/simcrl", "smoke/simclr"]),
        ("zzzzzzzzzzzz", ["zzzzzzzzzzzz", "hf-ssl recipes"]),
        ("nowhere/own.yaml", ["nowhere/own.yaml"]),
        ("demo.yaml", ["demo.yaml", "demo"]),
    ],
)
def test_unknown_recipes_are_named(name: str, parts: list) -> None:
    with pytest.raises(UserError, match=mentions(*parts)):
        load_recipe(name)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("method:\n  name: simclr\n  - x\n", ["own.yaml", "line 3"]),
        (
            "method: {name: simclr}\nmethod: {name: simclr}\n",
            ["own.yaml", "line 2", "method"],
        ),
        ("- method\n", ["own.yaml", "method", "backbone", "list"]),
        ("just words\n", ["own.yaml", "just words"]),
        ("method: simclr\n", ["own.yaml", "method", "simclr"]),
        (
            "method: {name: simclr}\nbackbon: {}\n",
            ["own.yaml", "backbon", "backbone"],
        ),
        ("method: {name: simclr}\n", ["own.yaml", "backbone.model_type"]),
        ("", ["own.yaml", "method.name"]),
        ("publish:\n  title: ${oc.env:HOME}\n", ["publish.title", "${oc.env:HOME}"]),
    ],
)
def test_broken_files_get_a_sentence(tmp_path: Path, text: str, parts: list) -> None:
    with pytest.raises(UserError, match=mentions(*parts)) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_binary_file_gets_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match=mentions("own.yaml", "YAML")):
        load_recipe(path)


def test_sections_of_a_command_line_alone() -> None:
    data, evaluation = read_sections(["data.path=digits", "evaluation.draws=3"])
    assert (data, evaluation) == (DataConfig(path="digits"), EvaluationConfig(draws=3))
    with pytest.raises(UserError, match=mentions("data.path")):
        read_sections([])
    with pytest.raises(UserError, match=mentions("training")):
        read_sections(["training.seed=1"])


def test_defaults_of_training_are_transformers_but_for_ours() -> None:
    """A recipe that sets nothing gets the default batch size."""
    assert load(SMOKE, "training={}").training_arguments().batch_size == DEFAULT_BATCH_SIZE


def test_a_method_without_a_text_for_its_card_is_reported_before_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(METHODS, "new", METHODS["simclr"]._replace(title="New"))
    with pytest.raises(UserError, match=mentions("method.name", "model_cards/methods/new.md")):
        load(SMOKE, "method.name=new")
