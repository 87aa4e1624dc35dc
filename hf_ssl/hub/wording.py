# SPDX-License-Identifier: Apache-2.0
"""Numbers put into words and tables for the card. Every function here is pure: facts in, text out."""

import json
import re
import shlex
from typing import Any, NamedTuple

from hf_ssl.evaluation.results import EncoderResult
from hf_ssl.hub.facts import Facts

ENCODERS = {
    "trained": "**this encoder**",
    "untrained": "the same network untrained",
    "start": "the encoder that training began with",
    "raw_pixels": "raw pixels",
}
MONITORED = {
    "loss": "loss on fixed images",
    "knn": "k-NN accuracy, part of the test split",
    "embedding_std": "spread of embeddings (1 isotropic, 0 collapsed)",
    "embedding_rank": "dimensions in use by embeddings (RankMe, centred)",
    "feature_std": "spread of features (1 isotropic, 0 collapsed)",
    "rank_me": "dimensions in use by features (RankMe)",
    "alignment": "alignment of two views (0 perfect)",
    "uniformity": "uniformity (lower is more even)",
}
_PLAIN = re.compile(r"(\./)?[A-Za-z][\w./-]*")  # text that YAML takes for itself, but for these:
_NOT_STRINGS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null", "none", "nan", "inf")
FEATURES = {
    "pooler": "outputs.pooler_output.flatten(1)",
    "cls": "outputs.last_hidden_state[:, 0]",
    "mean": "outputs.last_hidden_state.mean(dim=1)",
}


class Measurement(NamedTuple):
    """An accuracy in [0, 1], with a name for people, a key for machines and its protocol."""

    key: str
    name: str
    value: float
    protocol: str


def percent(value: float) -> str:
    """0.6123 is "61.2 %"."""
    return f"{100 * value:.1f} %"


def whole(value: float) -> str:
    """50000 is "50,000"."""
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    """1100 is "18 min 20 s", 42.31 is "42.3 s"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def code(value: Any) -> str:
    """A setting as it would be written in a recipe, safe in a table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def literal(text: str) -> str:
    """A string as Python source."""
    return json.dumps(text, ensure_ascii=False)


def measurements(result: EncoderResult) -> list[Measurement]:
    """Headline k-NN, linear probe, few labels: what is worth a place in the metadata."""
    knn, protocol = result["knn"], result["protocol"]
    k = knn["neighbours"]
    found = [Measurement(f"knn_{k}", f"{k}-NN accuracy", round(knn["accuracy"], 4), protocol["knn"])]
    if result["linear"] is not None:
        accuracy = round(result["linear"]["accuracy"], 4)
        found.append(Measurement("linear_probe", "Linear probe accuracy", accuracy, protocol["linear"]))
    for draw in result["few_labels"]:
        labels = draw["labels_per_class"]
        name = f"1-NN accuracy, {labels} labelled image{'s'[: labels != 1]} a class"
        found.append(
            Measurement(f"few_labels_{labels}", name, round(draw["mean"], 4), protocol["few_labels"])
        )
    return found


def results_table(facts: Facts) -> list[list[str]]:
    """Rows of cells, the first row being the heading; [] where nothing was measured."""
    results = facts["results"]
    if not results:
        return []
    best = results["trained"]
    labels = [draw["labels_per_class"] for draw in best["few_labels"]]
    table = [["", f"{best['knn']['neighbours']}-NN, all labels", *(f"1-NN, {n} a class" for n in labels)]]
    if best["linear"] is not None:
        table[0].append("linear probe")
    table[0].append("RankMe")
    for key, result in results.items():
        row = [ENCODERS.get(key, key), percent(result["knn"]["accuracy"])]
        few = {draw["labels_per_class"]: draw for draw in result["few_labels"]}
        row += [f"{percent(few[n]['mean'])} ± {100 * few[n]['std']:.1f}" if n in few else "-" for n in labels]
        if best["linear"] is not None:
            row.append("-" if result["linear"] is None else percent(result["linear"]["accuracy"]))
        size = whole(result["feature_size"])
        table.append([*row, f"{result['statistics']['rank_me']:.1f} of {size}"])
    return table


def comparisons(facts: Facts) -> list[str]:
    """What training brought, in points of the headline accuracy; said as plainly where it brought nothing."""
    sentences = []
    for key in ("untrained", "start", "raw_pixels"):
        if key in facts["results"]:
            knn = facts["results"]["trained"]["knn"]
            gain = 100 * (knn["accuracy"] - facts["results"][key]["knn"]["accuracy"])
            than = f"{ENCODERS[key]}, by {knn['neighbours']}-NN"
            sentences.append(
                f"{gain:.1f} points better than {than}."
                if gain >= 0.05
                else f"**Not better than {than}** ({gain:+.1f} points)."
            )
    trained = facts["results"].get("trained")
    if trained is not None and "poolings" in trained:
        token, mean = (percent(trained["poolings"][name]) for name in ("cls", "mean"))
        sentences.append(
            f"{trained['knn']['neighbours']}-NN by the class token {token}, by the mean of all tokens {mean}."
        )
    return sentences


def monitor_table(facts: Facts) -> list[list[str]]:
    """Rows (what, first, last) of the monitor's measurements; [] where there are fewer than two."""
    history = facts["monitor"]["history"]
    if len(history) < 2:
        return []
    first, last = history[0], history[-1]
    heading = ["", f"step {whole(first['step'])}", f"step {whole(last['step'])}"]
    return [heading] + [
        [words, *(_number(record[key]) for record in (first, last))]
        for key, words in MONITORED.items()
        if key in first and key in last
    ]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def command(facts: Facts) -> str:
    """The line that starts such a run."""
    overrides = facts["recipe"]["overrides"]
    # Another machine may choose other values, which would lead to other weights.
    chosen = [
        f"{key}={_yaml(choice['value'])}"
        for key, choice in facts["training"].get("choices", {}).items()
        if key in ("training.precision", "training.batch_size")
    ]
    return shlex.join(["hf-ssl", "pretrain", facts["recipe"]["name"], *overrides, *chosen])


