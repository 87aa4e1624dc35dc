# SPDX-License-Identifier: Apache-2.0
"""Declares the facts of a run: the layout of `facts.json`, from which cards and results files are made.

To add a fact, declare it here with a `Default` and fill it in `hf_ssl.recording`. To show it, add a line to
`model_cards/card.md`. Results files copy the sections, and facts of older runs get the default.

Every key without a `Default` is required. None is allowed only where the type contains it. Before facts are
written, `public_facts` removes tokens and the paths of this machine.
"""

import copy
import hashlib
import json
import platform
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

import psutil
import yaml
from huggingface_hub.utils import WeakFileLock

from hf_ssl import __version__
from hf_ssl.cards.privacy import remove_private
from hf_ssl.data.location import DIGITS
from hf_ssl.errors import UserError
from hf_ssl.evaluation.results import EncoderResult, with_current_layout
from hf_ssl.files import read_json, write_json
from hf_ssl.names import with_current_keys
from hf_ssl.resources import usable_cores

FILE = "facts.json"


@dataclass(frozen=True)
class Default:
    """The value of a fact for runs of older versions, which did not record it."""

    value: Any


class MethodFacts(TypedDict):
    """The method: an entry of METHODS, and its hyperparameters."""

    name: str  # "simclr"
    title: str  # "SimCLR"
    summary: str
    paper: str  # "Chen et al., 2020, arXiv:2002.05709"
    config: dict[str, Any]  # the method's own fields, without views and backbone


class BackboneFacts(TypedDict):
    """The exported encoder."""

    class_name: str  # "ResNetModel"
    model_type: str  # "resnet"
    config: dict[str, Any]  # the values that the recipe sets
    parameters: int
    feature_size: int  # length of the feature vector of one image
    image_size: int  # side in pixels of the images from the processor
    channels: int
    pooling: str  # "pooler", "cls" or "mean": see hf_ssl.evaluation.pooling_rule
    base_model: str | None  # Hub id of the encoder at the start of training; None: random weights
    # The content of encoders.json (hf_ssl.modeling.encoder_parts); None: one encoder.
    parts: Annotated[dict[str, Any] | None, Default(None)]


class RecipeFacts(TypedDict):
    """The resolved recipe."""

    name: str  # "smoke/simclr"
    sections: dict[str, Any]  # Recipe.to_dict()
    overrides: list[str]  # "section.key=value", from the command line
    differences: dict[str, Any]  # {"section.key": value} of the values that are not the default


class DataFacts(TypedDict):
    """The training images."""

    name: str  # Hub id, or the last part of a path
    hub_id: str | None  # None: local or built in
    config: str | None  # data.name
    split: str
    revision: str  # commit on the Hub, else a fingerprint of the data
    images: int | None  # None: a stream of unknown length
    streaming: bool
    broken: int  # images that could not be read
    license: str | None  # None: not recorded
    # Further image columns, {name: kind}: {"depth": "gray"}.
    further_columns: Annotated[dict[str, str], Default({})]
    # The values that became black and white; None: the images have 8 bits per channel.
    value_range: Annotated[list[float] | None, Default(None)]
    # The lowest and the highest value of the inspected images; None: as above.
    found_values: Annotated[list[float] | None, Default(None)]


class TrainingFacts(TypedDict):
    """The training."""

    steps: int
    epochs: float | None  # None: a stream of unknown length
    batch_size: int  # images in one optimizer step, over all processes
    images_seen: int
    optimizer: str
    learning_rate: float  # the peak
    learning_rate_rule: str
    weight_decay: float
    precision: str  # "float32", "bfloat16"
    processes: int
    seed: int
    seconds: float  # of training, without evaluation
    images_per_second: float
    final_loss: float | None  # None: not finite
    resumed: int  # how many times the run was resumed
    # Settings chosen for the machine: {"training.batch_size": {"value": 32, "reason": "..."}}.
    choices: Annotated[dict[str, dict[str, Any]], Default({})]
    selection: str | None  # the metric that selected the checkpoint; None: the last weights
    # Highest memory of the process, on CUDA of the GPU. None: an older version did not record it.
    peak_memory_gib: Annotated[float | None, Default(None)]


class MonitorFacts(TypedDict):
    """The measurements during training."""

    history: list[dict[str, Any]]  # {"step": .., "knn": .., "embedding_std": .., "rank_me": ..}, in order
    alarm: str | None  # the message of the collapse alarm
    test_images: int | None  # labeled test images that the monitor used; None: no labels


class EnvironmentFacts(TypedDict):
    """Software and hardware; `hf_ssl.cards.environment()` fills it."""

    python: str
    packages: dict[str, str]
    device: str  # "NVIDIA H200", or the name of the processor
    devices: int
    cores: int  # that the process may run on
    memory_gib: float | None


class EvaluationFacts(TypedDict):
    """The labeled images of the evaluation."""

    name: str
    hub_id: str | None
    config: str | None
    revision: str
    train_split: str
    test_split: str
    broken: int
    # number of test images with the content of a training image; None: not known
    shared: Annotated[int | None, Default(None)]
    # number of test images whose class has no training image
    unknown_classes: Annotated[int, Default(0)]


