# SPDX-License-Identifier: Apache-2.0
"""Real processes: killed in mid-epoch and resumed, and two that train together."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset, Image
from forks import Forks
from tiers import in_tiers

from hf_ssl.data import DataConfig, open_source, train_loader
from hf_ssl.methods import METHODS
from hf_ssl.modeling.outputs import RunProgress
from hf_ssl.modeling.parameter_groups import assign_parameter_groups
from hf_ssl.recipe import load_recipe
from hf_ssl.run import build_model
from hf_ssl.trainer.callbacks import SEED_OFFSET

# Passes of 4 steps and checkpoints at every second: the kill comes in the second pass, a step after one.
STEPS, KILLED_AT = 9, 7
BACKBONES = {
    "resnet": "{model_type: resnet, layer_type: basic, embedding_size: 8, depths: [1, 1], "
    "hidden_sizes: [8, 16]}",
    # dropout: the random state has to be resumed too
    "vit": "{model_type: vit, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 4, "
    "intermediate_size: 32, patch_size: 8, hidden_dropout_prob: 0.1}",
    # what each process draws by itself cannot equal one process
    "vit without dropout": "{model_type: vit, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 4, "
    "intermediate_size: 32, patch_size: 8}",
}
COMMON = [
    "training.batch_size=32",
    f"training.max_steps={STEPS}",
    "training.save_steps=2",
    "training.logging_steps=1",
    "training.use_cpu=true",
    "training.disable_tqdm=true",
    "training.monitor_steps=3",
]


FORKED_RUNS = "import sys, forked_runs; sys.exit(forked_runs.main(forked_runs.Path(sys.argv[1])))"


@pytest.fixture(scope="session")
def photos(made_once) -> Path:
    """128 of the digits as Parquet with several row groups, sorted by class."""

    def write(folder: Path) -> None:
        rows = open_source(DataConfig(path="digits"), labels=True).dataset.select(range(128)).sort("label")
        for split in ("train", "test"):
            rows.to_parquet(folder / f"{split}-00000-of-00001.parquet", batch_size=16)

    return made_once("photos", write)


def job(method, folder, name, data, backbone, *, output=None, kill_at=None, overrides=()):
    output = output or folder / name
    streaming = str(data == "stream").lower()
    return {
        "recipe": f"smoke/{method}",
        "overrides": [
            *COMMON,
            f"backbone={BACKBONES[backbone]}",
            f"training.output_dir={output}",
            f"data.streaming={streaming}",
            "data.shuffle_window=24",
            "training.dataloader_num_workers=2",
            *overrides,
        ],
        "kill_at": kill_at,
        "weights": str(folder / f"{name}.pt"),
    }  # fmt: skip


@pytest.fixture
def run(forks: Forks, tmp_path: Path) -> Callable[[list], None]:
    """A function that trains groups of runs in real processes (see forked_runs.py)."""

    def run(groups: list) -> None:
        jobs = tmp_path / "jobs.json"
        jobs.write_text(json.dumps(groups))
        done = forks.run("hf_ssl", FORKED_RUNS, str(jobs), timeout=1200)
        assert done.returncode == 0, done.stderr[-4000:]

    return run


def result(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def three_runs(method, folder, photos, data, backbone, overrides=()):
    """An uninterrupted run, one that is killed, and the killed one's continuation."""
    name = f"{method}-{data}-{backbone}"
    path = [f"data.path={photos}", *overrides]
    whole = job(method, folder, name, data, backbone, overrides=path)
    killed = job(method, folder, f"{name}-cut", data, backbone, kill_at=KILLED_AT, overrides=path)
    resumed = {**killed, "kill_at": None}
    return [[whole], [killed], [resumed]]


def assert_same_run(folder, name) -> None:
    whole, resumed = result(folder, name), result(folder, f"{name}-cut")
    differing = [
        key for key, value in whole["weights"].items() if not torch.equal(value, resumed["weights"][key])
    ]
    assert differing == []
    assert whole["losses"] == resumed["losses"]


def model_class(method):
    return load_recipe(f"smoke/{method}").model_class


def allowed(method, data, backbone) -> bool:
    known = model_class(method).backbone_types
    return (known is None or backbone in known) and not (
        data == "stream" and model_class(method).needs_sample_index
    )


CASES = [case for case in product(METHODS, ("map", "stream"), ("resnet", "vit")) if allowed(*case)]
# Each way of reading once, and each kind of encoder.
SAMPLED = [("moco", "map", "resnet"), ("simclr", "stream", "vit")]


def plain_backbone(method) -> str:
    return "resnet" if allowed(method, "map", "resnet") else "vit without dropout"


