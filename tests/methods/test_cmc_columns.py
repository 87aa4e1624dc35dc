# SPDX-License-Identifier: Apache-2.0
"""CMC with further image columns: their views, the published encoder, and wrong settings."""

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from huggingface_hub.errors import StrictDataclassError
from messages import mentions
from methods.test_cmc import BASIC, build, slow_loss
from PIL import Image as Pillow
from tiers import in_tiers
from transformers import ResNetConfig, ResNetModel, ViTConfig

from hf_ssl import SimCLRConfig, SimCLRForPreTraining, SSLTrainer, SSLTrainingArguments
from hf_ssl.errors import UserError
from hf_ssl.methods.cmc.configuration_cmc import CMCConfig
from hf_ssl.methods.cmc.modeling_cmc import CMCForPreTraining
from hf_ssl.modeling.backbones import encode
from hf_ssl.recipe import load_recipe

COLUMNS = {"normals": "normals", "depth.png": "gray"}
CHANNELS = 3 + 1 + 3


def images(count=6, channels=CHANNELS, side=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, channels, side, side, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("graph", ["core", "full"])
def test_each_column_is_a_view(graph):
    model = build(graph=graph, further_image_columns=COLUMNS).double()
    assert model.view_names == ["y", "dbdr", "depth", "normals"]
    batch = images()
    output = model(batch)
    pairs = [(0, 1), (0, 2), (0, 3)] if graph == "core" else list(combinations(range(4), 2))
    torch.testing.assert_close(output.loss, slow_loss(output.embeddings.unbind(1), pairs, 0.07))
    names = [f"{model.view_names[one]}_{model.view_names[other]}" for one, other in pairs]
    assert set(output.terms) == {f"{kind}_{name}" for name in names for kind in ("info_nce", "information")}
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_a_view_changes_only_with_its_own_channels():
    model = build(further_image_columns=COLUMNS, gradient_view=True).double().eval()
    batch = images()
    before = model.embed({"pixel_values": batch})["projections"]
    for channels, changes in (
        (slice(3), [True, True, False, False, True]),
        ([3], [False, False, True, False, False]),
        ([5], [False, False, False, True, False]),
    ):
        other = batch.clone()
        other[:, :, channels] += torch.randn_like(other[:, :, channels])
        changed = (model.embed({"pixel_values": other})["projections"] - before).abs().amax((0, 2)) > 1e-3
        assert changed.tolist() == changes
    features = encode(model.column_backbones[1], batch[:, 0, 4:])
    expected = torch.nn.functional.normalize(model.heads[3](features), dim=-1)
    torch.testing.assert_close(before[:, 3], expected)


@torch.no_grad()
def test_the_columns_are_not_published():
    model = build(further_image_columns=COLUMNS).double()
    model.train()(images())
    encoder = model.eval().exported_encoder
    assert type(encoder) is ResNetModel and encoder.config.num_channels == 3
    rgb = images()[:, 0, :3]
    torch.testing.assert_close(encode(encoder, rgb), encode(model.backbone, rgb))
    without = copy.deepcopy(model)
    for parameter in without.column_backbones.parameters():
        parameter += 1
    for name, value in without.exported_encoder.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name])


def test_the_order_of_the_columns_does_not_matter():
    orders = (COLUMNS, dict(reversed(COLUMNS.items())))
    first, second = (build(further_image_columns=columns) for columns in orders)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.double().eval()(images()).loss, second.double().eval()(images()).loss)


def test_a_model_with_columns_is_the_same_after_loading(tmp_path):
    model = build(further_image_columns=COLUMNS)
    model.save_pretrained(tmp_path)
    loaded = CMCForPreTraining.from_pretrained(tmp_path)
    assert loaded.config.columns == model.config.columns and loaded.view_names == model.view_names
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_one_view_of_all_colors_and_a_column_are_two_views():
    model = build(color_space="rgb", channel_groups=[3], further_image_columns={"depth": "gray"})
    assert model.view_names == ["rgb", "depth"] and model.pairs == [(0, 1)]


@pytest.mark.parametrize("channels", [3, 6, 8])
def test_another_number_of_channels_is_an_error(channels):
    with pytest.raises(UserError, match=mentions("pixel_values", CHANNELS, channels)):
        build(further_image_columns=COLUMNS).double()(images(channels=channels))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"depth": "grey"}, ("data.further_image_columns.depth", "grey", "gray")),
        ({"depth.png": "gray", "depth.tif": "gray"}, ("data.further_image_columns", "depth")),
        ({"y": "gray"}, ("data.further_image_columns", "y")),
        ({"gradient": "gray"}, ("data.further_image_columns", "gradient")),
    ],
)
def test_wrong_columns_of_a_config_are_errors(columns, words):
    with pytest.raises(StrictDataclassError, match=mentions(*words)):
        build(further_image_columns=columns)