class Facts(TypedDict):
    """All facts of a run."""

    hf_ssl_version: str
    date: str  # ISO 8601, UTC
    name: str  # id of the published repository, else the last part of the output folder
    repo_id: str | None
    title: str
    license: str | None  # of the weights, as the Hub names it
    tags: list[str]
    method: MethodFacts
    backbone: BackboneFacts
    recipe: RecipeFacts
    views: dict[str, Any]  # the fields of the preset
    data: DataFacts
    training: TrainingFacts
    monitor: MonitorFacts
    environment: EnvironmentFacts
    evaluation: EvaluationFacts | None  # None: the encoder was not evaluated
    unmeasured: str | None  # the reason ("the data has no labels"); None: the encoder was evaluated
    # by encoder: "trained", "untrained" or "start", "raw_pixels"; {} without evaluation
    results: dict[str, EncoderResult]
    pictures: dict[str, str]  # {"views.png": its caption}: files beside the card
    notes: Annotated[list[str], Default([])]  # further sentences for the card's limitations


def check_facts(facts: Any) -> Facts:
    """Return a copy of `facts` that contains the default of every fact that an older version did not record.

    Raises:
        UserError: a fact is missing, unknown, or None where its type excludes None. The message names it.
    """
    facts = _checked(facts, Facts, "facts")
    if facts["evaluation"] is not None and "trained" not in facts["results"]:
        raise UserError(
            "facts.results.trained: expected a result, because facts.evaluation contains the evaluated "
            "images, got none; run the training again"
        )
    if facts["evaluation"] is None and (facts["unmeasured"] is None or facts["results"]):
        raise UserError(
            "facts.evaluation: expected the evaluated images, or a reason in facts.unmeasured and empty "
            "facts.results, got None; run the training again"
        )
    return cast(Facts, facts)


def _checked(value: Any, expected: Any, path: str) -> Any:
    """Return `value` with defaults; raise UserError unless it has the layout of the type `expected`."""
    options = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    if value is None:
        if type(None) not in options and expected is not Any:
            raise UserError(f"{path}: expected a value, got None; run the training again")
        return None
    for option in options:
        if (is_typeddict(option) or get_origin(option) is dict) and not isinstance(value, dict):
            raise UserError(f"{path}: expected a dict, got {type(value).__name__}; run the training again")
        if is_typeddict(option):
            return _checked_section(value, option, path)
        if get_origin(option) is dict:
            item_type = get_args(option)[1]
            return {key: _checked(item, item_type, f"{path}.{key}") for key, item in value.items()}
        if get_origin(option) is list:
            item_type = get_args(option)[0]
            return [_checked(item, item_type, f"{path}[{number}]") for number, item in enumerate(value)]
    return value


def _checked_section(value: dict[str, Any], section: Any, path: str) -> dict[str, Any]:
    types, declared = get_type_hints(section), get_type_hints(section, include_extras=True)
    for key in value:
        if key not in types:
            raise UserError(f"{path}.{key}: expected one of {', '.join(types)}; remove the unknown fact")
    checked = {key: _checked(item, types[key], f"{path}.{key}") for key, item in value.items()}
    for key in types:
        if key in checked or key not in section.__required_keys__:
            continue
        if get_origin(declared[key]) is not Annotated:
            raise UserError(
                f"{path}.{key}: expected a recorded fact, got none; run the training again, or declare the "
                "fact with a Default"
            )
        checked[key] = copy.deepcopy(declared[key].__metadata__[0].value)
    return checked


def local_path(name: str) -> str:
    """Return `data.path` for the recorded name of data that are not on the Hub; "./" marks a local folder."""
    return name if name == DIGITS or name.startswith("./") else f"./{name}"


def public_facts(facts: Any) -> Facts:
    """Return a checked copy of `facts` for publication, as plain data for JSON.

    Local paths are replaced by their last part, tokens are removed, and numbers that are not finite become
    None.

    Raises:
        UserError: the same errors as `check_facts`.
    """
    facts = remove_private(check_facts(facts))
    sections, differences = facts["recipe"]["sections"], facts["recipe"]["differences"]
    for section, source in (("data", facts["data"]), ("evaluation", facts["evaluation"])):
        # "photos/dogs" may be a Hub id or a folder. Only hub_id distinguishes them.
        if source is not None and source["hub_id"] is None and sections.get(section, {}).get("path"):
            sections[section]["path"] = path = local_path(source["name"])
            if f"{section}.path" in differences:
                differences[f"{section}.path"] = path
    facts["recipe"]["overrides"] = [_public_override(text, sections) for text in facts["recipe"]["overrides"]]
    return cast(Facts, facts)