@pytest.mark.parametrize(("method", "data", "backbone"), in_tiers(CASES, SAMPLED))
def test_a_killed_run_ends_as_if_it_had_not_been_killed(run, tmp_path, photos, method, data, backbone):
    run(three_runs(method, tmp_path, photos, data, backbone))
    assert_same_run(tmp_path, f"{method}-{data}-{backbone}")


# With memory banks, CMC also resumes its banks and the constants of its NCE loss. With Lab, its encoders do
# not fold into one.
MEMORY_BANKS = ["method.loss=nce", "method.negatives=64", "method.color_space=lab"]


@pytest.mark.slow
def test_a_killed_run_of_cmc_with_memory_banks_resumes(run, tmp_path, photos):
    run(three_runs("cmc", tmp_path, photos, "map", "resnet", MEMORY_BANKS))
    assert_same_run(tmp_path, "cmc-map-resnet")
    assert result(tmp_path, "cmc-map-resnet")["weights"]["constants.values"].min() > 0


# Further image columns of the data: two of the four views of CMC are columns.
COLUMNS = ["data.further_image_columns={depth: gray, parts: classes}", "method.channel_groups=[1,2]"]


@pytest.fixture(scope="session")
def photos_with_columns(made_once) -> Path:
    """128 of the digits with two further columns, which hold other digits."""

    def write(folder: Path) -> None:
        rows = open_source(DataConfig(path="digits"), labels=True).dataset.select(range(256))
        images = rows["image"][:]
        columns = {"image": images[:128], "depth": images[128:], "parts": images[64:192]}
        features = datasets.Features({name: Image() for name in columns} | {"label": rows.features["label"]})
        table = Dataset.from_dict(columns | {"label": rows["label"][:128]}, features=features)
        for split in ("train", "test"):
            table.to_parquet(folder / f"{split}-00000-of-00001.parquet", batch_size=16)

    return made_once("photos_with_columns", write)


@pytest.mark.slow
@pytest.mark.parametrize("data", in_tiers([("map",), ("stream",)], [("stream",)]))
def test_a_killed_run_of_cmc_with_further_columns_resumes(run, tmp_path, photos_with_columns, data):
    run(three_runs("cmc", tmp_path, photos_with_columns, data, "resnet", COLUMNS))
    assert_same_run(tmp_path, f"cmc-{data}-resnet")
    assert any("column_backbones.1" in name for name in result(tmp_path, f"cmc-{data}-resnet")["weights"])


# Plain SGD: AdamW makes steps of full size of what rounding leaves where a gradient is zero in truth, as that
# of a bias before BatchNorm.
WITHOUT_EXTRAS = [
    "training.monitor_steps=0", "training.dataloader_num_workers=0", "training.optimizer=sgd",
    "training.learning_rate=0.01",
]  # fmt: skip
PER_PROCESS = [
    *WITHOUT_EXTRAS, "training.sync_batch_norm=false", "training.max_steps=1", "training.weight_decay=0.0",
    "training.clip_each_tensor=0",
]  # fmt: skip
# Settings against statistics of half a batch. One process that computes both halves does not use them.
# PIRL's first NCE constant is a mean over processes.
WITHOUT_EXCHANGE = {"moco": ["method.shuffle_batch_norm=false"], "pirl": ["method.loss=pycontrast"]}
# They replace that of the smoke recipe. A larger one makes differences visible if the loss hardly depends on
# them yet (I-JEPA's contexts). A smaller one is for a loss that amplifies rounding with each step.
LEARNING_RATES = {"ijepa": ["training.learning_rate=3.0"], "pirl": ["training.learning_rate=1e-3"]}
# BatchNorm uses the statistics of a chunk. So runs are equal only if a chunk holds the whole batch.
ONE_CHUNK = ["training.contrastive_chunk_size=16"]


def two_ranks(method, folder, name, overrides):
    output, backbone = folder / f"{method}-{name}", plain_backbone(method)
    return [
        job(method, folder, f"{method}-{name}-{rank}", "map", backbone, output=output, overrides=overrides)
        for rank in range(2)
    ]


def batches_of(recipe, seed):
    return train_loader(open_source(recipe.data), recipe.views, config=recipe.data, seed=seed, batch_size=32)


