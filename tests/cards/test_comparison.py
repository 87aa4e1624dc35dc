# SPDX-License-Identifier: Apache-2.0
"""`hf-ssl compare`: rows, columns, texts, files, and runs from files, folders and the Hub."""

import copy
import csv
import io
import json
import statistics
from pathlib import Path

import PIL.Image
import pytest
from example_facts import measured, new_facts
from hub_server import HubServer
from huggingface_hub import HfApi
from messages import mentions, missing

from hf_ssl.cards.comparison import compare
from hf_ssl.cards.comparison_text import csv_text, latex, latex_escaped, markdown
from hf_ssl.cards.facts_files import append_result, result_entry, write_facts
from hf_ssl.cards.short_texts import distinguished, joined
from hf_ssl.cli import main
from hf_ssl.comparing import entries_of
from hf_ssl.errors import UserError
from hf_ssl.evaluation.bootstrap import paired_bootstrap, unpack_right


def facts_of(method: str = "simclr", seed: int = 0, signal: float = 2.0, **training) -> dict:
    facts = new_facts()
    facts["method"]["name"] = method
    facts["training"] |= {"seed": seed} | training
    # The labels are those of the other runs, so the predictions are for the same images.
    facts["results"]["trained"] = measured(seed, signal)
    facts["recipe"]["overrides"] = [f"training.seed={seed}", "data.path=cifar10"]
    return facts


def entry(*arguments, **others) -> dict:
    return result_entry(facts_of(*arguments, **others))


@pytest.fixture(scope="module")
def six() -> list[dict]:
    return [entry("simclr", seed, 2.0) for seed in range(3)] + [entry("byol", seed, 0.7) for seed in range(3)]


def test_a_row_contains_the_runs_that_differ_only_in_the_seed(six) -> None:
    comparison = compare(six)
    assert [(row.label, row.seeds) for row in comparison.rows] == [("SimCLR", [0, 1, 2]), ("BYOL", [0, 1, 2])]
    assert [column.key for column in comparison.columns] == [
        number["key"] for number in six[0]["results"]["trained"]["protocols"]
    ]
    for column in comparison.columns:
        for row, runs in zip(comparison.rows, (six[:3], six[3:]), strict=True):
            numbers = [run["results"]["trained"]["protocols"] for run in runs]
            values = [each["value"] for run in numbers for each in run if each["key"] == column.key]
            assert row.cells[column].values == values
            assert row.cells[column].mean == statistics.mean(values)
            assert row.cells[column].deviation == statistics.stdev(values)
    assert len(compare([*six, *copy.deepcopy(six)]).rows[0].seeds) == 3, "equal entries count once"


def test_runs_of_a_changed_recipe_file_are_separate_rows() -> None:
    """The name of the recipe and the overrides are equal, but the file was edited between the runs."""
    runs = [facts_of(seed=seed) for seed in (0, 1, 2, 0)]
    for number, value in ((1, "data.path"), (1, "training.seed"), (1, "training.save_steps")):
        runs[number]["recipe"]["differences"][value] = "another"  # these do not distinguish runs
    runs[2]["recipe"]["differences"]["method.temperature"] = 0.1
    del runs[3]["recipe"]["differences"]["method.temperature"]
    runs[3]["training"]["final_loss"] = 9.0
    entries = [result_entry(each) for each in runs]
    assert [(row.label, row.seeds) for row in compare(entries).rows] == [
        ("SimCLR, method.temperature 0.5", [0, 1]),
        ("SimCLR, method.temperature 0.1", [2]),
        ("SimCLR, method.temperature default", [0]),
    ]
    old = [{key: value for key, value in each.items() if key != "settings"} for each in entries]
    assert [row.seeds for row in compare([*entries[:2], *old[:2]]).rows] == [[0, 1]]
    assert len(compare(old).rows) == 1
    [joined] = compare([old[0], entries[1]]).rows  # only one row is equal to the older run
    assert sorted(joined.seeds) == [0, 1]
    unknown, *_ = compare([old[0], entries[1], entries[2]]).rows
    assert (unknown.label, unknown.seeds) == ("SimCLR, settings not recorded", [0])


