# SPDX-License-Identifier: Apache-2.0
"""Tests that the card contains the recorded facts, and nothing else."""

import copy
import math
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants, parse_eval_result_entries
from messages import mentions, missing
from transformers.modeling_outputs import BaseModelOutput

from hf_ssl.cards import write_card
from hf_ssl.cards.card import evaluation_entries
from hf_ssl.cards.privacy import public_facts
from hf_ssl.cards.text import command, duration, results_table, terminal_text
from hf_ssl.cards.usage import FEATURES
from hf_ssl.errors import UserError
from hf_ssl.modeling.pooling import pool

# Dicts whose keys differ between runs; their entries are not declared facts.
FREE = {"config", "sections", "differences", "views", "packages", "results", "pictures", "history", "seconds"}
FREE |= {"statistics", "images", "metrics", "selection", "details", "overrides"}


# Each text contains a fact of the fixture.
TEXTS = (
    "`ResNetModel`",
    "11,176,512 parameters",
    "64 x 64 pixels, it computes a feature vector of 512 numbers",
    "revision | `0123456789abcdef`",
    "400 steps of 256 images, 2.048 epochs, 102,400 images seen",
    "sgd, learning rate 0.12",
    "bfloat16",
    "4.1234",
    "18 min 20 s, 93 images per second",
    "1 x AMD EPYC, 2 cores, 31.2 GiB memory",
    "Python 3.11.7, torch 2.15.0",
    "| views.mean | `[0.49, 0.48, 0.45]` |",
    "| projection_size | `128` |",
    "one run with seed 3",
    "not evaluated: k-NN with k 100, 200, 500, 1,000, 2,000, 5,000: the bank has 80 images",
    "The collapse alarm was not raised",
    "arXiv:2002.05709",
    "on 1,000 labeled images of test",
    "hf_ssl 0.1.0",
    "standard deviation of embeddings (isotropic: 1, collapsed: 0) | 0.61 | 0.93",
)


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items():
        yield (*path, key)
        if isinstance(item, dict) and key not in FREE:
            yield from leaves(item, (*path, key))


def holder(facts: dict, path: tuple[str, ...]) -> dict:
    for key in path[:-1]:
        facts = facts[key]
    return facts


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_metadata(facts: dict, tmp_path: Path) -> None:
    facts["data"]["hub_id"] = "uoft-cs/cifar10"
    facts["backbone"]["base_model"] = "microsoft/resnet-18"
    facts["results"]["trained"]["protocols"][-1]["metric"] = "mean_iou"
    write_card(tmp_path, facts)
    data = ModelCard.load(tmp_path / "README.md").data
    assert [result.metric_type for result in data.eval_results] == ["accuracy"] * 4 + ["mean_iou"]
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-feature-extraction",
        "apache-2.0",
    )
    assert data.tags == ["self-supervised-learning", "hf_ssl", "simclr", "cifar"]
    assert (data.datasets, data.base_model) == (["uoft-cs/cifar10"], "microsoft/resnet-18")
    assert data.model_name == "my-encoder"
    trained = facts["results"]["trained"]
    names = [
        "20-NN accuracy",
        "k-NN accuracy with the selected k",
        "1-NN accuracy, 1 labeled image per class",
        "1-NN accuracy, 5 labeled images per class",
        "Linear probe accuracy",
    ]
    assert [(result.metric_name, result.metric_value) for result in data.eval_results] == [
        (name, round(number["value"], 4)) for name, number in zip(names, trained["protocols"], strict=True)
    ]
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_split, first.dataset_revision) == (
        "cifar10",
        "test",
        "0123456789abcdef",
    )
    assert first.metric_args == {"protocol": trained["protocols"][0]["text"]}


def test_unknown_license_data_and_base_are_left_out(facts: dict, tmp_path: Path) -> None:
    facts["license"] = None
    write_card(tmp_path, facts)
    metadata = yaml.safe_load(readme(tmp_path).split("---")[1])
    assert not {"license", "datasets", "base_model"} & metadata.keys()
    assert "None" not in readme(tmp_path) and "null" not in readme(tmp_path).split("```yaml")[0]


