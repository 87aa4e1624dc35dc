# SPDX-License-Identifier: Apache-2.0
"""What a run recorded: the layout of `facts.json`, from which cards and results files are made.

`hf_ssl.run` fills a `Facts`; nothing else is ever printed on a card. Every key is required unless marked;
None is allowed only where the type says so, and then the card says that it is so. Whatever is written passes
`public_facts` first: no path of this machine, no token.
"""

from pathlib import Path
from types import UnionType
from typing import (
    Any,
    NotRequired,
    TypedDict,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from hf_ssl.errors import UserError
from hf_ssl.evaluation.results import EncoderResult
from hf_ssl.files import read_json, write_json
from hf_ssl.hub.privacy import public

FILE = "facts.json"


class MethodFacts(TypedDict):
    """The method: an entry of METHODS, and its hyperparameters."""

    name: str  # "simclr"
    title: str  # "SimCLR"
    summary: str
    paper: str  # "Chen et al., 2020, arXiv:2002.05709"
    config: dict[str, Any]  # the method's own fields: neither views nor backbone


class BackboneFacts(TypedDict):
    """The exported encoder."""

    class_name: str  # "ResNetModel"
    model_type: str  # "resnet"
    config: dict[str, Any]  # what the recipe sets
    parameters: int
    feature_size: int  # numbers in the features of one image
    image_size: int  # side in pixels of what the processor gives
    channels: int
    pooling: str  # "pooler", "cls" or "mean": see hf_ssl.evaluation.pooling_rule
    base_model: str | None  # Hub id of the encoder that training began with; None: random weights


class RecipeFacts(TypedDict):
    """The recipe as it was resolved."""

    name: str  # "smoke/simclr"
    sections: dict[str, Any]  # Recipe.to_dict()
    overrides: list[str]  # "section.key=value", from the command line
    differences: dict[str, Any]  # {"section.key": value}: what is not the default


class DataFacts(TypedDict):
    """The images that were trained on."""

    name: str  # Hub id, or the last part of a path
    hub_id: str | None  # None: local or built in
    config: str | None  # data.name
    split: str
    revision: str  # commit on the Hub, else a fingerprint of the data
    images: int | None  # None: a stream that does not say
    streaming: bool
    broken: int  # images that could not be read
    license: str | None  # None: not recorded


class TrainingFacts(TypedDict):
    """How it was trained."""

    steps: int
    epochs: float | None  # None: a stream that does not say how many images it has
    batch_size: int  # images in one optimiser step, all processes
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
    resumed: int  # how many times the run was taken up again
    # Settings chosen for the machine: {"training.batch_size": {"value": 32, "reason": "..."}}.
    choices: NotRequired[dict[str, dict[str, Any]]]
    selection: str | None  # the metric by which a checkpoint was chosen; None: the last weights


class MonitorFacts(TypedDict):
    """What was seen while it trained."""

    history: list[dict[str, Any]]  # {"step": .., "knn": .., "embedding_std": .., "rank_me": ..}, in order
    alarm: str | None  # the collapse alarm's sentence
    test_images: int | None  # labelled images of the test split that the monitor looked at; None: no labels


class EnvironmentFacts(TypedDict):
    """Software and hardware; `hf_ssl.hub.environment()` fills it."""

    python: str
    packages: dict[str, str]
    device: str  # "NVIDIA H200", or the processor's name
    devices: int
    cores: int
    memory_gib: float | None


class EvaluationFacts(TypedDict):
    """The labelled images that the encoder was measured on."""

    name: str
    hub_id: str | None
    config: str | None
    revision: str
    train_split: str
    test_split: str
    broken: int


class Facts(TypedDict):
    """Everything."""

    hf_ssl_version: str
    date: str  # ISO 8601, UTC
    name: str  # repo id where it is published, else the last part of the output folder
    repo_id: str | None
    title: str
    license: str | None  # of the weights, as the Hub names it
    tags: list[str]
    method: MethodFacts
    backbone: BackboneFacts
    recipe: RecipeFacts
    views: dict[str, Any]  # the preset
    data: DataFacts
    training: TrainingFacts
    monitor: MonitorFacts
    environment: EnvironmentFacts
    evaluation: EvaluationFacts | None  # None: the encoder was not measured
    unmeasured: str | None  # why not ("the data has no labels"); None: it was measured
    # by encoder: "trained", "untrained" or "start", "raw_pixels"; {} if not measured
    results: dict[str, EncoderResult]
    pictures: dict[str, str]  # {"views.png": what it shows}: files beside the card
    notes: NotRequired[list[str]]  # more sentences for the card's limitations


def check_facts(facts: Any) -> Facts:
    """`facts` as they are.

    Raises:
        UserError: one is missing, is None where it must be known, or is not a fact; the message names it.
    """
    _check(facts, Facts, "")
    if facts["evaluation"] is not None and "trained" not in facts["results"]:
        raise UserError(
            "fact results.trained is missing: facts.evaluation says that the encoder was measured."
        )
    if facts["evaluation"] is None and (facts["unmeasured"] is None or facts["results"]):
        raise UserError("fact evaluation is None: expected the reason in unmeasured, and no results.")
    return cast(Facts, facts)


def _check(value: Any, expected: Any, where: str) -> None:
    options = get_args(expected) if get_origin(expected) in (Union, UnionType) else (expected,)
    if value is None:
        if type(None) not in options and expected is not Any:
            raise UserError(f"fact {where} is None: it must be known before a card is written.")
        return
    for option in options:
        if is_typeddict(option):
            _check_keys(value, option, where)
        elif get_origin(option) is dict:
            for key, item in value.items():
                _check(item, get_args(option)[1], f"{where}.{key}")
        elif get_origin(option) is list:
            for number, item in enumerate(value):
                _check(item, get_args(option)[0], f"{where}[{number}]")


def _check_keys(value: Any, expected: Any, where: str) -> None:
    hints, prefix = get_type_hints(expected), f"{where}." if where else ""
    if not isinstance(value, dict):
        raise UserError(f"fact {where or 'facts'}: expected a dict, got {type(value).__name__}.")
    for key in value:
        if key not in hints:
            raise UserError(f"fact {prefix}{key} is unknown: expected one of {', '.join(hints)}.")
    for key, hint in hints.items():
        if key in value:
            _check(value[key], hint, f"{prefix}{key}")
        elif key in expected.__required_keys__:
            raise UserError(f"fact {prefix}{key} is missing: a card holds measured facts only.")


def public_facts(facts: Any) -> Facts:
    """A checked copy fit for strangers and for JSON: local paths become their last part, tokens go, and
    numbers that are not finite become None.

    Raises:
        UserError: as `check_facts`.
    """
    check_facts(facts)
    facts = public(facts)
    sections, differences = facts["recipe"]["sections"], facts["recipe"]["differences"]
    for section, source in (("data", facts["data"]), ("evaluation", facts["evaluation"])):
        # "photos/dogs" may be a Hub id or a folder: the run knows, the text does not.
        if source is not None and source["hub_id"] is None and sections.get(section, {}).get("path"):
            sections[section]["path"] = source["name"]
            if f"{section}.path" in differences:
                differences[f"{section}.path"] = source["name"]
    facts["recipe"]["overrides"] = [_public_override(text, sections) for text in facts["recipe"]["overrides"]]
    return cast(Facts, facts)


def _public_override(text: str, sections: dict[str, Any]) -> str:
    key, equals, _ = text.partition("=")
    section, _, field = key.partition(".")
    if field == "path" and section in sections:
        return f"{key}{equals}{sections[section]['path']}"
    return text


def write_facts(directory: str | Path, facts: Facts) -> None:
    """Write `facts.json`, whole or not at all. Raises UserError as `public_facts`, and for the disk."""
    write_json(Path(directory) / FILE, public_facts(facts))


def read_facts(directory: str | Path) -> Facts:
    """What `write_facts` wrote. Raises UserError if it is not there, is no JSON, or lacks a fact."""
    return check_facts(read_json(Path(directory) / FILE))
