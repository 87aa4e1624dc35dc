# SPDX-License-Identifier: Apache-2.0
"""Suites of data sets: jobs, resumption, averages with missing data sets, and two processes."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from messages import mentions, missing
from transformers import BitImageProcessor, ResNetConfig, ResNetModel

from hf_ssl import suites
from hf_ssl.cards import read_facts, write_card, write_facts
from hf_ssl.cards.result_files import EVALUATED
from hf_ssl.cards.suite_text import Measured, Summary, csv_text, markdown, metric_value, summarize, table
from hf_ssl.cli import main
from hf_ssl.comparing import compare_runs
from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, evaluate_encoder
from hf_ssl.evaluation.protocols import has_checkpoints
from hf_ssl.hub.publish import run_files
from hf_ssl.resources import suite_files
from hf_ssl.suite_file import Job, Suite, load_suite
from hf_ssl.suites import list_jobs, run_suite

SUITE = """
suite:
  title: Three sets
  root: ???
data: {cache: none}
evaluation: {precision: float32, cache: false}
groups:
  frozen:
    protocols: [knn, ridge]
    settings: {knn: {neighbors: [3], temperatures: [0.07]}}
  fine_tuned:
    protocols: [fine_tune]
    settings: {fine_tune: {epochs: 1, learning_rates: [0.05]}}
entries:
  color: {data: {path: color}}
  gray: {metric: mean_per_class, data: {path: gray}}
  other: {data: {path: other}}
"""


def write_set(folder: Path, seed: int = 0, gray: bool = False) -> None:
    """Write noise with a brightness for each of three classes, of different sizes, as Parquet."""
    generator = np.random.default_rng(seed)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    for split, rows in (("train", 40), ("test", 25)):
        labels = [row % 3 if row < 20 else 0 for row in range(rows)]
        noise = generator.integers(0, 150, (rows, 16, 16, *(() if gray else (3,))))
        pixels = (noise + 40 * np.array(labels).reshape(-1, *[1] * (noise.ndim - 1))).astype(np.uint8)
        images = [PIL.Image.fromarray(each) for each in pixels]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def write_encoder(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "embedding_size": 8,
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(folder)
    size: dict[str, Any] = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    BitImageProcessor(**size).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(made_once) -> Path:
    """The encoders `encoder` and `changed`, and the data sets `color` and `gray`; `other` is missing."""

    def make(root: Path) -> None:
        write_encoder(root / "encoder")
        write_encoder(root / "changed", seed=1)
        write_set(root / "color")
        write_set(root / "gray", seed=1, gray=True)
        (root / "three.yaml").write_text(SUITE)

    return made_once("suites", make)


def three(place: Path, *overrides: str, root: Path | None = None) -> Suite:
    return load_suite(str(place / "three.yaml"), overrides, str(root or place))


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the plot, except in `finished`, because it takes longer than the rest."""
    monkeypatch.setattr(suites, "draw", lambda summary, path: path.write_bytes(b""))