def test_other_settings_are_other_rows() -> None:
    runs = [entry(), entry(steps=800), entry(learning_rate=0.5), entry(precision="float32")]
    labels = [row.label for row in compare(runs).rows]
    assert len(set(labels)) == 4 and any("800 steps" in label for label in labels)
    changed = entry()
    changed["overrides"] = [*changed["overrides"], "method.temperature=0.5"]
    other = entry(seed=1)
    other["overrides"] = [*other["overrides"], "evaluation.batch_size=7", "training.output_dir=x"]
    other["overrides"] += ["training.monitor_steps=7", "data.max_broken_fraction=0.5"]
    other["overrides"] += ["training.log_level=info", "training={dataloader_num_workers: 3, do_train: true}"]
    rows = compare([entry(), changed, other]).rows
    assert [(row.label, row.seeds) for row in rows] == [
        ("SimCLR", [0, 1]), ("SimCLR, method.temperature=0.5", [0]),
    ]  # fmt: skip


def test_other_settings_of_supervised_runs_are_other_rows() -> None:
    """Supervised runs train with the settings of `evaluation`. Only the overrides contain the crops."""

    def supervised(seed: int, *overrides: str) -> dict:
        run = entry("supervised", seed)
        return run | {"overrides": [*run["overrides"], *overrides]}

    mixed = "evaluation.settings.fine_tune.mixup=0.8"
    crops = "evaluation.settings={fine_tune: {smallest_crop: 0.8}}"
    other = ("evaluation.path=x", "evaluation.max_test_images=9", "evaluation.batch_size=7")
    folder = "evaluation.settings.fine_tune.folder=x"
    runs = [supervised(0), supervised(1, *other, folder), supervised(0, mixed), supervised(0, crops)]
    comparison = compare(runs)
    assert [row.seeds for row in comparison.rows] == [[0, 1], [0], [0]] and not comparison.repeated
    parts = [("mixup=0.8",), ("smallest_crop", 0.8)]
    assert [missing(row.label, *own) for row, own in zip(comparison.rows[1:], parts, strict=True)] == [[], []]
    assert len(compare([entry(), entry(seed=1) | {"overrides": [mixed]}]).rows) == 1, "no supervised run"


def test_different_precisions_of_the_features_are_named() -> None:
    """`hf-ssl evaluate` chooses the fastest one of the machine, and a recipe may set another one."""
    first, second = entry(), entry("byol")
    first["results"]["trained"]["precision"] = second["results"]["trained"]["precision"] = "float32"
    assert "precision" not in markdown(compare([first, second]))
    second["results"]["trained"]["precision"] = "bfloat16"
    words = "The precision of the features differs: float32 (SimCLR); bfloat16 (BYOL)."
    assert words in markdown(compare([first, second]))


@pytest.mark.parametrize("change", ["id", "revision", "images", "split", "classes", "bank"])
def test_other_ids_and_images_never_share_a_column(change: str) -> None:
    first, second = entry(), entry("byol")
    result = second["results"]["trained"]
    if change == "id":
        for number in result["protocols"]:
            number["id"] += "x"
    elif change == "revision":
        second["evaluation"]["revision"] = "f" * 16
    elif change == "images":
        result["images"]["test"] += 1
        for number in result["protocols"]:
            number["details"].pop("right", None)
    elif change == "bank":
        result["images"]["train"] -= 1
    elif change == "classes":  # another column of labels, such as the coarse classes of CIFAR-100
        result["classes"] += 1
    else:
        second["evaluation"]["test_split"] = "validation"
    comparison = compare([first, second])
    single = compare([first])
    assert len(comparison.columns) == 2 * len(single.columns)
    assert len({column.heading for column in comparison.columns}) == len(comparison.columns)
    assert all(
        len([row for row in comparison.rows if column in row.cells]) == 1 for column in comparison.columns
    )
    assert "| - |" in markdown(comparison)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "0.5"])
