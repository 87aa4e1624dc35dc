# SPDX-License-Identifier: Apache-2.0
"""Loads and checks a recipe.

The sections `data`, `views`, `evaluation` and `publish` are dataclasses. `training` contains arguments of
`SSLTrainingArguments`. `method` and `backbone` contain fields of the transformers configs that `method.name`
and `backbone.model_type` select.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ssl.data.config import DataConfig
from hf_ssl.errors import UserError, check_name
from hf_ssl.evaluation.config import EvaluationConfig
from hf_ssl.methods import METHODS
from hf_ssl.recipe.backbone import (
    backbone_class,
    check_encoder,
    fitted_backbone,
    pretrained_backbone,
    pretrained_config,
    pretrained_views,
)
from hf_ssl.recipe.publish import PublishConfig
from hf_ssl.recipe.source import SECTIONS, apply_overrides, find_recipe, is_overridden, read_yaml
from hf_ssl.resources import resource
from hf_ssl.sections import MISSING, convert_values, default_values, to_dataclass, transformers_config
from hf_ssl.views.preset import ViewPreset

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from hf_ssl.modeling.base import SSLPreTrainedModel
    from hf_ssl.modeling.configuration import SSLConfig
    from hf_ssl.trainer.arguments import SSLTrainingArguments

# Arguments of transformers that need another way on the command line.
REPLACED = {
    "per_device_train_batch_size": "set training.batch_size",
    "optim": "set training.optimizer",
    "eval_steps": "set training.monitor_steps",
    "resume_from_checkpoint": "the same command resumes the run in training.output_dir",
}
# Arguments of transformers with the same meaning as keys of the section `publish`, which stores the values.
PUBLISH_KEYS = {"hub_model_id": "repo_id", "hub_private_repo": "private"}


@dataclass
class Recipe:
    """A checked recipe.

    `method`, `backbone` and `training` contain only the values that were set. The other sections contain all
    fields.

    Attributes:
        name: name of a recipe of hf_ssl ("smoke/simclr"), or the file name without its extension.
        path: path of the file.
        method: `name` and fields of the config of that method.
        backbone: `model_type` and fields of that transformers config, or `init_from`, a trained encoder. If
            the config has `num_channels` and `image_size`, they follow from `data.channels` and the views.
            `backbone.init_from` on the command line replaces all keys of this section in the file.
        training: arguments of `SSLTrainingArguments`, which always include `output_dir`.
        overrides: the overrides `section.key=value` from the command line.
    """

    name: str
    path: Path
    method: dict[str, Any]
    backbone: dict[str, Any]
    data: DataConfig
    views: ViewPreset
    training: dict[str, Any]
    evaluation: EvaluationConfig
    publish: PublishConfig
    overrides: list[str] = field(default_factory=list)

    @cached_property
    def config_class(self) -> type["SSLConfig"]:
        """Config class of the method."""
        return METHODS[self.method["name"]].config_class()

    @cached_property
    def model_class(self) -> type["SSLPreTrainedModel"]:
        """Model class of the method."""
        return METHODS[self.method["name"]].model_class()

    @property
    def init_from(self) -> str | None:
        """Folder or Hub id of the encoder that training starts from; None for random weights."""
        return self.backbone.get("init_from")

    @property
    def output_dir(self) -> Path:
        """Output folder of the run."""
        return Path(self.training["output_dir"])

    def is_overridden(self, key: str) -> bool:
        """Return whether the user set `section.key` on the command line, not in the recipe's file."""
        return is_overridden(self.overrides, key)

    def is_set(self, key: str) -> bool:
        """Return whether `section.key` has a value on the command line or in the recipe's file."""
        section, _, name = key.partition(".")
        return self.is_overridden(key) or name in read_yaml(self.path)[section]

    def backbone_config(self) -> "PreTrainedConfig":
        """Return the config of the encoder.

        Raises:
            UserError: the section `backbone` contains a mistake.
        """
        if self.init_from is not None:
            return pretrained_config(self.init_from, self.views)
        values = {key: value for key, value in self.backbone.items() if key != "model_type"}
        return transformers_config(backbone_class(self.backbone["model_type"]), values, "backbone")

    def config(self) -> "SSLConfig":
        """Return the config of the method, which contains the config of the encoder and the views.

        Raises:
            UserError: the section `method` or `backbone` contains a mistake.
        """
        values = {key: value for key, value in self.method.items() if key != "name"}
        parts: dict[str, Any] = {"backbone_config": self.backbone_config(), "views": self.views.to_dict()}
        if self.model_class.takes_image_columns:
            parts["further_image_columns"] = dict(self.data.further_image_columns)
        return transformers_config(self.config_class, values, "method", **parts)

    def training_arguments(self) -> "SSLTrainingArguments":
        """Return the training arguments for the current process.

        Raises:
            UserError: values contradict each other.
        """
        from hf_ssl.trainer.arguments import SSLTrainingArguments

        named = {argument: getattr(self.publish, key) for argument, key in PUBLISH_KEYS.items()}
        return SSLTrainingArguments(**self.training, **named)

    def to_dict(self) -> dict[str, Any]:
        """Return name and sections as plain data for JSON and YAML, without the Hub token."""
        plain: dict[str, Any] = {"name": self.name}
        for section in SECTIONS:
            value: Any = getattr(self, section)
            plain[section] = plain_data(value if isinstance(value, dict) else dataclasses.asdict(value))
        plain["training"].pop("hub_token", None)
        return plain

    def differences(self) -> dict[str, Any]:
        """Return `{"section.key": value}` for the values that differ from their defaults.

        The result omits keys without a default: the name of the method, the model type of the encoder, the
        path of the data and the output folder.
        """
        from hf_ssl.trainer.arguments import DEFAULT_BATCH_SIZE, SSLTrainingArguments

        defaults = {
            "method": default_values(self.config_class),
            "backbone": default_values(backbone_class(self.backbone["model_type"])) | {"init_from": None},
            "data": default_values(DataConfig),
            "views": default_values(ViewPreset),
            "training": default_values(SSLTrainingArguments) | {"batch_size": DEFAULT_BATCH_SIZE},
            "evaluation": default_values(EvaluationConfig),
            "publish": default_values(PublishConfig),
        }
        identity = {"method.name", "backbone.model_type", "data.path", "training.output_dir"}
        plain = self.to_dict()
        found: dict[str, Any] = {}
        for section, default in defaults.items():
            found |= _differing(plain[section], plain_data(default), section)
        return {key: value for key, value in found.items() if key not in identity}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return a checked recipe from a file and overrides.

    Args:
        name_or_path: the name of a recipe of hf_ssl, or the path of a YAML file (.yaml or .yml).
        overrides: `section.key=value` with a value in YAML. `section={key: value}` replaces a whole section.

    Raises:
        UserError: the recipe cannot be found or read, a key is unknown or missing, a value has a wrong type,
            or values contradict each other.
    """
    name, path = find_recipe(str(name_or_path))
    plain = apply_overrides(_without_replaced_backbone(read_yaml(path), overrides), overrides)
    if plain["backbone"].get("init_from", MISSING) is None:
        del plain["backbone"]["init_from"]  # null: random weights
    for section, choice in (("method", "name"), ("backbone", "model_type")):
        if choice not in plain[section] and "init_from" not in plain[section]:
            raise UserError(f"{section}.{choice}: expected a name in {path}, got nothing")
    check_name("method.name", plain["method"]["name"], METHODS, "a known method")
    for key in plain["training"].keys() & REPLACED.keys():
        raise UserError(
            f"training.{key}: expected no value in a recipe, got {plain['training'][key]}; {REPLACED[key]}"
        )
    from hf_ssl.trainer.arguments import SSLTrainingArguments  # loads torch, after the checks above
    from hf_ssl.trainer.transformers_arguments import check_metric

    merge_repo(plain["training"], plain["publish"])
    data = to_dataclass(DataConfig, plain["data"], "data")
    views = to_dataclass(ViewPreset, plain["views"], "views")
    data.check()
    views.check(data.channels)
    backbone = plain["backbone"]
    if "init_from" in backbone:
        backbone = pretrained_backbone(backbone, data)
        views = pretrained_views(backbone["init_from"], plain["views"], data)
    else:
        backbone = fitted_backbone(backbone, data, views)
    training = convert_values(SSLTrainingArguments, plain["training"], "training")
    if not training.get("output_dir", "default"):
        del training["output_dir"]  # null, or nothing after the sign
    elif "output_dir" in training:
        training["output_dir"] = os.path.expanduser(training["output_dir"])  # as transformers does
    recipe = Recipe(
        name=name,
        path=path,
        method=plain["method"],
        backbone=backbone,
        data=data,
        views=views,
        training={"output_dir": f"runs/{name}"} | training,
        evaluation=to_dataclass(EvaluationConfig, plain["evaluation"], "evaluation"),
        publish=to_dataclass(PublishConfig, plain["publish"], "publish"),
        overrides=list(overrides),
    )
    recipe.evaluation.check()
    args = recipe.training_arguments()
    check_method(
        recipe.method["name"],
        backbone_type=backbone["model_type"],
        views=views,
        streaming=data.streaming,
        image_columns=data.further_image_columns,
    )
    check_encoder(recipe.backbone_config(), data, views, recipe.evaluation.patch_grid)
    config = recipe.config()
    recipe.model_class.check_streaming(data.streaming, config)
    recipe.model_class.check_batch_size(args.batch_size, config)
    if "dataloader_num_workers" in recipe.training:  # OmegaConf makes it a text, because `auto` is one
        recipe.training["dataloader_num_workers"] = args.dataloader_num_workers
    check_metric(args.metric_for_best_model)
    return recipe


def _without_replaced_backbone(
    plain: dict[str, dict[str, Any]], overrides: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the sections of a recipe file, with an empty `backbone` if the overrides set `init_from`."""
    own = [text for text in overrides if text.partition("=")[0].partition(".")[0] == "backbone"]
    starts = own and apply_overrides({}, own)["backbone"].get("init_from") is not None
    return plain | {"backbone": {}} if starts else plain


