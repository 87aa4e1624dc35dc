# SPDX-License-Identifier: Apache-2.0
"""Declares the facts of a run: the layout of `facts.json`, from which cards and results files are made.

To add a fact, declare it here with a `Default` and fill it in `hf_ssl.recording`. To show it, add a line to
`model_cards/card.md`. Results files copy the sections, and facts of older runs get the default.

Every key without a `Default` is required. None is allowed only where the type contains it. Before facts are
written, `hf_ssl.cards.privacy.public_facts` removes tokens and the paths of this machine.
"""

import copy
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from hf_ssl.errors import UserError
from hf_ssl.evaluation.results import EncoderResult


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
    # Earlier parts of a run that was resumed elsewhere, or with other versions or another precision:
    # {"last_step": 300, "environment": EnvironmentFacts, "precision": "bfloat16", "processes": 1}.
    earlier: Annotated[list[dict[str, Any]], Default([])]
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
    # of torch in each process, if the process computes on the CPU
    threads: Annotated[int | None, Default(None)]
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