def after_one_step_of_two_halves(settings):
    """Parameters after a step of plain SGD whose halves of the batch go through the network one by one."""
    recipe = load_recipe(settings["recipe"], settings["overrides"])
    model = build_model(recipe, seed=0).train()
    if model.needs_memory_warmup:
        for batch in batches_of(recipe, seed=SEED_OFFSET):
            halves = [model.embed(part.inputs("cpu", model.sample_masks)) for part in batch.split(16)]
            model.update_memory({name: torch.cat([half[name] for half in halves]) for name in halves[0]})
        model.before_epoch(RunProgress(step=0, total_steps=1, steps_per_epoch=4))
    model.before_step(RunProgress(step=0, total_steps=1, steps_per_epoch=4))
    # drawn for the whole batch, because processes agree on what I-JEPA's images have in common
    batch = next(iter(batches_of(recipe, seed=0))).inputs("cpu", model.sample_masks)
    parts = ({name: value[start : start + 16] for name, value in batch.items()} for start in (0, 16))
    halves = [model.embed(part) for part in parts]
    if model.couples_samples:
        model.objective(
            {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        ).loss.backward()
    else:
        (sum(model.objective(half).loss for half in halves) / 2).backward()
    rates = {
        name: 0.0 if how.frozen_until else 0.01 * how.learning_rate_scale
        for name, how in assign_parameter_groups(model, model.parameter_rules).items()
    }
    return {n: (p - rates[n] * p.grad).detach() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", in_tiers([(method,) for method in METHODS], [("simclr",)]))
def test_two_processes_equal_one(run, tmp_path, photos, method):
    """With BatchNorm statistics over both, two gloo processes learn what one process with the whole batch
    learns; with statistics of their own, what one process learns that sees the batch in halves.
    """
    couples, backbone = model_class(method).couples_samples, plain_backbone(method)
    shared = [f"data.path={photos}", *WITHOUT_EXTRAS, *LEARNING_RATES.get(method, [])]
    own = [f"data.path={photos}", *PER_PROCESS, *WITHOUT_EXCHANGE.get(method, [])]
    groups = [
        [job(method, tmp_path, f"{method}-one", "map", backbone, overrides=shared)],
        two_ranks(method, tmp_path, "two", shared),
        two_ranks(method, tmp_path, "apart", own),
    ]
    if couples:
        chunks = [*shared, *ONE_CHUNK]
        groups.append(two_ranks(method, tmp_path, "cached", chunks))
    run(groups)
    one, first, second = (result(tmp_path, f"{method}-{name}") for name in ("one", "two-0", "two-1"))
    cached = result(tmp_path, f"{method}-cached-1") if couples else first
    for key, value in one["weights"].items():
        torch.testing.assert_close(first["weights"][key], value, rtol=2e-3, atol=2e-5, msg=named(key))
        assert torch.equal(first["weights"][key], second["weights"][key]), key
        torch.testing.assert_close(cached["weights"][key], value, rtol=2e-3, atol=2e-5, msg=named(key))
    for step, loss in one["losses"].items():
        assert first["losses"][step] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    apart = result(tmp_path, f"{method}-apart-0")["weights"]
    halves = job(method, tmp_path, "halves", "map", backbone, overrides=own)
    for key, value in after_one_step_of_two_halves(halves).items():
        torch.testing.assert_close(apart[key], value, rtol=1e-4, atol=1e-6, msg=named(key))


@pytest.mark.slow
def test_two_processes_of_cmc_with_memory_banks_equal_one(run, tmp_path, photos):
    shared = [f"data.path={photos}", *WITHOUT_EXTRAS, *MEMORY_BANKS]
    one = job("cmc", tmp_path, "one", "map", "resnet", overrides=shared)
    run([[one], two_ranks("cmc", tmp_path, "two", shared)])
    whole, *ranks = (result(tmp_path, name) for name in ("one", "cmc-two-0", "cmc-two-1"))
    for key, value in whole["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][key], value, rtol=2e-3, atol=2e-5, msg=named(key))
        assert torch.equal(ranks[0]["weights"][key], ranks[1]["weights"][key]), key


@pytest.mark.slow
def test_two_processes_of_cmc_with_further_columns_equal_one(run, tmp_path, photos_with_columns):
    slow = "training.learning_rate=1e-3"  # 0.01 amplifies rounding in the view of class colors
    shared = [f"data.path={photos_with_columns}", *WITHOUT_EXTRAS, *COLUMNS, slow]
    one = job("cmc", tmp_path, "one", "map", "resnet", overrides=shared)
    run([[one], two_ranks("cmc", tmp_path, "two", shared)])
    whole, *ranks = (result(tmp_path, name) for name in ("one", "cmc-two-0", "cmc-two-1"))
    for key, value in whole["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][key], value, rtol=2e-3, atol=2e-5, msg=named(key))
        assert torch.equal(ranks[0]["weights"][key], ranks[1]["weights"][key]), key


def named(key):
    return lambda message: f"{key}: {message}"


def test_the_fixture_holds_several_row_groups(photos):
    """Otherwise the stream has nothing to mix."""
    stream = datasets.load_dataset(
        "parquet", data_files=str(photos / "train-*.parquet"), streaming=True, split="train"
    )
    assert isinstance(stream.features["image"], Image)
    assert stream.reshard().num_shards >= 4
    assert not isinstance(stream, Dataset)
