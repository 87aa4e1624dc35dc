# SPDX-License-Identifier: Apache-2.0
"""Formats facts as texts and tables for the card and the terminal. All functions are pure."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hf_ssl.cards.facts import Facts
from hf_ssl.cards.privacy import local_path
from hf_ssl.effects import NUMBERS, effect
from hf_ssl.errors import counted
from hf_ssl.evaluation.config import MAIN_KNN, MEASUREMENTS
from hf_ssl.evaluation.results import (
    EncoderResult,
    ProtocolResult,
    find_results,
    in_percent,
    metric_of,
    percent,
)
from hf_ssl.modeling.pooling import POOLED

ENCODERS = {
    "trained": "this encoder",
    "encoder": "this encoder",
    "untrained": "the same network without training",
    "start": "the encoder that training began with",
    "raw_pixels": "raw pixels",
    "projector": "its projector's output",
}
# A text that YAML reads as the same text, except for the words in _NOT_STRINGS.
_PLAIN = re.compile(r"(\./)?[A-Za-z][\w./-]*")
_NOT_STRINGS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null", "none", "nan", "inf")


class Measurement(NamedTuple):
    """A number in [0, 1] with its names for readers and programs, its protocol and its kind (`metric_of`)."""

    key: str
    name: str
    value: float
    protocol: str
    metric: str


def markdown_row(cells: Sequence[str]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def whole(value: float) -> str:
    """Return a number without decimals: "50,000" for 50000."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Return a duration as text: "18 min 20 s" for 1100, "42.3 s" for 42.31."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def code(value: Any) -> str:
    """Return a setting as Markdown code that is valid inside a table."""
    return "`" + written(value).replace("|", "\\|").replace("`", "'") + "`"


def quoted(value: Any) -> str:
    """Return a value in YAML. JSON is YAML, and keeps texts such as "off" and "1"."""
    return json.dumps(value, ensure_ascii=False)


def written(value: Any) -> str:
    """Return a value for readers."""
    return value if isinstance(value, str) else quoted(value)


def words_of(values: Mapping[str, Any]) -> dict[str, str]:
    """Return {"section.key": "key value"}. The whole key is kept if two keys end with the same word."""
    words = [key.rpartition(".")[2] for key in values]
    return {
        key: f"{key if words.count(word) > 1 else word} {written(value)}"
        for (key, value), word in zip(values.items(), words, strict=True)
    }


def plain(number: float) -> str:
    """Return a number as Python source, without decimals if it is whole: "4095" for 4095.0."""
    return str(int(number) if float(number).is_integer() else number)


def literal(text: str) -> str:
    """Return a string as Python source."""
    return json.dumps(text, ensure_ascii=False)


def measurements(result: EncoderResult) -> list[Measurement]:
    """Return the numbers of all protocols for the metadata."""
    return [
        Measurement(
            each["key"],
            each["title"],
            round(each["value"], 4),
            each["text"],
            metric_of(each),
        )
        for each in result["protocols"]
    ]


def results_table(results: Mapping[str, EncoderResult]) -> list[list[str]]:
    """Return the results as rows of cells, one row per measurement and one column per encoder.

    The first row is the heading. The first encoder determines the measurements. A row contains only numbers
    with the same protocol id. The list is empty without results.
    """
    if not results:
        return []
    measured = next(iter(results.values()))["protocols"]
    unlabeled = _unlabeled(next(iter(results.values())))
    columns = [["", *(each["column"] for each in measured), "RankMe", *unlabeled]]
    for key, result in results.items():
        own = {each["id"]: each for each in result["protocols"]}
        cells = [_cell(own[each["id"]]) if each["id"] in own else "-" for each in measured]
        rank = f"{result['statistics']['rank_me']:.1f} of {whole(result['feature_size'])}"
        own_unlabeled = _unlabeled(result)
        others = [
            own_unlabeled[name][1] if name in own_unlabeled and own_unlabeled[name][0] == first_id else "-"
            for name, (first_id, _) in unlabeled.items()
        ]
        columns.append([ENCODERS.get(key, key), *cells, rank, *others])
    return [list(row) for row in zip(*columns, strict=True)]


def _unlabeled(result: EncoderResult) -> dict[str, tuple[str | None, str]]:
    """Return {name: (id, text)} of the existing measurements without labels, except RankMe."""
    found: dict[str, tuple[str | None, str]] = {}
    if "alpha_req" in result["statistics"]:
        found["alpha-ReQ"] = None, f"{result['statistics']['alpha_req']:.2f}"
    quality = result.get("quality")
    if quality is not None:
        found["LiDAR"] = quality["id"], f"{quality['lidar']:.1f}"
        found["alignment"] = quality["id"], f"{quality['alignment']:.3f}"
    return found