def check_method(
    name: str,
    *,
    backbone_type: str,
    views: ViewPreset,
    streaming: bool,
    image_columns: Mapping[str, str],
) -> None:
    """Check that a method can be trained with these settings.

    Args:
        name: key of the method in `METHODS`.
        backbone_type: model type of the encoder.
        views: the augmentation settings.
        streaming: whether the data are a stream.
        image_columns: further image columns of the data.

    Raises:
        UserError: the method needs another encoder, another number of views, or map-style data; it uses no
            further image columns; or it has no text for the card.
    """
    try:
        resource("model_cards", "methods", f"{name}.md")
    except FileNotFoundError as error:
        raise UserError(
            f"method.name: expected model_cards/methods/{name}.md for the card, found none; write it as "
            "CONTRIBUTING.md explains"
        ) from error
    model = METHODS[name].model_class()
    model.check_backbone(backbone_type)
    model.check_views(views.count, views.local_count)
    model.check_streaming(streaming)
    model.check_image_columns(image_columns)


def merge_repo(training: dict[str, Any], publish: dict[str, Any]) -> None:
    """Move the keys about the repository from `training` to `publish`.

    Raises:
        UserError: both sections set a value, and the values differ.
    """
    for argument, key in PUBLISH_KEYS.items():
        if training.get(argument) is not None:
            value = training.pop(argument)
            if publish.setdefault(key, value) != value:
                raise UserError(
                    f"publish.{key}: expected the same value as training.{argument}={value}, got "
                    f"{publish[key]}; set only one of them"
                )


