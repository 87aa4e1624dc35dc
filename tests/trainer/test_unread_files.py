# SPDX-License-Identifier: Apache-2.0
"""A run reports which files it does not read, and other commands tolerate what its training tolerated."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from messages import mentions

from hf_ssl import run, suites
from hf_ssl.building import build_trainer, open_labeled_splits
from hf_ssl.cards.result_files import with_trained_reading
from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.recipe import load_recipe
from hf_ssl.space import build
from hf_ssl.suite_file import load_suite


@pytest.fixture
def photos(tmp_path):
    """A folder with the classes bus, car and train, of 4 images each."""
    generator = np.random.default_rng(0)
    for name in ("bus", "car", "train"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def trainer(photos, *overrides):
    settings = [f"data.path={photos}", f"training.output_dir={photos.parent}/run", "training.monitor_steps=0"]
    recipe = load_recipe("smoke/simclr", [*settings, "training.batch_size=2", *overrides])
    return build_trainer(recipe, recipe.training_arguments())


def test_a_run_stops_if_most_files_are_in_no_split(photos):
    with pytest.raises(UserError, match=mentions("data.split", 4, 8, "data.split=all", "data.split=train")):
        trainer(photos)
    assert trainer(photos, "data.split=train").source.num_rows == 4
    found = trainer(photos, "data.split=all").source
    assert found.num_rows == 12 and str(found.count).startswith("12 of 12 image files")


def test_a_run_prints_how_many_files_it_reads(photos, capsys, monkeypatch):
    recipe = load_recipe(
        "smoke/simclr",
        [
            f"data.path={photos}",
            f"training.output_dir={photos.parent}/run",
            "data.split=train",
            "training.batch_size=2",
            "training.monitor_steps=0",
        ],
    )

    def stop(recipe, trainer):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "draw_pictures", stop)
    with pytest.raises(KeyboardInterrupt):
        run.train(recipe)
    assert f"4 of 12 image files in {photos} are read; not read: 8" in capsys.readouterr().out


def test_a_space_stops_if_most_files_are_in_no_split(photos, finished_run, tmp_path):
    with pytest.raises(UserError, match=mentions("data.split", "data.split=all")):
        build.build_space(
            str(finished_run), tmp_path / "space", DataConfig(path=str(photos)), chosen_split=False
        )


@pytest.fixture
def tolerant_run(finished_run, tmp_path):
    folder = tmp_path / "tolerant"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "facts.json"):
        shutil.copy(finished_run / name, folder / name)
    facts = json.loads((folder / "facts.json").read_text())
    facts["recipe"]["sections"]["data"] |= {"max_broken_fraction": 0.25, "value_range": "auto"}
    facts["data"] |= {"value_range": [0.0, 4095.0], "found_values": [0.0, 4095.0]}
    (folder / "facts.json").write_text(json.dumps(facts))
    return str(folder)


def test_the_tolerance_and_the_values_of_the_training_are_used(tolerant_run, finished_run, tmp_path):
    data = DataConfig(path="digits")
    found = with_trained_reading(data, tolerant_run)
    assert (found.max_broken_fraction, found.value_range) == (0.25, [0.0, 4095.0])
    for model in ("someone/encoder", str(tmp_path), str(finished_run)):
        assert with_trained_reading(data, model) == data
    data = DataConfig(path="digits", max_broken_fraction=0.01, value_range="auto")  # the user set them
    assert with_trained_reading(data, tolerant_run) == data


class _Opened(Exception):
    pass


def test_commands_use_the_tolerance_and_the_values_of_the_training(tolerant_run, tmp_path, monkeypatch):
    def opened(data, *_):
        raise _Opened(f"{data.max_broken_fraction}, {data.value_range}")

    monkeypatch.setattr(run, "open_labeled_splits", opened)
    monkeypatch.setattr(suites, "open_labeled_splits", opened)
    monkeypatch.setattr(build, "_images", opened)
    monkeypatch.setattr("hf_ssl.plotted_images._open_images", opened)
    from hf_ssl.plotting import plot

    data, evaluation = DataConfig(path="digits"), EvaluationConfig()
    suite = load_suite("transfer_small", root=str(tmp_path))
    for command in (
        lambda: run.evaluate(tolerant_run, data, evaluation),
        lambda: suites.run_suite(tolerant_run, suite, tmp_path / "suite"),
        lambda: build.build_space(tolerant_run, tmp_path / "space", data),
        lambda: plot([tolerant_run], data, evaluation, tmp_path / "plots"),
    ):
        with pytest.raises(_Opened, match=mentions(0.25, "[0.0, 4095.0]")):
            command()


def test_plots_read_the_images_of_each_encoder_as_in_its_training(tolerant_run, finished_run, tmp_path):
    from hf_ssl.plotting import open_scene

    pixels = np.random.default_rng(0).integers(0, 4096, (16, 12, 12), dtype=np.uint16)
    for number, image in enumerate(pixels):
        path = tmp_path / "data" / ("train", "test")[number % 2] / str(number // 8) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)
    data, evaluation = DataConfig(path=str(tmp_path / "data"), channels=1), EvaluationConfig(cache=False)

    def features(**models):
        scene = open_scene(models, data, evaluation, "encoder", 10)
        return {name: torch.cat(list(found)) for name, found in scene.features.items()}

    plain, trained = str(finished_run), tolerant_run  # with equal weights
    both = features(plain=plain, trained=trained)
    assert torch.equal(both["plain"], features(plain=plain)["plain"])
    assert torch.equal(both["trained"], features(trained=trained)["trained"])
    assert (both["plain"] - both["trained"]).abs().max() > 0.01


def test_the_image_column_of_the_evaluation(tmp_path, photos):
    """Images as bytes, and names of files, in data sets that only the evaluation reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = [str(photos / name / f"{number}.png") for name in ("bus", "car") for number in range(4)]
    images = [(photos / file).read_bytes() for file in files]
    (tmp_path / "tables").mkdir()
    for split in ("train", "test"):
        table = pa.table({"raw": images, "small": images, "file": files, "label": [0] * 4 + [1] * 4})
        pq.write_table(table, tmp_path / "tables" / f"{split}.parquet")
    data, path = DataConfig(path=str(photos), split="train"), str(tmp_path / "tables")
    for column in ("raw", "file"):
        train, test = open_labeled_splits(data, EvaluationConfig(path=path, image_column=column))
        assert len(train) == len(test) == 8 and train.class_names == ["0", "1"]
        assert next(iter(train.read(np.arange(1)))).shape == (3, 12, 12)
    with pytest.raises(UserError, match=mentions("evaluation.image_column", "evaluation.image_column=raw")):
        open_labeled_splits(data, EvaluationConfig(path=path))
