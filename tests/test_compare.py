# SPDX-License-Identifier: Apache-2.0
"""The comparison of all methods: its recipes load, and its table says what the runs recorded."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from example_facts import new_facts

from hf_ssl.methods import METHODS
from hf_ssl.recipe import load_recipe

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # last, so that an installed hf_ssl is the one that is tested

from training import compare  # noqa: E402


def test_every_method_that_trains_the_encoder_has_its_recipe(tmp_path):
    recipes = {method: compare.sections(method) for method in compare.PLAN["methods"]}
    for method in METHODS:
        known = load_recipe(f"smoke/{method}").model_class.backbone_types
        assert (method in recipes) == (known is None or "resnet" in known), method
    for method, sections in recipes.items():
        file = tmp_path / f"{method}.yaml"
        file.write_text(yaml.safe_dump(sections))
        recipe = load_recipe(file, ["data.path=digits"])
        assert recipe.method["name"] == method and recipe.training["max_steps"] == 240


def fake_run(folder: Path, method: str, seed: int, knn: float, **others: float) -> None:
    facts = new_facts()
    example = facts["results"]["trained"]

    def result(accuracy):
        values = {"knn": accuracy, "linear": accuracy + 0.1}
        numbers = [number for number in example["protocols"] if number["key"] in ("knn_20", "linear_probe")]
        return example | {"protocols": [each | {"value": values[each["protocol"]]} for each in numbers]}

    (folder / "checkpoint-10").mkdir(parents=True)
    (folder / "checkpoint-9").mkdir()  # an earlier one that was copied later
    history = [{"step": 5, "memory_gib": 1.5}, {"step": 10, "memory_gib": 2.5}]
    (folder / "checkpoint-10" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "checkpoint-9" / "trainer_state.json").write_text(json.dumps({"log_history": history[:1]}))
    facts["method"] |= {"name": method, "title": method.upper()}
    facts["recipe"]["overrides"] = ["data.path=/secret/place", f"training.seed={seed}"]
    facts["training"] |= {"seconds": 60.0 + seed, "steps": 10, "seed": seed}
    facts["monitor"]["history"] = [{"step": 0, "knn": 0.1}, {"step": 10, "knn": knn}]
    facts["results"] = {"trained": result(knn)} | {name: result(value) for name, value in others.items()}
    if "raw_pixels" in facts["results"]:
        del facts["results"]["raw_pixels"]["protocols"][1]  # the linear probe
    (folder / "facts.json").write_text(json.dumps(facts))


def test_the_table_holds_means_and_spreads_of_finished_runs(tmp_path):
    fake_run(tmp_path / "simclr-0", "simclr", 0, 0.5, untrained=0.2, raw_pixels=0.3)
    fake_run(tmp_path / "simclr-1", "simclr", 1, 0.6)
    fake_run(tmp_path / "byol-0", "byol", 0, 0.4)
    (tmp_path / "byol-1").mkdir()  # not finished
    compare.write_results(tmp_path / "out", tmp_path, ["simclr", "byol", "swav"], seeds=2)
    assert (tmp_path / "out.md").read_text().splitlines()[0].startswith("| method | 20-NN |")
    assert (tmp_path / "out.md").read_text().splitlines()[2:] == [
        "| SIMCLR | 0.550 ± 0.071 | 0.650 ± 0.071 | 60 | 2.5 | 2 |",
        "| BYOL | 0.400 | 0.500 | 60 | 2.5 | 1 |",
        "| untrained | 0.200 | 0.300 | | | 1 |",
        "| raw pixels | 0.300 |  | | | 1 |",
    ]
    assert (tmp_path / "out.png").stat().st_size > 10_000
    text = (tmp_path / "out.json").read_text()
    assert len(json.loads(text)) == 3 and "secret" not in text
    fake_run(tmp_path / "vicreg-0", "vicreg", 0, 0.7)
    facts = json.loads((tmp_path / "vicreg-0" / "facts.json").read_text())
    facts["results"]["trained"]["protocols"][0]["details"]["neighbors"] = 10
    (tmp_path / "vicreg-0" / "facts.json").write_text(json.dumps(facts))
    compare.write_results(tmp_path / "out", tmp_path, ["vicreg"], seeds=1)  # a later call
    records = json.loads((tmp_path / "out.json").read_text())
    assert [record["method"]["name"] for record in records] == ["simclr", "simclr", "byol", "vicreg"]
    assert (tmp_path / "out.md").read_text().startswith("| method | k-NN |")
    assert compare.knn_name(records[-1:]) == "10-NN"


@pytest.mark.parametrize("name", ["compare.md", "compare.json", "compare.png"])
def test_the_committed_record_is_whole(name):
    """Every method of the plan, three seeds, and the table in the README is the record's."""
    results = ROOT / "training" / "results"
    records = json.loads((results / "compare.json").read_text())
    seeds = {method: 0 for method in compare.PLAN["methods"]}
    for record in records:
        seeds[record["method"]["name"]] += 1
    missing = [method for method, count in seeds.items() if count != 3]
    assert not missing, (
        f"run python -m training.compare data.path=imagenette160 --methods {' '.join(missing)}, then "
        "python -m training.update_readmes"
    )
    assert (results / name).exists()
    assert (results / "compare.md").read_text().strip() in (ROOT / "training/README.md").read_text()