def test_a_number_that_is_not_finite_is_omitted(value) -> None:
    first, second = entry(), entry("byol")
    second["results"]["trained"]["protocols"][0]["value"] = value
    comparison = compare([first, second])
    rows = [len([row for row in comparison.rows if column in row.cells]) for column in comparison.columns]
    assert rows == [1] + [2] * (len(rows) - 1) and len(rows) > 1
    assert not comparison.repeated


def test_differences_are_those_of_the_paired_bootstrap(six) -> None:
    comparison = compare(six)
    column = comparison.columns[0]
    first, second = (row.cells[column] for row in comparison.rows)
    assert comparison.best(column).label == "SimCLR" and first.difference is None
    packed = [
        [unpack_right(run["results"]["trained"]["protocols"][0]["details"]["right"], 40) for run in runs]
        for runs in (six[3:], six[:3])
    ]
    assert second.difference == paired_bootstrap(*packed)
    assert second.difference.value == pytest.approx(second.mean - first.mean)
    without = copy.deepcopy(six)
    without[4]["results"]["trained"]["protocols"][0]["details"].pop("right")
    assert compare(without).rows[1].cells[column].difference is None, "one run did not record it"


def test_baselines_are_further_rows(six) -> None:
    comparison = compare(six, baselines=True)
    assert [row.label for row in comparison.rows[2:]] == ["the same network without training", "raw pixels"]
    # The six runs of the example have one encoder before training for each seed.
    assert [len(row.seeds) for row in comparison.rows] == [3, 3, 3, 1]
    low = copy.deepcopy(six)
    for run in low:
        for number in run["results"]["trained"]["protocols"]:
            number["value"] = 0.01
    better = compare(low, baselines=True)
    assert not any(better.best(column).is_baseline for column in better.columns), (
        "differences to trained runs"
    )


def test_a_run_without_evaluation_is_listed() -> None:
    lost = facts_of("byol", 5) | {"evaluation": None, "unmeasured": "no labels", "results": {}}
    comparison = compare([entry(), result_entry(lost)])
    assert len(comparison.rows) == 1
    assert "not compared: simclr_cifar10_cpu, seed 5" in markdown(comparison)


def test_markdown_and_latex_show_means_deviations_and_the_best(six) -> None:
    comparison = compare(six)
    cell = comparison.rows[0].cells[comparison.columns[0]]
    numbers = f"{100 * cell.mean:.1f}", f"{100 * cell.deviation:.1f}"
    text = markdown(comparison)
    assert f"| SimCLR | **{numbers[0]} ± {numbers[1]}** |" in text
    assert all(column.text in text and f"`{column.id}`" in text for column in comparison.columns)
    found = comparison.rows[1].cells[comparison.columns[0]].difference
    assert f"| BYOL | {100 * found.value:+.1f} | {100 * found.low:+.1f} to {100 * found.high:+.1f} |" in text
    table = latex(comparison)
    assert f"SimCLR & \\textbf{{{numbers[0]} $\\pm$ {numbers[1]}}} &" in table
    assert table.count(r"\\") == 3 and f"{{l{'r' * len(comparison.columns)}}}" in table
    assert latex_escaped(r"a_b & 5 % {x} \ ~ ^ # $") == (
        r"a\_b \& 5 \% \{x\} \textbackslash{} \textasciitilde{} \textasciicircum{} \# \$"
    )
    assert latex_escaped("[a]<b>|") == r"{[}a]\textless{}b\textgreater{}\textbar{}"