def choices(facts: Facts) -> list[str]:
    """Return the choices of the run for its machine, one line with the reason for each."""
    return [
        code(f"{key}={choice['value']}") + f": {choice['reason']}"
        for key, choice in facts["training"].get("choices", {}).items()
        if not key.startswith("monitor.")
    ]


def check_command(facts: Facts) -> str:
    """The line that measures the encoder again, by the same protocol on the same images; "" for one that was
    not measured.
    """
    images, differences = facts["evaluation"], facts["recipe"]["differences"]
    if images is None:
        return ""
    if images["hub_id"] is None:  # "./" says that it is no data set on the Hub
        where = {"data.path": images["name"] if images["name"] == "digits" else f"./{images['name']}"}
    else:  # as they were that day, whatever the branch holds now
        where = {"data.path": images["hub_id"], "data.revision": images["revision"]}
    told = ["data.channels", "data.max_broken_fraction"]
    if "evaluation.path" not in differences:  # else these say where training found its images
        told += ["data.name", "data.image_column", "data.label_column"]
    how = {
        key: value
        for key, value in differences.items()
        if key in told
        or (key.startswith("evaluation.") and key not in ("evaluation.path", "evaluation.results_dir"))
    }
    precision = facts["results"]["trained"].get("precision")
    if precision is not None:  # "auto" may choose another precision on another machine
        how["evaluation.precision"] = precision
    overrides = [f"{key}={_yaml(value)}" for key, value in (where | how).items()]
    return shlex.join(["hf-ssl", "evaluate", facts["name"], *overrides])


def _yaml(value: Any) -> str:
    """A value for the command line, whose values are YAML; JSON is YAML too."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _NOT_STRINGS
    return value if plain else json.dumps(value, ensure_ascii=False)


def usage(facts: Facts) -> str:
    """Python that turns a photo into features, without hf_ssl."""
    backbone = facts["backbone"]
    opened = 'ImageOps.exif_transpose(Image.open("photo.jpg"))'
    if backbone["channels"] == 1:
        opened += '.convert("L")'
    return "\n".join(
        [
            "import torch",
            "from PIL import Image, ImageOps",
            "from transformers import AutoImageProcessor, AutoModel",
            "",
            f"repo = {literal(facts['name'])}  # on the Hub, or a folder that holds these files",
            "processor = AutoImageProcessor.from_pretrained(repo)",
            f"encoder = AutoModel.from_pretrained(repo).eval()  # {backbone['class_name']}",
            f"image = {opened}  # turned as training did",
            "with torch.inference_mode():",
            '    outputs = encoder(**processor(image, return_tensors="pt"))',
            f"features = {FEATURES[backbone['pooling']]}  # (1, {backbone['feature_size']})",
        ]
    )


def limitations(facts: Facts) -> list[str]:
    """What the numbers above do not say, each from a fact."""
    data, training, monitor = facts["data"], facts["training"], facts["monitor"]
    evaluation, channels = facts["evaluation"], facts["backbone"]["channels"]
    said = []
    if monitor["alarm"] is not None:
        said.append(f"**The collapse alarm was raised**: {monitor['alarm']}.")
    said.append(f"One run with seed {training['seed']}: the spread over seeds is not known.")
    if evaluation is None:
        said.append(f"Nothing was measured after training: {facts['unmeasured']}.")
    else:
        said.append(f"Measured on {evaluation['name']} alone; on other images it may do better or worse.")
        said.append(_selection(facts, evaluation["test_split"]))
        if any(result["few_labels"] for result in facts["results"].values()):
            said.append(
                "The spread with few labels is over draws of the labelled images, not over trainings."
            )
        broken = evaluation["broken"]
        if broken:
            said.append(f"{whole(broken)} labelled images could not be read and were left out.")
    if data["broken"]:
        said.append(f"{whole(data['broken'])} training images could not be read and were skipped.")
    said.append(
        f"Licence of the training data: {data['license']}."
        if data["license"]
        else f"The licence of {data['name']} is not recorded here: check that it allows your use."
    )
    if channels == 3:
        said.append(
            "Training laid transparent photos over white. The image processor does the same from "
            "transformers 5.21 on; older releases drop the transparency."
        )
    elif channels == 1:
        said.append('The encoder takes one channel: open photos with `image.convert("L")`, as above.')
    else:
        said.append(
            f'The encoder takes arrays of {channels} channels; pass `input_data_format="channels_first"`.'
        )
    said.append(
        "Images with 16 bits a channel, if there were any, were scaled to 8 bits by the loader; the image "
        "processor does not do that."
    )
    return [*said, *facts.get("notes", [])]


def _selection(facts: Facts, split: str) -> str:
    """How much the test split had a say in what is published."""
    chosen_by, looked_at = facts["training"]["selection"], facts["monitor"]["test_images"]
    if chosen_by is not None:
        return f"**The checkpoint was chosen by {chosen_by}**: results on {split} are flattered if it enters."
    rest = "the weights are the last ones, and the probe's learning rate was chosen on training images."
    if looked_at:
        return (
            f"The monitor looked at {whole(looked_at)} labelled images of {split} while it trained and chose "
            f"nothing: {rest}"
        )
    return f"Nothing was chosen on {split}: {rest}"