def columns(merged: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {column["protocol"]: column for column in merged["columns"]}


def measured_jobs(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> list[str]:
    """Record the jobs that are measured; the job number `stop_at` is interrupted."""
    seen: list[str] = []

    def measure(*arguments: Any, **options: Any) -> Any:
        if len(seen) + 1 == stop_at:
            raise KeyboardInterrupt
        seen.append(options["description"])
        return evaluate_encoder(*arguments, **options)

    monkeypatch.setattr(suites, "evaluate_encoder", measure)
    return seen


@pytest.fixture(scope="module")
def finished(place: Path, made_once) -> Path:
    """The output folder of the suite."""
    return made_once("suite", lambda folder: run_suite(str(place / "encoder"), three(place), folder))


def test_the_table_names_a_missing_data_set(place: Path, finished: Path) -> None:
    merged = json.loads((finished / "results.json").read_text())
    found = columns(merged)
    assert list(found) == ["knn", "ridge", "fine_tune"]
    for protocol, group in (("knn", "frozen"), ("ridge", "frozen"), ("fine_tune", "fine_tuned")):
        values = []
        for entry, metric in (("color", "value"), ("gray", "mean_per_class")):
            (result,) = [
                each
                for each in json.loads((finished / entry / f"{group}.json").read_text())["result"][
                    "protocols"
                ]
                if each["protocol"] == protocol
            ]
            values.append(result["value"] if metric == "value" else result["metrics"][metric])
            assert found[protocol]["entries"][entry]["value"] == values[-1]
        assert found[protocol]["average"] == pytest.approx(sum(values) / 2)
        assert (found[protocol]["data_sets"], found[protocol]["of"]) == (2, 3)
        assert "other" in found[protocol]["missing"]["other"]
    text = (finished / "suite.md").read_text()
    assert "average over 2 of 3 data sets; missing: other.\n" in text
    assert text.count("- other: data.path: expected") == 1, "not once for each column"
    for file in finished.rglob("*.json"):  # they can be published
        assert str(place) not in file.read_text()
    assert "| gray | mean per class |" in text and (finished / "suite.png").stat().st_size > 10_000
    rows = list(csv.DictReader((finished / "suite.csv").open()))
    errors = {(row["data_set"], row["protocol"]): row["standard_error"] for row in rows}
    (number,) = json.loads((finished / "color" / "frozen.json").read_text())["result"]["protocols"][:1]
    assert errors["color", number["protocol"]] == f"{number['standard_error']:.6f}"
    assert errors["average", number["protocol"]] == ""
    assert len(rows) == 3 * 4 and rows[3]["data_set"] == "average" and rows[3]["missing"] == "other"
    assert [path.name for path in sorted((finished / "color").iterdir())] == [
        "fine_tuned.json",
        "frozen.json",
    ]


def test_the_comparison_has_a_row_for_the_encoder_and_a_column_for_each_number(finished: Path) -> None:
    comparison = compare_runs([str(finished)], None)
    (row,) = comparison.rows
    found = {(column.data[0], column.key): cell.values for column, cell in row.cells.items()}
    stored = {}
    for entry in ("color", "gray"):
        for group in ("frozen", "fine_tuned"):
            record = json.loads((finished / entry / f"{group}.json").read_text())
            stored |= {(entry, each["key"]): [each["value"]] for each in record["result"]["protocols"]}
    assert row.label == "encoder" and len(stored) == 6 and found == stored
    assert len({column.heading for column in comparison.columns}) == 6


def test_the_numbers_are_those_of_a_single_evaluation(place: Path, finished: Path) -> None:
    config = {
        "protocols": ["knn", "ridge"], "precision": "float32", "cache": False,
        "settings": {"knn": {"neighbors": [3], "temperatures": [0.07]}},
    }  # fmt: skip
    folder = str(place / "gray")
    alone = evaluate_encoder(
        str(place / "encoder"), datasets.load_dataset(folder, split="train"),
        datasets.load_dataset(folder, split="test"), config, data=DataConfig(cache="none"), device="cpu",
    )  # fmt: skip
    record = json.loads((finished / "gray" / "frozen.json").read_text())
    assert record["result"]["protocols"] == json.loads(json.dumps(alone["protocols"]))


def test_a_second_call_measures_only_what_is_missing(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, root = tmp_path / "out", tmp_path / "data"
    shutil.copytree(finished, output)
    for name in ("color", "gray"):
        shutil.copytree(place / name, root / name)
    write_set(root / "other", seed=2)
    seen, encoder = measured_jobs(monkeypatch), str(place / "encoder")
    record = json.loads((output / "color" / "frozen.json").read_text())
    described = record.pop(EVALUATED)  # as an earlier version stored it
    (output / "color" / "frozen.json").write_text(json.dumps(record))
    suite = three(place, "entries.other.groups=[frozen]", "entries.gray.groups=[frozen]", root=root)
    merged = run_suite(encoder, suite, output)
    assert seen == ["other, frozen"]  # although the folder of the data changed
    assert [column["missing"] for column in merged["columns"]] == [{}, {}, {}]
    assert [column["outside"] for column in merged["columns"]] == [[], [], ["gray", "other"]]
    text = (output / "suite.md").read_text()
    assert "average over all 3 data sets" in text
    assert "average over 1 of 3 data sets; not in the group fine_tuned: gray, other" in text
    again = json.loads((output / "color" / "frozen.json").read_text())[EVALUATED]
    assert again["weights"] == described["weights"]
    seen.clear()
    shutil.rmtree(root / "gray")  # what was measured before is kept
    assert run_suite(encoder, suite, output) == merged and seen == []
    write_set(root / "gray", seed=3, gray=True)
    run_suite(encoder, suite, output)
    assert seen == ["gray, frozen"]


def test_a_protocol_that_was_skipped_is_measured_by_a_later_call(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, its package was missing, or the disk was full."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    suite, encoder = three(place), str(place / "encoder")
    file = tmp_path / "color" / "frozen.json"
    whole = json.loads(file.read_text())
    partial = json.loads(file.read_text())
    knn, ridge = partial["result"]["protocols"]
    partial["result"] |= {"protocols": [ridge], "skipped": ["k-NN: the disk is full", "another text"]}
    file.write_text(json.dumps(partial))
    assert [line.split()[3] for line in list_jobs(suite, tmp_path)][:2] == ["partial", "finished"]
    used: list[Any] = []
    measure = suites.evaluate_encoder

    def spy(encoder: Any, train: Any, test: Any, config: Any, *arguments: Any, **options: Any) -> Any:
        used.append((config.protocols, config.precision))
        return measure(encoder, train, test, config, *arguments, **options)

    monkeypatch.setattr(suites, "evaluate_encoder", spy)
    run_suite(encoder, suite, tmp_path)
    assert used == [(["knn"], "float32")]
    again = json.loads(file.read_text())
    assert again["result"]["protocols"] == [knn, ridge]
    assert again["result"]["skipped"] == ["another text"]
    assert again[EVALUATED]["weights"] == whole[EVALUATED]["weights"]
    assert (tmp_path / "suite.md").read_text() == (finished / "suite.md").read_text()


def test_jobs_that_run_separately_give_the_same_table(
    place: Path,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite, encoder = three(place), str(place / "encoder")
    assert [job.name for job in suite.jobs[:3]] == ["color, frozen", "color, fine_tuned", "gray, frozen"]
    shutil.copytree(finished / "gray", tmp_path / "gray")  # jobs 3 and 4, on another machine
    for number in (2, 1):
        assert run_suite(encoder, suite, tmp_path, number)["result"] is not None
    with pytest.raises(UserError, match=mentions("job 5", "other, frozen", "data.path")):
        run_suite(encoder, suite, tmp_path, 5)
    assert not (tmp_path / "results.json").exists()
    states = [line.split()[3] for line in list_jobs(suite, tmp_path)]
    assert states == ["finished"] * 4 + ["failed", "to"]
    seen = measured_jobs(monkeypatch)
    arguments = ["evaluate", encoder, "--suite", str(place / "three.yaml"), "--root", str(place)]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert seen == [] and "| **average** |" in capsys.readouterr().out
    own, other = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path, finished))
    assert own == other
    assert main([*arguments, "--list-jobs", "--protocols", "all"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "1",
        "color",
        "frozen",
        "to",
        "do",
        "knn,ridge",
    ]


def test_the_card_of_a_run_shows_the_suites_in_its_results(
    place: Path, finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def published(repo: str = "someone/digits") -> str:
        card = run_files(run, repo)["README.md"]
        return card.decode() if isinstance(card, bytes) else card.read_text()

    run = Path(shutil.copytree(finished_run, tmp_path / "digits"))
    card, suite = run / "README.md", three(place, "evaluation.protocols=[ridge]")
    before, output = card.read_text(), run / "results" / "three"
    merged = run_suite(str(run), suite, tmp_path / "elsewhere")
    assert card.read_text() == before and "other data sets" not in published()
    shutil.copytree(tmp_path / "elsewhere", output)
    assert "### Three sets" in published(), "results that were copied are published"
    run_suite(str(run), suite, output)
    shown = card.read_text()
    assert f"{card} shows these results" in capsys.readouterr().out
    value = merged["columns"][0]["entries"]["color"]
    parts = [f"{100 * value[key]:.1f}" for key in ("value", "standard_error")]
    assert f"| color | top-1 | {parts[0]} ± {parts[1]} |" in shown and "| gray | mean per class |" in shown
    assert shown.count("## Results on other data sets") == 1 and "- other: data.path" in shown
    assert published().count("### Three sets") == 1 and str(tmp_path) not in published()
    run_suite(str(place / "encoder"), suite, run / "results" / "foreign")
    write_card(run, read_facts(run))
    assert card.read_text() == shown, "results of another encoder are not shown"
    facts = read_facts(run)
    facts["training"]["resumed"] += 1  # the command was called again
    write_facts(run, facts | {"repo_id": "someone/digits", "name": "someone/digits"})
    write_card(run, read_facts(run))
    shutil.rmtree(output)
    assert "Three sets" in card.read_text() and "Three sets" not in published()
    card.write_text(before + "\nMore about it.\n")
    run_suite(str(run), suite, output)
    assert card.read_text() == published() == before + "\nMore about it.\n"
    assert "because it was edited" in capsys.readouterr().out


def test_an_interrupted_suite_continues(
    place: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ridge = "evaluation.protocols=[ridge]"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        measured_jobs(patch, stop_at=2)
        run_suite(str(place / "encoder"), three(place, ridge), tmp_path)
    assert [path.name for path in tmp_path.glob("*/*.json")] == ["frozen.json"]
    seen = measured_jobs(monkeypatch)
    merged = run_suite(str(place / "encoder"), three(place, ridge), tmp_path)
    assert seen == ["gray, frozen"]
    own, other = (
        columns(json.loads((folder / "results.json").read_text())) for folder in (tmp_path, finished)
    )
    assert own == {"ridge": other["ridge"]} == columns(merged)


def test_another_choice_of_the_images_is_measured_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = three(place, "evaluation.max_test_images=20")
    run_suite(str(place / "encoder"), suite, tmp_path, 1)
    seen = measured_jobs(monkeypatch)
    run_suite(str(place / "encoder"), suite, tmp_path, 1)
    assert seen == []
    monkeypatch.setattr("hf_ssl.data.labeled.LabeledImages.selection", "another")
    run_suite(str(place / "encoder"), suite, tmp_path, 1)
    assert seen == ["color, frozen"]


@pytest.mark.parametrize("change", [{"settings": None}, {"encoder": "x"}, {"result": {}}, {"images": 3}])
def test_an_edited_result_ends_in_one_sentence(
    change: dict[str, Any], place: Path, finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "color" / "frozen.json"
    file.parent.mkdir()
    record = json.loads((finished / "color" / "frozen.json").read_text())
    file.write_text(json.dumps(record | change))
    with pytest.raises(UserError, match=mentions("frozen.json", "delete the file")):
        run_suite(str(place / "encoder"), three(place), tmp_path)
    file.write_text(json.dumps({key: value for key, value in record.items() if key not in change}))
    with pytest.raises(UserError, match=mentions("frozen.json", "delete the file")):
        list_jobs(three(place), tmp_path)


@pytest.mark.parametrize(
    ("encoder", "override", "parts"),
    [
        ("changed", "evaluation.batch_size=7", ("--output", "another encoder", "color, frozen")),
        ("encoder", "evaluation.seed=1", ("evaluation.seed", 1, "color, frozen")),
        (
            "encoder",
            "evaluation.settings.knn.neighbors=[4]",
            ("evaluation.settings.knn.neighbors", "color, frozen"),
        ),
        ("encoder", "entries.gray.metric=top_1", ("metric", "mean_per_class", "gray, frozen")),
        (
            "encoder",
            "evaluation.settings.fine_tune.epochs=2",
            ("evaluation.settings.fine_tune.epochs", "color, fine_tuned"),
        ),
    ],
)
def test_results_of_other_encoders_and_settings_do_not_mix(
    place: Path, finished: Path, encoder: str, override: str, parts: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = measured_jobs(monkeypatch)
    before = (finished / "results.json").read_text()
    with pytest.raises(UserError, match=mentions(*parts)):
        run_suite(str(place / encoder), three(place, override), finished)
    assert seen == [] and (finished / "results.json").read_text() == before


def test_some_protocols_of_a_suite(place: Path) -> None:
    suite = three(place, "evaluation.protocols=[ridge]", "evaluation.max_test_images=10")
    assert [job.protocols for job in suite.jobs] == [{"ridge": "ridge"}] * 3
    assert {job.evaluation.max_test_images for job in suite.jobs} == {10}
    with pytest.raises(
        UserError, match=mentions("--protocols", "fine_tune", "mlp", "groups.frozen.protocols")
    ):
        three(place, "evaluation.protocols=[ridge,mlp]")
    suite = three(place, "groups.frozen.protocols=[mlp]", "evaluation.protocols=[mlp]")
    assert [job.protocols for job in suite.jobs] == [{"mlp": "mlp"}] * 3


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("metric: mean_per_class", "metric: mean_class", ("entries.gray.metric", "mean_per_class")),
        ("{path: gray}", "{pat: gray}", ("entries.gray", "data.pat", "data.path")),
        ("path: other}", "path: other}, groups: [frosen]", ("entries.other.groups", "frozen")),
        ("[knn, ridge]", "[knn, rigde]", ("entries.color", "ridge")),
        ("  color:", "  ../color:", ("entries", "../color")),
        ("title: Three sets", "titel: Three sets", ("suite.titel", "suite.title")),
        ("{path: color}", "{path: color}, instead: {rigde: knn}", ("entries.color.instead", "ridge")),
        ("{path: color}", "{path: color}, instead: {mlp: knn}", ("entries.color.instead", "mlp", "groups")),
        ("{path: color}", "{path: color}, groups: []", ("entries.color.groups", "null")),
        (
            "cache: false}",
            "cache: false, protocols: [mlp]}",
            ("evaluation.protocols", "groups.NAME.protocols"),
        ),
        (
            "{path: color}",
            "{path: color}, evaluation: {protocols: [mlp]}",
            ("entries.color.evaluation.protocols", "groups.NAME.protocols"),
        ),
        (
            "{path: color}",
            "{path: color}, evaluation: {path: a}",
            ("evaluation.path", "entries.color.data.path=a"),
        ),
        ("\n".join(SUITE.splitlines()[-3:]), "  a: {data: {path: a}, groups: []}", ("entries",)),
        ("groups:", "group:", ("group", "groups")),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, old: str, new: str, parts: tuple) -> None:
    assert old in SUITE
    (tmp_path / "bad.yaml").write_text(SUITE.replace(old, new))
    with pytest.raises(UserError, match=mentions(*parts)):
        load_suite(str(tmp_path / "bad.yaml"), root="data")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--suite", "transfer_smal", "--output", "out"], ("--suite", "transfer_small")),
        (["--suite", "transfer_small", "--output", "out"], ("--root",)),
        (["--suite", "transfer_small"], ("--output",)),
        (["--job", "1"], ("--job", "--suite")),
        (["--list-jobs"], ("--list-jobs", "--suite")),
        (
            ["--suite", "transfer_small", "--root", "data", "--output", "out", "--job", "13"],
            ("--job", 12, 13),
        ),
    ],
)
def test_mistakes_in_the_command(
    options: list[str],
    parts: tuple,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "encoder", *options]) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert missing(sentence, *parts) == [] and not (tmp_path / "out").exists()


def test_help_lists_the_suites(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert [name for name in suite_files() if name not in text] == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.path=elsewhere", ("data.path", "entries.color.data.path=elsewhere")),
        ("evaluation.path=elsewhere", ("evaluation.path", "entries.color.data.path=elsewhere")),
        ("evaluation.settings.mlp.epochs=3", ("evaluation.settings.mlp", "ridge")),
    ],
)
def test_overrides_without_a_meaning_for_all_data_sets(tmp_path: Path, override: str, parts: tuple) -> None:
    (tmp_path / "three.yaml").write_text(SUITE)
    with pytest.raises(UserError, match=mentions(*parts)):
        load_suite(str(tmp_path / "three.yaml"), [override], root="data")


def test_transfer_ericsson_has_the_sets_and_metrics_of_the_paper() -> None:
    """The table of the authors' code, `LINEAR_DATASETS` in linear.py, and ImageNet."""
    suite = load_suite("transfer_ericsson")
    metrics = {job.entry: job.metric for job in suite.jobs}
    assert len(metrics) == 12 and len(suite.jobs) == 23
    per_class = {name for name, metric in metrics.items() if metric == "mean_per_class"}
    assert per_class == {"aircraft", "caltech101", "flowers", "pets"}
    assert metrics["voc2007"] == "mean_average_precision"
    images = {
        "aircraft": 6667, "caltech101": 3060, "cars": 8144, "cifar10": 50_000, "cifar100": 50_000,
        "dtd": 3760, "flowers": 2040, "food": 75_750, "pets": 3680, "sun397": 19_850,
    }  # fmt: skip
    for job in suite.jobs:
        if job.group == "fine_tuned" and job.entry != "voc2007":
            settings = job.evaluation.of_protocol("fine_tune")
            steps = settings.epochs * -(-images[job.entry] // settings.batch_size)
            assert 4600 < steps < 5400, job.entry


def test_transfer_small_reads_below_the_root(tmp_path: Path) -> None:
    suite = load_suite("transfer_small", root=str(tmp_path))
    assert {job.data.path for job in suite.jobs} == {
        str(tmp_path / name)
        for name in ("cifar10", "flowers5", "dtd10", "gtsrb", "fashion_mnist", "chest_xray")
    }
    assert all(job.settings["data.path"] == job.entry for job in suite.jobs)
    tuned = {
        job.entry: job.evaluation.settings["fine_tune"] for job in suite.jobs if job.group == "fine_tuned"
    }
    assert tuned["gtsrb"]["flip"] == 0.0 and tuned["gtsrb"]["epochs"] == tuned["cifar10"]["epochs"]
    assert "flip" not in tuned["cifar10"]


def number(protocol: str, value: float, **metrics: float) -> dict[str, Any]:
    key = "mean_average_precision" if protocol == "multi_label" else protocol
    return {
        "protocol": protocol, "id": f"{protocol}-1", "key": key, "column": f"by {protocol}", "value": value,
        "standard_error": 0.02, "metrics": metrics, "details": {},
    }  # fmt: skip


def test_a_top_1_is_an_accuracy() -> None:
    accuracy, several = number("knn", 0.5), number("multi_label", 0.6)
    assert [metric_value(each, "top_1") for each in (accuracy, several)] == [0.5, None]


@pytest.mark.parametrize(
    ("protocol", "metric"),
    [
        ("retrieval", "mean_average_precision"),
        ("segmentation", "mean_iou"),
        ("detection", "average_precision"),
    ],
)
def test_protocols_without_classes_show_their_own_metric(protocol: str, metric: str) -> None:
    result: Any = {"protocols": [number(protocol, 0.6) | {"metric": metric}], "skipped": [], "quality": {}}
    protocols = {protocol: protocol, "quality": "quality"}
    summary = summarize("A", "b", [Measured("one", "all", "top_1", protocols, result, None)])
    (column,) = summary.columns
    assert column.values == [0.6] and column.cells["one"].standard_error == 0.02
    assert f"- by {protocol}: the metric of this protocol" in markdown(summary)


@pytest.mark.parametrize("protocol", ["fine_tune", "detection"])
def test_an_interrupted_training_of_a_job_has_a_folder(protocol: str, tmp_path: Path) -> None:
    assert has_checkpoints(protocol) and not has_checkpoints("linear")

    def changed(**settings: Any) -> Any:
        config = EvaluationConfig(protocols=[protocol], settings={protocol: settings})
        job = Job("a", "b", "top_1", {protocol: protocol}, DataConfig(path="x"), config, {})
        return suites._with_checkpoints(job, tmp_path).settings[protocol]

    assert changed(epochs=1) == {"epochs": 1, "folder": str(tmp_path / "a" / "_checkpoints_b")}
    assert changed(folder="mine") == {"folder": "mine"}


def test_checkpoints_stay_until_the_result_is_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends between both, or a full disk, loses no training."""
    suite, encoder = three(place), str(place / "encoder")
    monkeypatch.setattr(suites, "write_json", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_suite(encoder, suite, tmp_path, 2)
    checkpoints = tmp_path / "color" / "_checkpoints_fine_tuned"
    assert list(checkpoints.glob("*/checkpoint-*"))
    monkeypatch.undo()
    run_suite(encoder, suite, tmp_path, 2)
    assert not checkpoints.exists() and (tmp_path / "color" / "fine_tuned.json").exists()


def test_checkpoints_of_a_job_that_fails_stay(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, the disk is full. A later call continues the training."""

    def fail(*arguments: Any, **options: Any) -> Any:
        (tmp_path / "color" / "_checkpoints_fine_tuned" / "checkpoint-1").mkdir(parents=True)
        raise UserError("cannot write checkpoints")

    monkeypatch.setattr(suites, "evaluate_encoder", fail)
    with pytest.raises(UserError, match="cannot write checkpoints"):
        run_suite(str(place / "encoder"), three(place), tmp_path, 2)
    assert (tmp_path / "color" / "_checkpoints_fine_tuned" / "checkpoint-1").exists()


def test_a_summary_of_different_protocols_and_metrics() -> None:
    def job(
        entry: str, metric: str, run: str, *numbers: dict[str, Any], skipped: tuple[str, ...] = ()
    ) -> Measured:
        result: Any = {"protocols": list(numbers), "skipped": list(skipped)}
        return Measured(entry, "frozen", metric, {"knn": "knn", "linear": run}, result, None)

    failed = Measured("gone", "frozen", "top_1", {"knn": "knn", "linear": "linear"}, None, "no such folder")
    summary = summarize(
        "Title",
        "encoder",
        [
            job("a", "top_1", "linear", number("knn", 0.5), number("linear", 0.6)),
            job("b", "mean_per_class", "linear", number("knn", 0.9, mean_per_class=0.1), number("linear", 1)),
            job("voc", "mean_average_precision", "multi_label", number("multi_label", 0.2),
                skipped=("k-NN: it needs images with one label(s)",)),
            failed,
        ],
    )  # fmt: skip
    knn, linear = summary.columns
    assert (knn.heading, knn.average) == ("by knn", pytest.approx(0.3))
    assert knn.missing == {"voc": "it needs images with one label(s)", "gone": "no such folder"}
    assert (linear.heading, linear.average) == ("by linear", pytest.approx(0.4))
    assert linear.missing == {"b": "linear probe does not measure mean_per_class", "gone": "no such folder"}
    text = markdown(summary)
    assert "| voc | mAP, 11 points | - | 20.0 ± 2.0 |" in text and "| 30.0 (2 of 4) | 40.0 (2 of 4) |" in text
    assert "| b | mean per class | 10.0 | - |" in text, "the standard error is that of the accuracy"
    assert "voc: multi-label probe instead of linear probe" in text
    assert csv_text(summary).splitlines()[-1].endswith("0.400000,,b gone")
    stored = json.loads(json.dumps(summary.to_dict()))
    assert table(Summary.from_dict(stored)) == table(summary)
    for column in stored["columns"]:  # as an earlier version stored it
        for cell in column["entries"].values():
            del cell["standard_error"]
    assert "| voc | mAP, 11 points | - | 20.0 |" in table(Summary.from_dict(stored))


def test_the_table_names_jobs_with_another_precision() -> None:
    def job(entry: str, precision: str) -> Measured:
        result: Any = {"protocols": [number("knn", 0.5)], "precision": precision}
        return Measured(entry, "frozen", "top_1", {"knn": "knn"}, result, None)

    mixed = summarize("Title", "encoder", [job("a", "float32"), job("b", "bfloat16"), job("c", "float32")])
    assert mixed.to_dict()["precisions"] == {"float32": ["a/frozen", "c/frozen"], "bfloat16": ["b/frozen"]}
    last = markdown(mixed).splitlines()[-1]
    parts = ("float32 (a/frozen, c/frozen)", "bfloat16 (b/frozen)", "evaluation.precision=float32")
    assert missing(last, *parts) == []
    same = summarize("Title", "encoder", [job("a", "float32"), job("b", "float32")])
    assert "precision" not in markdown(same)


def test_numbers_with_other_labels_are_not_averaged() -> None:
    def job(entry: str, labels: dict[int, float | None]) -> Measured:
        few = [number("few_label_knn", value) | {"key": f"few_labels_{n}"} for n, value in labels.items()]
        result: Any = {"protocols": few, "skipped": []}
        return Measured(entry, "frozen", "top_1", {"few_label_knn": "few_label_knn"}, result, None)

    jobs = [job("a", {10: 0.9, 1: 0.1}), job("small", {1: 0.2}), job("nan", {10: None, 1: 0.3})]
    ten, one = summarize("Title", "encoder", jobs).columns
    assert (ten.values, one.values) == ([0.9], [0.1, 0.2, 0.3])
    assert "finite" in ten.missing["nan"] and "does not return" in ten.missing["small"]


def test_fine_tuning_with_other_fractions_is_not_averaged() -> None:
    """A key such as fine_tune_50 contains the number of images. `small` has too few images for 1 %."""

    def job(entry: str, **values: float) -> Measured:
        numbers = [
            number("fine_tune", value)
            | ({} if labeled == "all" else {"key": f"fine_tune_{value}", "details": {"labeled": labeled}})
            for labeled, value in values.items()
        ]
        result: Any = {"protocols": numbers, "skipped": []}
        return Measured(entry, "trained", "top_1", {"fine_tune": "fine_tune"}, result, None)

    large = {"fraction 0.01": 0.1, "fraction 0.1": 0.5, "all": 0.9}
    small = {"fraction 0.1": 0.3, "all": 0.7}
    few = {"2 per class": 0.2}
    columns = summarize("T", "e", [job("small", **small), job("large", **large), job("voc", all=0.8)]).columns
    assert [column.values for column in columns] == [[0.1], [0.3, 0.5], [0.7, 0.9, 0.8]]
    assert "does not return" in columns[0].missing["small"]
    columns = summarize("T", "e", [job("large", **large), job("few", **few)]).columns
    assert [column.values for column in columns] == [[0.1], [0.5], [0.9], [0.2]]


def test_a_data_set_on_the_hub(
    place: Path, online: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online.store.add_repo("datasets", "someone/color", place / "color")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", online.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    text = SUITE.replace("root: ???", "root: null").replace("color}", "someone/color}")
    (tmp_path / "hub.yaml").write_text(text.replace("path: other", "path: someone/nothing"))
    suite = load_suite(
        str(tmp_path / "hub.yaml"), ["evaluation.protocols=[ridge]", f"entries.gray.data.path={place}/gray"]
    )
    merged = run_suite(str(place / "encoder"), suite, tmp_path / "out")
    column = columns(merged)["ridge"]
    assert list(column["entries"]) == ["color", "gray"] and "someone/nothing" in column["missing"]["other"]
    record = json.loads((tmp_path / "out" / "color" / "frozen.json").read_text())
    assert record["images"]["train"] == [online.store.repos["datasets", "someone/color"].head.oid, 40]


TWO = """
import os, sys
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": sys.argv[2]}
from hf_ssl.cli import main
sys.exit(main(["evaluate", *sys.argv[3:]]))
"""


@pytest.mark.slow
def test_two_processes_give_the_table_of_one(place: Path, finished: Path, forks: Any, tmp_path: Path) -> None:
    port = str(28700 + os.getpid() % 2000)
    options = ["--suite", str(place / "three.yaml"), "--root", str(place), "--output", str(tmp_path)]
    for process in forks.together(
        "hf_ssl", TWO, [[rank, port, str(place / "encoder"), *options] for rank in "01"]
    ):
        assert process.returncode == 0, process.stderr[-2000:]
    for name in ("color", "gray"):
        for group in ("frozen", "fine_tuned"):
            own, other = (
                json.loads((folder / name / f"{group}.json").read_text())["result"]["protocols"]
                for folder in (tmp_path, finished)
            )
            assert own == other
    assert (tmp_path / "results.json").read_text() == (finished / "results.json").read_text()