def test_csv_has_a_line_for_each_number(six) -> None:
    comparison = compare(six)
    rows = list(csv.DictReader(io.StringIO(csv_text(comparison))))
    assert len(rows) == 2 * len(comparison.columns)
    for row in rows:
        values = [float(value) for value in row["values"].split()]
        assert len(values) == int(row["runs"]) == 3 and row["seeds"] == "0 1 2"
        assert float(row["mean"]) == pytest.approx(statistics.mean(values), abs=1e-6)
        assert float(row["std"]) == pytest.approx(statistics.stdev(values), abs=1e-6)
        assert row["protocol_id"] and row["revision"] == "0123456789abcdef" and row["images"] == "40"
    assert {row["row"] for row in rows if row["difference_to_best"]} <= {"SimCLR", "BYOL"}


def rows_of(entries: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Return {row: {key: values of the runs}}."""
    return {
        row.label: {column.key: cell.values for column, cell in row.cells.items()}
        for row in compare(entries).rows
    }


def test_a_run_counts_once_in_whatever_form_it_is_given(six) -> None:
    """Later evaluations of an encoder, also with other protocols, are not further runs."""
    again = copy.deepcopy(six[0]) | {"date": "2026-12-01T00:00:00+00:00"}
    again["training"] |= {"resumed": 1, "seconds": 0.1, "images_per_second": 9e5}  # it had finished before
    for number in again["results"]["trained"]["protocols"]:
        number["value"] += 0.001
    other = copy.deepcopy(six[0])
    (first, *_) = other["results"]["trained"]["protocols"]
    other["results"]["trained"]["protocols"] = [
        first | {"protocol": "ridge", "id": "ridge-1-0", "key": "ridge"}
    ]
    expected = rows_of(six)["SimCLR"]
    found = rows_of([*six, again, other])["SimCLR"]
    for key, values in expected.items():
        assert found[key] == [values[0] + 0.001, *values[1:]], "the newest number counts"
    assert found["ridge"] == [first["value"]]
    comparison = compare([*six, again])
    assert any("seed 0" in text for text in comparison.repeated) and "count once" in markdown(comparison)
    assert not compare(six).repeated and not compare([six[0], other]).repeated
    seeds = {
        row["key"]: row["seeds"] for row in csv.DictReader(io.StringIO(csv_text(compare([*six, other]))))
    }
    assert seeds["ridge"] == "0" and seeds[first["key"]] == "0 1 2", "the seeds are those of the values"


def test_other_poolings_of_an_encoder_are_other_rows() -> None:
    first, second = entry(), entry()
    for run, pooling in ((first, "cls"), (second, "mean")):
        run["results"]["trained"]["pooling"] = pooling
    assert list(rows_of([first, second])) == ["SimCLR, pooling cls", "SimCLR, pooling mean"]


def test_the_baseline_of_a_run_counts_once(six) -> None:
    again = copy.deepcopy(six[0]) | {"date": "2026-12-01T00:00:00+00:00"}
    comparison = compare([*six, again], baselines=True)
    assert [len(row.seeds) for row in comparison.rows] == [3, 3, 3, 1]


def test_selected_settings_are_those_of_all_runs(six) -> None:
    runs = copy.deepcopy(six)
    for run, rate in zip(runs, (0.1, 1.0, 0.1, 10.0, 10.0, 1000.0), strict=True):
        number = run["results"]["trained"]["protocols"][-1]
        number["selection"] = {"learning_rate": rate}
        number["text"] = f"The learning rate {rate:g} was the best of 13"
    text = markdown(compare(runs))
    assert "The learning rate 0.1 to 1000 was the best of 13" in text
    assert "SimCLR, in the order of its runs: learning rate 0.1, 1, 0.1." in text
    assert "BYOL, in the order of its runs: learning rate 10, 10, 1000." in text
    assert joined(["a 1,000 b", "a 2 b"]) == "a 2 to 1,000 b" and joined(["a 1", "a 1"]) == "a 1"
    assert joined(["a 1", "b 1", "a 2"]) == "a 1 to 2; or: b 1"
    edge = " (at the edge of the sweep)"
    assert joined([f"a 1{edge}", f"a 2{edge}"]) == f"a 1 to 2{edge}"
    some = joined(["rate 1 of 7", f"rate 10{edge} of 7", "rate 2 of 7"])
    assert some.startswith("rate 1 to 10 of 7.") and "1 of 3" in some and "edge of the sweep" in some


def test_standard_errors_say_what_they_are_of(six) -> None:
    (row, *_) = csv.DictReader(io.StringIO(csv_text(compare(six))))
    values = [float(value) for value in row["values"].split()]
    assert float(row["standard_error_over_runs"]) == pytest.approx(
        statistics.stdev(values) / 3**0.5, abs=1e-6
    )
    largest = max(value * (1 - value) / 40 for value in values) ** 0.5
    assert float(row["standard_error_over_images"]) == pytest.approx(largest, abs=1e-6)
    (single, *_) = csv.DictReader(io.StringIO(csv_text(compare(six[:1]))))
    assert single["std"] == single["standard_error_over_runs"] == ""


def test_cells_with_fewer_runs_than_their_row_are_named(six) -> None:
    given = copy.deepcopy(six)
    key = given[0]["results"]["trained"]["protocols"][0]["key"]
    for run in given[:2]:  # a number of SimCLR that only its third run has
        numbers = run["results"]["trained"]["protocols"]
        run["results"]["trained"]["protocols"] = [each for each in numbers if each["key"] != key]
    comparison = compare(given)
    heading = next(column.heading for column in comparison.columns if column.key == key)
    words = f"SimCLR, {heading}: 1 of 3 runs"
    assert f"- {words}; " in markdown(comparison) and f"% {words}; " in latex(comparison)
    assert "The interval of a single run" in markdown(comparison)
    whole = compare(six)
    assert "of 3 runs" not in markdown(whole) + latex(whole)
    assert "The interval of a single run" not in markdown(whole)


def test_a_run_with_quality_alone_says_so() -> None:
    run = entry("byol")
    run["results"] = {"trained": run["results"]["trained"] | {"protocols": [], "quality": {"lidar": 3.0}}}
    (sentence,) = compare([entry(), run]).skipped
    assert "LiDAR" in sentence and "knn" in sentence and "not evaluated" not in sentence


def test_names_are_as_short_as_they_can_be() -> None:
    assert distinguished([["a", "x", "1"], ["b", "x", "2"]]) == ["a", "b"]
    assert distinguished([["a", "x", "1"], ["a", "y", "1"], ["b", "z", "1"]]) == ["a, x", "a, y", "b"]
    assert distinguished([["a", "x", "1"], ["a", "x", ""]]) == ["a, x"[:1] + ", 1", "a"]
    assert distinguished([["a", "x"], ["a", "x"]]) == ["a", "a (2)"]
    assert distinguished([]) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three runs: two in a folder of folders, one in a results file."""
    for seed in range(2):
        write_facts(tmp_path / "runs" / f"seed{seed}", facts_of("simclr", seed))
    append_result(tmp_path / "results", "byol", facts_of("byol", 0, 0.7))
    return tmp_path


def test_the_command_reads_files_and_folders_and_writes_four_files(folder: Path, capsys) -> None:
    places = [
        folder / "runs",
        folder / "runs/seed0",
        folder / "runs/seed1/facts.json",
        folder / "results/byol.json",
    ]
    assert main(["compare", *map(str, places), "--output", str(folder / "out")]) == 0
    printed = capsys.readouterr().out
    assert "| SimCLR | **" in printed and "| BYOL | " in printed and str(folder / "out") in printed
    files = {path.suffix: path for path in (folder / "out").iterdir()}
    assert set(files) == {".md", ".csv", ".tex", ".png"}
    assert files[".md"].read_text() in printed
    seeds = {row["row"]: row["seeds"] for row in csv.DictReader(files[".csv"].open())}
    assert seeds == {"SimCLR": "0 1", "BYOL": "0"}, "runs that were given twice count once"
    with PIL.Image.open(files[".png"]) as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors(256)) > 20