def _public_override(text: str, sections: dict[str, Any]) -> str:
    """Return an override of the recipe, with a path replaced by the public one in `sections`."""
    key, equals, value = text.partition("=")
    section, dot, field = key.partition(".")
    if field == "path" and section in sections:
        return f"{key}{equals}{sections[section]['path']}"
    whole = yaml.safe_load(value) if not dot and section in sections else None
    if isinstance(whole, dict) and "path" in whole:  # section={key: value}; JSON is YAML
        return f"{key}={json.dumps(whole | {'path': sections[section]['path']}, ensure_ascii=False)}"
    return text


def write_facts(directory: str | Path, facts: Facts) -> None:
    """Write `facts.json` completely or not at all.

    Raises:
        UserError: the same errors as `public_facts`, or the file cannot be written.
    """
    write_json(Path(directory) / FILE, public_facts(facts))


def read_facts(directory: str | Path) -> Facts:
    """Return the facts in `facts.json`, also those of an older version.

    Raises:
        UserError: the file is missing, is not JSON, or lacks a fact.
    """
    return check_facts(_current(read_json(Path(directory) / FILE)))


def read_entries(path: Path) -> list[dict[str, Any]]:
    """Return the entries (`result_entry`) of a results file or of a facts file, also of an older version.

    Raises:
        UserError: the file is neither of them.
    """
    stored = read_json(path)
    if isinstance(stored, dict):
        return [result_entry(check_facts(_current(stored)))]
    entries = [entry for entry in stored if isinstance(entry, dict)] if isinstance(stored, list) else []
    if not entries or any({"recipe", "evaluation", "results"} - entry.keys() for entry in entries):
        raise UserError(f"{path}: expected a results file or {FILE} of hf-ssl pretrain, got other data")
    return [_current(entry) for entry in entries]


def _current(record: Any) -> Any:
    """Return facts, or an entry of a results file, with the current names and layouts."""
    record = with_current_keys(record)
    if isinstance(record, dict) and isinstance(record.get("results"), dict):
        results = {name: with_current_layout(result) for name, result in record["results"].items()}
        return record | {"results": results}
    return record


PACKAGES = (
    "torch torchvision transformers datasets accelerate huggingface_hub safetensors numpy pillow timm"
).split()


def environment(device: Any = "cpu", processes: int = 1) -> EnvironmentFacts:
    """Return the software and hardware of a run.

    Args:
        device: the device of the model (`torch.device` or its name).
        processes: number of processes, each with its own device.
    """
    import torch  # imported here because cards need no torch

    device = torch.device(device)
    return EnvironmentFacts(
        python=platform.python_version(),
        packages={"hf_ssl": __version__}
        | {name: found for name in PACKAGES if (found := _version(name)) is not None},
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        devices=processes,
        cores=usable_cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """Return a name such as "AMD EPYC 9654 96-Core Processor", or the architecture if the name is unknown."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


_BACKBONE_CARD_ONLY = ("model_type", "config", "channels", "pooling", "base_model", "parts")


def append_result(results_dir: str | Path, recipe_name: str, facts: Facts) -> Path:
    """Append a run to the results file of its recipe and return the file.

    The file is complete at every moment. Two runs that end at the same time are both appended.

    Args:
        results_dir: folder with one file per recipe.
        recipe_name: "simclr_resnet18_cifar10", or "smoke/simclr".
        facts: the facts of the run. This function removes private information from them.

    Raises:
        UserError: the file cannot be written, or it exists and is not a list of results. It stays unchanged.
    """
    path = Path(results_dir) / f"{recipe_name}.json"
    entry = result_entry(public_facts(facts))
    # The lock file is in the temporary folder, so that the results folder contains only results.
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with WeakFileLock(Path(tempfile.gettempdir()) / f"hf_ssl-{name}.lock"):
        entries = read_json(path) if path.exists() else []
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path.name}: expected a list of results, got other data; move the file away")
        write_json(path, [*map(_current, entries), entry])
    return path


def result_entry(facts: Facts) -> dict[str, Any]:
    """Return the entry of a run: its settings, its environment and its results.

    Sections are copied as a whole, so that a new fact needs no change here.
    """
    return {
        "date": facts["date"],
        "hf_ssl_version": facts["hf_ssl_version"],
        "recipe": facts["recipe"]["name"],
        "overrides": facts["recipe"]["overrides"],
        "seed": facts["training"]["seed"],
        "method": facts["method"]["name"],
        "backbone": {
            key: value for key, value in facts["backbone"].items() if key not in _BACKBONE_CARD_ONLY
        },
        "data": facts["data"],
        "training": facts["training"],
        "collapse": facts["monitor"]["alarm"],
        "environment": facts["environment"],
        "evaluation": facts["evaluation"],
        "results": facts["results"],
    }


_OF_A_CALL = ("seconds", "images_per_second", "resumed", "choices", "peak_memory_gib")
"""Facts of a training that change if a finished run is started again."""


def facts_of_weights(training: Any) -> dict[str, Any]:
    """Return the facts of a training that determine its weights."""
    return {key: value for key, value in training.items() if key not in _OF_A_CALL}