def read_sections(
    overrides: Sequence[str], given: dict[str, dict[str, Any]] | None = None
) -> tuple[DataConfig, EvaluationConfig]:
    """Return the sections `data` and `evaluation` from overrides and from given values, if any.

    Raises:
        UserError: a key is unknown or a value is wrong.
    """
    plain = apply_overrides(given or {}, overrides, ("data", "evaluation"))
    data = to_dataclass(DataConfig, plain["data"], "data")
    evaluation = to_dataclass(EvaluationConfig, plain["evaluation"], "evaluation")
    data.check()
    evaluation.check()
    return data, evaluation


def plain_data(value: Any) -> Any:
    """Return the value with lists instead of tuples and dicts instead of dataclasses, at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain_data(item) for key, item in value.items()}
    return [plain_data(item) for item in value] if isinstance(value, list | tuple) else value


def _differing(values: dict[str, Any], defaults: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `{"where.key": value}` for the values that differ from `defaults`, also inside groups."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(default, dict) and isinstance(value, dict) and value.keys() <= default.keys():
            found |= _differing(value, default, f"{where}.{key}")
        elif key not in defaults or value != default:
            if isinstance(value, dict) and default is None:
                value = {name: item for name, item in value.items() if item is not None}
            found[f"{where}.{key}"] = value
    return found