@pytest.mark.parametrize(
    ("recipe", "overrides", "words"),
    [
        ("smoke/simclr", ["data.further_image_columns.depth=gray"], ("simclr", "cmc", "depth")),
        ("smoke/cmc", ["data.further_image_columns.depth=grey"], ("depth", "grey", "gray")),
        ("smoke/cmc", ["data.further_image_columns=depth"], ("further_image_columns", "mapping", "depth")),
        ("smoke/cmc", ["method.further_image_columns={a: gray}"], ("method.further_image_columns",)),
        (
            "smoke/cmc",
            [
                "data.further_image_columns.depth=gray", "data.channels=1", "views.mean=[0.5]",
                "views.std=[0.2]",
            ],
            ("data.channels", 3, 1),
        ),
        *(
            ("smoke/cmc", ["data.further_image_columns.up=normals", f"{key}=0.5"], (key, "up", 0.5))
            for key in ("views.rotation", "views.quarter_turns")
        ),
    ],
)  # fmt: skip
def test_wrong_columns_of_a_recipe_are_errors(recipe, overrides, words):
    with pytest.raises(UserError, match=mentions(*words)):
        load_recipe(recipe, overrides)


def test_a_recipe_gives_the_columns_to_data_and_method():
    columns = "data.further_image_columns={depth: gray, a.png: classes}"
    recipe = load_recipe("smoke/cmc", [columns, "views.rotation=0.5"])
    assert recipe.config().columns == {"a.png": "classes", "depth": "gray"}
    assert recipe.differences()["data.further_image_columns"] == {"depth": "gray", "a.png": "classes"}
    assert load_recipe("smoke/cmc").config().columns == {}


@pytest.fixture(scope="module")
def table():
    def picture(row, channels):
        noise = np.random.default_rng(row).integers(0, 256, (16, 16, *channels), dtype=np.uint8)
        return Pillow.fromarray(noise)

    rows = {
        "photo": [picture(row, (3,)) for row in range(24)],
        "depth": [picture(100 + row, ()) for row in range(24)],
        "label": [row % 2 for row in range(24)],
    }
    features = {"photo": Image(), "depth": Image(), "label": ClassLabel(2)}
    return Dataset.from_dict(rows, features=Features(features))


# oneDNN 3.5 (torch 2.6) damages memory in convolutions of 6 channels on a CPU without AVX-512.
WIDE = BASIC | {"embedding_size": 16, "hidden_sizes": [16, 32]}


KINDS = ["table", "stream", "items", "chunks", "banks", "vit"]


@pytest.mark.parametrize("kind", in_tiers(zip(KINDS), [("stream",), ("banks",)]))
def test_the_trainer_takes_columns(kind, table, tmp_path):
    data, changes, model = table, {}, None
    if kind == "stream":
        data = table.to_iterable_dataset(num_shards=2)
    elif kind == "items":
        data = [table[row] for row in range(24)]
    elif kind == "chunks":
        changes = {"contrastive_chunk_size": 4}
    elif kind == "banks":
        banks = {"loss": "nce", "negatives": 8, "num_samples": 24}
        model = build(WIDE, further_image_columns={"depth": "gray"}, **banks)
    elif kind == "vit":
        views = {"size": 16, "count": 1, "mean": [0.5] * 3, "std": [0.2] * 3}
        backbone = ViTConfig(
            hidden_size=32, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1, image_size=16,
            patch_size=8,
        )  # fmt: skip
        config = CMCConfig(
            backbone_config=backbone, views=views, color_space="lab", further_image_columns={"depth": "gray"}
        )
        model, changes = CMCForPreTraining(config), {"gradient_checkpointing": True}
    first, other = ("l", "ab") if kind == "vit" else ("y", "dbdr")
    columns = {"further_image_columns": {"depth": "gray"}}
    made = SSLTrainer(
        build(WIDE, **columns) if model is None else model,
        SSLTrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, use_cpu=True,
            report_to="none", disable_tqdm=True, monitor_steps=2, save_strategy="no", logging_steps=1,
            **changes,
        ),
        train_dataset=data,
        eval_dataset=table.remove_columns("depth"),
        data=columns,
    )  # fmt: skip
    made.train()
    records = [record for record in made.state.log_history if "loss" in record]
    loss = "nce" if kind == "banks" else "info_nce"
    pairs = [f"{first}_{other}", f"{first}_depth", f"{other}_depth"]
    assert {f"term_{loss}_{pair}" for pair in pairs} <= records[0].keys()
    measured = [record for record in made.state.log_history if "eval_knn" in record]
    assert measured and all(np.isfinite(record["eval_rank_me"]) for record in measured)
    assert made.predict(table.remove_columns("depth")).predictions.shape == (24, WIDE["hidden_sizes"][-1])


@pytest.mark.parametrize(
    ("model", "columns", "words"),
    [
        ("cmc", {}, ("data.further_image_columns", "depth", "gray")),
        ("cmc", {"depth": "rgb"}, ("data.further_image_columns", "rgb", "gray")),
        ("simclr", {"depth": "gray"}, ("data.further_image_columns", "simclr", "cmc")),
    ],
)
def test_the_trainer_compares_the_columns_of_data_and_model(model, columns, words, table, tmp_path):
    simclr = SimCLRConfig(backbone_config=ResNetConfig(**BASIC), views={"size": 16})
    built = build(further_image_columns={"depth": "gray"}) if model == "cmc" else SimCLRForPreTraining(simclr)
    args = SSLTrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to="none")
    data = {"further_image_columns": columns, "image_column": "photo"}
    with pytest.raises(UserError, match=mentions(*words)):
        SSLTrainer(built, args, train_dataset=table, data=data)
    assert not (tmp_path / "run").exists()