def _cell(result: ProtocolResult) -> str:
    """Return an accuracy, with its standard deviation over random choices of the labeled images, if any."""
    spread = result["details"].get("std")
    return percent(result["value"]) + ("" if spread is None else f" ± {in_percent(spread)}")


def main_number(facts: Facts) -> ProtocolResult | None:
    """Return the number of the trained encoder that a card shows first: that of the first protocol."""
    trained = facts["results"].get("trained")
    return trained["protocols"][0] if trained is not None and trained["protocols"] else None


def grids(facts: Facts) -> list[tuple[str, dict[str, float]]]:
    """Return (encoder, cell) for all measured values of k and temperature."""
    return [
        (name, cell)
        for name, result in facts["results"].items()
        for each in result["protocols"]
        for cell in each["details"].get("grid", ())
    ]


def terminal_text(results: Mapping[str, EncoderResult]) -> str:
    """Return the rows of `results_table` for a terminal, with the first protocol and compared poolings."""
    rows = results_table(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    first = next(iter(results.values()))
    lines += [f"({each['text']})" for each in first["protocols"][:1]]
    lines.append(f"(features: {first['features']})")
    for key, result in results.items():
        if "poolings" in result:
            lines.append(f"({ENCODERS.get(key, key)}: {_poolings(result)})")
    skipped = dict.fromkeys(text for result in results.values() for text in result["skipped"])
    lines += [f"(not measured: {text})" for text in skipped]
    return "\n".join(lines)


def _poolings(result: EncoderResult) -> str:
    parts = [f"of {_POOLINGS[name]}: {percent(value)}" for name, value in result["poolings"].items()]
    measured = (knn["details"]["neighbors"] for knn in find_results(result, "knn"))
    k = result.get("pooling_neighbors") or next(measured, MAIN_KNN[0])  # older results lack the first
    return f"{k}-NN accuracy {', '.join(parts)}"


_POOLINGS = POOLED | {
    "image": "the whole image, the published feature",
    "grid": "the mean over a grid of patches",
}


def comparisons(facts: Facts) -> list[str]:
    """Return sentences that compare the trained encoder with the baselines, in points of accuracy."""
    sentences = []
    main = main_number(facts)
    for key in ("untrained", "start", "raw_pixels"):
        others = facts["results"][key]["protocols"] if key in facts["results"] else []
        for other in others:
            if main is None or other["id"] != main["id"]:
                continue
            gain = 100 * (main["value"] - other["value"])
            than = f"{ENCODERS[key]} in {main['title']}"
            sentences.append(
                f"This encoder is {gain:.1f} points better than {than}."
                if gain >= 0.05
                else f"**This encoder is not better than {than}** ({gain:+.1f} points)."
            )
    trained = facts["results"].get("trained")
    if trained is not None and "poolings" in trained:
        sentences.append(f"{_poolings(trained)}.")
    return sentences


def monitor_table(facts: Facts) -> list[list[str]]:
    """Return rows (quantity, first value, last value) of the monitor's measurements.

    The first row is the heading. The result is [] for fewer than two measurements.
    """
    history = facts["monitor"]["history"]
    if len(history) < 2:
        return []
    first, last = history[0], history[-1]
    heading = ["", f"step {whole(first['step'])}", f"step {whole(last['step'])}"]
    return [heading] + [
        [described.text, *(_number(record[key]) for record in (first, last))]
        for key, described in MEASUREMENTS.items()
        if key in first and key in last
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def command(facts: Facts) -> str:
    """Return the command that starts the same run."""
    overrides = facts["recipe"]["overrides"]
    # On another machine, `auto` may select other values, which lead to other weights.
    chosen = [
        f"{key}={_yaml(choice['value'])}"
        for key, choice in facts["training"]["choices"].items()
        if key in ("training.precision", "training.batch_size")
    ]
    return shlex.join(["hf-ssl", "pretrain", facts["recipe"]["name"], *overrides, *chosen])


def choices(facts: Facts) -> list[str]:
    """Return the settings chosen for the machine of the run, one text with the reason for each."""
    return [
        code(f"{key}={choice['value']}") + f": {choice['reason']}"
        for key, choice in facts["training"]["choices"].items()
        if not key.startswith("monitor.")
    ]


def check_command(facts: Facts) -> str:
    """Return the command that repeats the evaluation with the same protocol on the same images.

    The result is "" for an encoder that was not evaluated.
    """
    images, differences = facts["evaluation"], facts["recipe"]["differences"]
    if images is None:
        return ""
    if images["hub_id"] is None:
        location = {"data.path": local_path(images["name"])}
    else:  # the revision that was evaluated, not the current one
        location = {"data.path": images["hub_id"], "data.revision": images["revision"]}
    keys = ["data.channels", "data.max_broken_fraction", "data.value_range"]
    if "evaluation.path" not in differences:  # else these keys describe the training data only
        keys += ["data.name", "data.image_column", "data.further_image_columns", "data.label_column"]
    settings = {
        key: value
        for key, value in differences.items()
        if key in keys or (key.startswith(("data.", "evaluation.")) and effect(key) == NUMBERS)
    }
    settings.pop("evaluation.path", None)
    precision = facts["results"]["trained"].get("precision")
    if precision is not None:  # `auto` may select another precision on another machine
        settings["evaluation.precision"] = precision
    overrides = [f"{key}={_yaml(value)}" for key, value in (location | settings).items()]
    return shlex.join(["hf-ssl", "evaluate", facts["name"], *overrides])


def _yaml(value: Any) -> str:
    """Return a value for the command line, which parses values as YAML. JSON is valid YAML."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_STRINGS
    return value if plain else json.dumps(value, ensure_ascii=False)


def limitations(facts: Facts) -> list[str]:
    """Return sentences about the limits of the results and of the encoder."""
    data, training, monitor = facts["data"], facts["training"], facts["monitor"]
    evaluation = facts["evaluation"]
    sentences = []
    if monitor["alarm"] is not None:
        sentences.append(f"**The collapse alarm was raised**: {monitor['alarm']}.")
    sentences.append(
        f"The results come from one run with seed {training['seed']}. The variance over seeds is unknown."
    )
    if evaluation is None:
        sentences.append(f"The encoder was not evaluated after training: {facts['unmeasured']}.")
    else:
        sentences.append(
            f"The evaluation uses {evaluation['name']} only. Results on other images may be better or worse."
        )
        sentences.append(_selection(facts, evaluation["test_split"]))
        if any(
            "std" in each["details"] for result in facts["results"].values() for each in result["protocols"]
        ):
            sentences.append(
                "The standard deviation with few labels is over random choices of the labeled images, not "
                "over training runs."
            )
        if facts["recipe"]["sections"].get("evaluation", {}).get("test_fraction") is not None:
            sentences.append(
                f"The test images ({evaluation['test_split']}) were chosen at random. Training without "
                "labels also used them, if it read this split."
            )
        if evaluation["shared"]:
            occur = "occurs" if evaluation["shared"] == 1 else "occur"
            sentences.append(
                f"**{counted(evaluation['shared'], 'test image')} also {occur} among the training images** "
                "of the evaluation, so all numbers are too high."
            )
        if evaluation["unknown_classes"]:
            have, count = ("has", "counts") if evaluation["unknown_classes"] == 1 else ("have", "count")
            sentences.append(
                f"{counted(evaluation['unknown_classes'], 'test image')} {have} a class without training "
                f"images, and {count} as wrong."
            )
        if evaluation["broken"]:
            sentences.append(
                f"{counted(evaluation['broken'], 'labeled image')} could not be read and "
                f"{'was' if evaluation['broken'] == 1 else 'were'} left out."
            )
    if data["broken"]:
        were = "was" if data["broken"] == 1 else "were"
        sentences.append(f"{counted(data['broken'], 'training image')} could not be read and {were} skipped.")
    segmented = [column for column, kind in data["further_columns"].items() if kind == "classes"]
    if segmented:
        sentences.append(
            f"Training was not free of labels: it used the class numbers of pixels ({', '.join(segmented)})."
        )
    sentences.append(
        f"License of the training data: {data['license']}."
        if data["license"]
        else f"The license of {data['name']} was not recorded. Check that it permits your use."
    )
    return [*sentences, *_input_limitations(facts["backbone"]["channels"]), *facts["notes"]]


def _selection(facts: Facts, split: str) -> str:
    """Return a sentence about how the test split influenced the published weights."""
    selected_by, test_images = facts["training"]["selection"], facts["monitor"]["test_images"]
    if selected_by is not None:
        return (
            f"**The checkpoint was selected by {selected_by}**. Results on {split} are too optimistic if "
            f"this metric uses images of {split}."
        )
    weights = "The weights are those of the last step."
    if find_results(facts["results"]["trained"], "linear"):
        weights += " The learning rate of the linear probe was selected on training images."
    if test_images:
        return (
            f"The monitor measured k-NN accuracy on {counted(test_images, 'labeled image')} of {split} "
            f"during training. The run did not use it to select a checkpoint or a setting. {weights}"
        )
    return f"Nothing was selected on {split}. {weights}"


def _input_limitations(channels: int) -> list[str]:
    """Return sentences about images that the image processor treats in another way than training did."""
    if channels == 3:
        first = (
            "Training placed transparent images on a white background. The image processor does the same "
            "with transformers 5.21 or newer. Older versions drop the transparency."
        )
    else:
        first = (
            'The encoder has one input channel. Open images with `image.convert("L")`, as shown above. '
            'Training placed transparent images on a white background. `convert("L")` drops the transparency.'
        )
    return [
        first,
        "Training scaled images with 16 bits per channel to 8 bits. The image processor does not do this.",
    ]