def test_runs_are_read_from_the_hub(online: HubServer, folder: Path) -> None:
    api = HfApi(endpoint=online.endpoint, token=online.write_token)
    for name, files in (("someone/digits", "runs/seed0"), ("someone/other", "results")):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder / files)
    assert entries_of("someone/digits") == entries_of(str(folder / "runs/seed0"))
    assert entries_of("someone/digits@main") == entries_of("someone/digits")
    for name in ("someone/other", "someone/nobody"):
        with pytest.raises(UserError, match=mentions(name)):
            entries_of(name)


@pytest.mark.parametrize(
    ("place", "content", "parts"),
    [
        ("missing.json", None, ["missing.json"]),
        ("a.json", "[]", ["a.json", "facts.json"]),
        ("a.json", '[{"knn": 1}]', ["a.json"]),
        ("a.json", "{", ["a.json"]),
        ("results.json", '{"evaluated": {}, "encoder": {"protocols": []}}', ["results.json", "delete"]),
        ("results.json", '{"evaluated": {}, "encoder": null}', ["results.json", "delete"]),
        (
            "results.json",
            '{"evaluated": {}, "encoder": {"protocols": [], "images": {"train": 2, "test": 2}}}',
            ["results.json", "date"],
        ),
        (".", None, ["facts.json"]),
    ],
)
def test_other_files_end_in_one_sentence(place, content, parts, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(place).write_text(content)
    assert main(["compare", place]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in parts)
    assert not Path("comparison").exists()


def test_folders_of_results_files_and_nested_folders_are_read(folder: Path, caplog) -> None:
    (folder / "results" / "other.json").write_text("{}")
    assert len(entries_of(str(folder / "results"))) == 1
    assert "other.json" in caplog.text, "files that are not read are reported"
    (folder / "results").rename(folder / "_results")
    assert entries_of(str(folder)) == entries_of(str(folder / "runs")), "runs in a folder of a folder"


@pytest.mark.parametrize("content", [{"encoder": {}}, {"recipe": "a", "result": {}, "seconds": 1.0}])
def test_files_of_an_older_version_end_in_one_sentence(content: dict, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=mentions("results.json", "older", "again")):
        entries_of(str(tmp_path))


def in_old_layout(result: dict) -> dict:
    """Return a result as version 0.1 stored it."""
    numbers = {number["protocol"]: number for number in result["protocols"]}
    knn, linear = numbers["knn"], numbers.get("linear")
    words = {"knn": knn["text"], "linear": linear["text"] if linear else "", "features": result["features"]}
    old = {key: value for key, value in result.items() if key not in ("protocols", "features", "revision")}
    return old | {
        "protocol": words,
        "knn": knn["details"] | {"accuracy": knn["value"]},
        "linear": linear and linear["details"] | {"accuracy": linear["value"]},
        "few_labels": [],
    }


def test_results_of_version_0_1_are_compared(tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / "training" / "results"
    files = [tmp_path / "simclr_chest_xray.json", tmp_path / "ijepa_vit_tiny_imagenette.json"]
    for file in files:
        record = json.loads((root / file.name).read_text())[0]
        record["results"] = {name: in_old_layout(result) for name, result in record["results"].items()}
        file.write_text(json.dumps([record]))
    comparison = compare([run for file in files for run in entries_of(str(file))])
    stored = json.loads(files[0].read_text())[0]["results"]["trained"]["knn"]["accuracy"]
    column = next(column for column in comparison.columns if "chest_xray" in column.data[0])
    assert comparison.rows[0].cells[column].values == [stored]
    assert {column.data[0] for column in comparison.columns} == {"chest_xray", "imagenette160"}