def test_results_for_leaderboards(facts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / ".eval_results" / "hf_ssl.yaml"
    facts["evaluation"]["hub_id"] = "uoft-cs/cifar10"
    facts["repo_id"] = "jane/my-encoder"
    write_card(tmp_path, facts)
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    trained = facts["results"]["trained"]["protocols"]
    assert [entry.task_id for entry in entries] == [number["key"] for number in trained]
    assert entries[0].value == pytest.approx(100 * trained[0]["value"], abs=0.01)
    assert (entries[0].dataset_id, entries[0].dataset_revision) == ("uoft-cs/cifar10", "0123456789abcdef")
    assert entries[1].notes == trained[1]["text"]
    assert entries[0].source_url == "https://huggingface.co/jane/my-encoder"
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org")
    (entry, *_) = evaluation_entries(facts)
    assert entry.source_url == "https://hub.example.org/jane/my-encoder"
    # Leaderboards do not accept local data. An earlier file with wrong numbers must not stay.
    facts["evaluation"]["hub_id"] = None
    write_card(tmp_path, facts)
    assert not path.exists()


def test_every_number_is_on_the_card(facts: dict, tmp_path: Path) -> None:
    write_card(tmp_path, facts)
    text = readme(tmp_path)
    for name, result in facts["results"].items():
        for number in result["protocols"]:
            spread = f" ± {100 * number['details']['std']:.1f}" if "std" in number["details"] else ""
            assert f"| {100 * number['value']:.1f} %{spread} |" in text
        for cell in result["protocols"][0]["details"]["grid"]:
            cells = (
                name.replace("_", " "),
                cell["neighbors"],
                cell["temperature"],
                f"{100 * cell['accuracy']:.1f} %",
            )
            row = f"| {' | '.join(map(str, cells))} |"
            assert row in text
    trained = facts["results"]["trained"]
    for sentence in (trained["features"], *(number["text"] for number in trained["protocols"])):
        assert sentence in text
    for expected in TEXTS:
        assert expected in text, expected
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert recipe["training"] == {"output_dir": "my-encoder", "seed": 3}
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    assert len(tables) >= 5
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table


def test_a_missing_fact_is_named_and_no_card_is_written(facts: dict, tmp_path: Path) -> None:
    write_card(tmp_path, facts)
    before = readme(tmp_path)
    paths = list(leaves(facts)) + [("results", "trained", key) for key in facts["results"]["trained"]]
    assert len(paths) > 80
    for path in paths:
        without = copy.deepcopy(facts)
        del holder(without, path)[path[-1]]
        with pytest.raises(UserError) as caught:
            write_card(tmp_path, without)
        assert missing(str(caught.value), f"facts.{'.'.join(path)}") == [], path
        assert readme(tmp_path) == before


def test_an_unknown_or_empty_fact_is_named(facts: dict, tmp_path: Path) -> None:
    for path, value, parts in (
        (("training", "learing_rate"), 1.0, ["facts.training.learing_rate", "learning_rate"]),
        (("data", "revision"), None, ["facts.data.revision", "None"]),
        (("results",), {}, ["facts.results.trained"]),
        (("evaluation",), None, ["facts.evaluation", "None"]),
        (("training",), 3, ["facts.training", "dict", "int"]),
    ):
        changed = copy.deepcopy(facts)
        holder(changed, path)[path[-1]] = value
        with pytest.raises(UserError) as caught:
            write_card(tmp_path, changed)
        assert missing(str(caught.value), *parts) == []
    assert list(tmp_path.iterdir()) == []


def test_no_path_and_no_token_reaches_the_card(facts: dict, tmp_path: Path) -> None:
    token = "hf_" + "Ab3" * 10
    facts["monitor"]["alarm"] = f"embeddings have collapsed, see /home/jane/runs/log.txt {token}"
    facts["recipe"]["sections"]["training"]["hub_token"] = token
    facts["recipe"]["sections"]["data"]["cache_dir"] = "~jane/cache"
    facts["recipe"]["overrides"] += ["training.output_dir=/home/jane/x y", f"training.hub_token={token}"]
    facts["recipe"]["differences"]["training.resume"] = "C:\\Users\\jane\\run"
    facts["results"]["trained"]["skipped"].append("see https://jane:pass@example.org/a/b?token=1")
    facts["notes"] = ["Broken: /home/jane/images/a.png"]
    write_card(tmp_path, facts)
    text = readme(tmp_path)
    for secret in ("jane", "/home", "Users", token, "pass@", "token=1"):
        assert secret not in text, secret
    assert "see log.txt (removed)" in text
    assert "https://example.org/a/b" in text
    assert "data.path=./cifar10" in command(public_facts(facts))


def test_a_relative_folder_is_not_a_data_set_on_the_hub(facts: dict, tmp_path: Path) -> None:
    facts["recipe"]["sections"]["data"]["path"] = "secret/cifar10"
    facts["recipe"]["overrides"] = ["data.path=secret/cifar10"]
    write_card(tmp_path, facts)
    assert "secret" not in readme(tmp_path)
    facts["data"] |= {"hub_id": "open/cifar10", "name": "open/cifar10"}
    facts["recipe"]["sections"]["data"]["path"] = "open/cifar10"
    write_card(tmp_path, facts)
    assert "path: open/cifar10" in readme(tmp_path)


def test_results_of_both_poolings(facts: dict, tmp_path: Path) -> None:
    facts["results"]["trained"]["poolings"] = {"cls": 0.4, "mean": 0.5}
    write_card(tmp_path, facts)
    assert "of the class token: 40.0 %, of the mean of all tokens: 50.0 %." in readme(tmp_path)
    facts["results"]["trained"]["poolings"] = {"image": 0.4, "grid": 0.5}
    write_card(tmp_path, facts)
    assert "the published feature: 40.0 %, of the mean over a grid of patches: 50.0 %." in readme(tmp_path)


@pytest.mark.parametrize("protocols", [["knn"], ["knn", "linear"]])
def test_the_selection_of_a_learning_rate_is_named_if_a_probe_was_measured(
    protocols: list[str], facts: dict, tmp_path: Path
) -> None:
    trained = facts["results"]["trained"]
    trained["protocols"] = [each for each in trained["protocols"] if each["protocol"] in protocols]
    for number in trained["protocols"]:
        number["key"] = number["key"].replace("linear_probe", "linear_grid")  # it also selected its feature
    write_card(tmp_path, facts)
    assert ("linear probe was selected" in readme(tmp_path)) == ("linear" in protocols)


def test_problems_of_a_run_are_on_the_card(facts: dict, tmp_path: Path) -> None:
    numbers = [facts["results"][name]["protocols"][0] for name in ("untrained", "trained")]
    numbers[0]["value"] = numbers[1]["value"] + 0.02
    facts["monitor"]["alarm"] = "embeddings have collapsed at step 40: embedding_std is 0.01"
    facts["training"] |= {"final_loss": float("nan"), "selection": "eval_knn", "resumed": 2}
    facts["data"]["broken"] = 7
    facts["evaluation"] |= {"shared": 3, "unknown_classes": 4, "test_split": "20 % of train"}
    facts["recipe"]["sections"]["evaluation"] = {"test_fraction": 0.2}
    write_card(tmp_path, facts)
    text = readme(tmp_path)
    worse = "This encoder is not better than the same network without training in 20-NN accuracy"
    assert f"**{worse}** (-2.0 points)." in text
    assert "> **Collapsed during training**: embeddings have collapsed at step 40" in text
    assert "The collapse alarm was not raised" not in text
    assert "| final loss | not finite |" in text
    assert "**The checkpoint was selected by eval_knn**" in text
    assert "resumed 2 times" in text
    assert "7 training images could not be read" in text
    assert "**3 test images also occur among the training images**" in text
    assert "The test images (20 % of train) were chosen at random" in text
    assert "4 test images have a class without training images, and count as wrong" in text
    facts["evaluation"] |= {"shared": 1, "unknown_classes": 1}
    write_card(tmp_path, facts)
    text = readme(tmp_path)
    assert "**1 test image also occurs among the training images**" in text
    assert "1 test image has a class without training images, and counts as wrong" in text


def test_an_encoder_without_evaluation(facts: dict, tmp_path: Path) -> None:
    facts |= {"evaluation": None, "results": {}, "unmeasured": "the data has no labels"}
    facts["monitor"] = {"history": [], "alarm": None, "test_images": None}
    write_card(tmp_path, facts)
    text = readme(tmp_path)
    assert "Not evaluated: the data has no labels." in text
    assert "would not have been detected" in text
    assert "## Results" not in text and "model-index" not in text
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_pictures_and_the_method_model(facts: dict, tmp_path: Path) -> None:
    write_card(tmp_path, facts)
    assert "![" not in readme(tmp_path) and "subfolder" not in readme(tmp_path)
    facts["pictures"] = {
        "views.png": "What the network saw",
        "curves.png": "How it learned",
        "map.png": "A map",
        "knn_curve.png": "Every k",
    }
    for name in ("views.png", "curves.png", "knn_curve.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=mentions("pictures.map.png")):
        write_card(tmp_path, facts)
    facts["pictures"]["notes.txt"] = "No picture"
    for name in ("map.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=mentions("pictures.notes.txt")):
        write_card(tmp_path, facts)
    del facts["pictures"]["notes.txt"]
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining" / "config.json").write_text("{}")
    write_card(tmp_path, facts)
    for line in ("![What the network saw](views.png)", "![How it learned](curves.png)", "![A map](map.png)"):
        assert readme(tmp_path).count(line) == 1
    results, _ = readme(tmp_path).split("## Monitoring")
    assert results.count("![Every k](knn_curve.png)") == readme(tmp_path).count("knn_curve.png") == 1
    assert 'from_pretrained("my-encoder", subfolder="pretraining", ' in readme(tmp_path)


@pytest.mark.parametrize(
    ("pooling", "channels", "lines"),
    [
        ("pooler", 3, ["features = outputs.pooler_output.flatten(1)  # (1, 512)"]),
        ("cls", 3, ["features = outputs.last_hidden_state[:, 0]"]),
        ("mean", 3, ["features = outputs.last_hidden_state.mean(dim=1 if "]),
        ("pooler", 1, ['Image.open("photo.jpg")).convert("L")', "has one input channel"]),
    ],
)
def test_the_code_fits_the_encoder(
    facts: dict, tmp_path: Path, pooling: str, channels: int, lines: list[str]
) -> None:
    facts["backbone"] |= {"pooling": pooling, "channels": channels}
    write_card(tmp_path, facts)
    assert all(line in readme(tmp_path) for line in lines)
    assert "placed transparent images on a white background" in readme(tmp_path)
    assert ("The image processor does the same" in readme(tmp_path)) == (channels == 3)


@pytest.mark.parametrize(
    ("pooling", "shape"), [("cls", (2, 5, 4)), ("mean", (2, 5, 4)), ("mean", (2, 4, 3, 3))]
)
def test_the_code_computes_the_evaluated_feature(pooling: str, shape: tuple[int, ...]) -> None:
    values = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    outputs = BaseModelOutput(last_hidden_state=values)
    torch.testing.assert_close(eval(FEATURES[pooling], {"outputs": outputs}), pool(outputs, pooling))


def test_initial_weights(facts: dict, tmp_path: Path) -> None:
    write_card(tmp_path, facts)
    assert "| initial weights | random |" in readme(tmp_path)
    facts["backbone"]["config"]["init_from"] = "/home/jane/encoder"
    write_card(tmp_path, facts)
    assert "| initial weights | a local encoder |" in readme(tmp_path)
    facts["backbone"]["base_model"] = "microsoft/resnet-18"
    write_card(tmp_path, facts)
    assert "| initial weights | microsoft/resnet-18 |" in readme(tmp_path)


def test_further_image_columns_are_on_the_card(facts: dict, tmp_path: Path) -> None:
    write_card(tmp_path, facts)
    assert "trained without labels" in readme(tmp_path) and "further image columns" not in readme(tmp_path)
    facts["data"]["further_columns"] = {"a|b": "gray", "parts": "classes"}
    write_card(tmp_path, facts)
    text = readme(tmp_path)
    assert r"| further image columns | `a\|b` (gray), `parts` (classes), only in training |" in text
    assert "trained without labels" not in text and "(parts)" in text
    facts["data"]["further_columns"] = {"depth": "gray"}
    write_card(tmp_path, facts)
    assert "trained without labels" in readme(tmp_path)


def test_special_characters_are_escaped(facts: dict, tmp_path: Path) -> None:
    facts["name"] = 'my "best" encoder'
    facts["recipe"]["differences"] = {"data.image_column": "a|b`c"}
    facts["recipe"]["overrides"] = ["data.image_column=two words"]
    write_card(tmp_path, facts)
    text = readme(tmp_path)
    compile(re.search(r"```python\n(.*?)```", text, re.S)[1], "card", "exec")
    assert r"| data.image_column | `a\|b'c` |" in text
    assert "'data.image_column=two words'" in text


def test_a_method_without_a_text_is_an_error(facts: dict, tmp_path: Path) -> None:
    facts["method"]["name"] = "nothing"
    with pytest.raises(UserError, match=mentions("model_cards/methods/nothing.md")):
        write_card(tmp_path, facts)
    assert not (tmp_path / "README.md").exists()


def test_every_method_has_its_text() -> None:
    from hf_ssl.methods import METHODS
    from hf_ssl.resources import resource

    for name in METHODS:
        prose = resource("model_cards", "methods", f"{name}.md").read_text()
        for part in ("**What it is.**", "**When to choose it.**", "**What it costs.**", "**Citation.**"):
            assert part in prose, (name, part)


def test_choices_for_the_machine_are_on_the_card_and_in_its_commands(facts, tmp_path) -> None:
    facts["training"]["choices"] = {
        "training.batch_size": {"value": 32, "reason": "30 seconds per step are enough for 55 images"},
        "training.precision": {"value": "float32", "reason": "bfloat16 is 0.2 times as fast"},
        "training.dataloader_num_workers": {"value": 1, "reason": "2 cores"},
        "monitor.probe_images": {"value": 40, "reason": "4 seconds"},
    }
    facts["results"]["trained"]["precision"] = "float32"
    write_card(tmp_path, facts)
    text = (tmp_path / "README.md").read_text()
    reason = facts["training"]["choices"]["training.batch_size"]["reason"]
    assert f"| chosen for this machine | `training.batch_size=32`: {reason} |" in text
    assert "`training.dataloader_num_workers=1`: 2 cores" in text
    train = next(line for line in text.splitlines() if line.startswith("hf-ssl pretrain"))
    assert train.endswith("training.batch_size=32 training.precision=float32")
    evaluate = next(line for line in text.splitlines() if line.startswith("hf-ssl evaluate"))
    assert evaluate.endswith("evaluation.precision=float32")


def test_earlier_machines_of_a_resumed_run_are_on_the_card(facts: dict, tmp_path: Path) -> None:
    before = facts["environment"] | {"device": "older GPU", "devices": 2, "packages": {"torch": "2.14.0"}}
    facts["training"]["earlier"] = [
        {"last_step": 1300, "environment": before, "precision": "bfloat16", "processes": 2}
    ]
    facts["environment"]["threads"] = 1
    write_card(tmp_path, facts)
    text = (tmp_path / "README.md").read_text()
    assert f"| hardware | 1 x AMD EPYC, {before['cores']} cores, 1 thread, " in text
    cores = before["cores"]
    row = f"2 x older GPU, {cores} cores, 2 processes, bfloat16, torch 2.14.0"
    assert f"| hardware until step 1,300 | {row} |" in text


def test_a_full_disk_leaves_the_old_card(facts: dict, tmp_path: Path) -> None:
    write_card(tmp_path, facts)
    before = readme(tmp_path)
    facts["title"] = "Another one"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(UserError, match=mentions("README.md", "File too large")):
            write_card(tmp_path, facts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert readme(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.5, 42.31, 59.4, 1100.4, 7260)] == [
        "0.5 s", "42.3 s", "59.4 s", "18 min 20 s", "2 h 1 min",
    ]  # fmt: skip


def test_terminal_and_card_show_the_same_results(facts: dict, tmp_path: Path) -> None:
    facts["results"]["trained"]["poolings"] = {"cls": 0.4, "mean": 0.5}
    write_card(tmp_path, facts)
    card, terminal = readme(tmp_path), terminal_text(facts["results"])
    rows = results_table(facts["results"])
    assert rows[0][:3] == ["", "this encoder", "the same network without training"]
    lines = terminal.splitlines()
    (skipped,) = {text for result in facts["results"].values() for text in result["skipped"]}
    assert lines[-1] == f"(not measured: {skipped})"
    # a rule, the protocol, the features, the poolings, what was not measured
    assert len(lines) == len(rows) + 5
    for row, line in zip(rows, [lines[0], *lines[2:]], strict=False):
        assert re.split(r"\s{2,}", line.strip()) == [cell for cell in row if cell]
        assert " | ".join(row[1:]) in card
    assert facts["results"]["trained"]["protocols"][0]["text"] in lines[-4]
    assert facts["results"]["trained"]["features"] in lines[-3]
    assert "this encoder" in lines[-2] and "class token: 40.0 %" in lines[-2]
