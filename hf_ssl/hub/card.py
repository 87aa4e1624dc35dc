# SPDX-License-Identifier: Apache-2.0
"""The model card: README.md with its metadata, and `.eval_results/`, from recorded facts and nothing else."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound, UndefinedError

from hf_ssl.errors import UserError
from hf_ssl.files import disk_errors, write_text
from hf_ssl.hub import wording
from hf_ssl.hub.facts import Facts, public_facts
from hf_ssl.resources import resource

CARD = "README.md"
EVALUATION_RESULTS = ".eval_results/hf_ssl.yaml"
TAGS = ("self-supervised-learning", "hf_ssl")


def write_card(directory: str | Path, facts: Facts) -> None:
    """Write the card of the encoder in `directory`, and its results for the Hub's leaderboards.

    Prose and layout lie in `model_cards/card.md` and `model_cards/methods/<method>.md`; every number and name
    comes from `facts`, made fit for strangers first.

    Args:
        directory: the repo: what `export_encoder` wrote, and the pictures that the facts name.
        facts: see `hf_ssl.hub.facts`.

    Raises:
        UserError: a fact, a picture or the method's prose is missing (named in the message), or the disk does
            not take the files; an earlier card is left as it is then.
    """
    directory, facts = Path(directory), public_facts(facts)
    for name in facts["pictures"]:
        if not (directory / name).is_file():
            raise UserError(f"fact pictures.{name}: expected that file in {directory.name}, it is not there.")
    texts = card_texts(facts, has_pretraining=(directory / "pretraining" / "config.json").is_file())
    if EVALUATION_RESULTS not in texts:
        with disk_errors(f"{EVALUATION_RESULTS} to {directory.name}"):
            (directory / EVALUATION_RESULTS).unlink(missing_ok=True)  # of an earlier card
    for name, text in texts.items():
        write_text(directory / name, text)


def card_texts(facts: Facts, *, has_pretraining: bool) -> dict[str, str]:
    """What `write_card` writes, by file, for facts that are fit for strangers; the card itself comes last."""
    texts = {}
    entries = evaluation_entries(facts)
    if entries:
        texts[EVALUATION_RESULTS] = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return texts | {CARD: render_card(facts, has_pretraining=has_pretraining)}


def render_card(facts: Facts, *, has_pretraining: bool) -> str:
    """The text of README.md. has_pretraining: whether the whole method model lies in `pretraining/`."""
    templates = Environment(
        loader=FileSystemLoader(resource("model_cards")),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "percent": wording.percent,
        "whole": wording.whole,
        "duration": wording.duration,
        "code": wording.code,
        "literal": wording.literal,
    }
    try:
        return templates.get_template("card.md").render(
            metadata=metadata(facts).to_yaml(),
            usage=wording.usage(facts),
            results=wording.results_table(facts),
            comparisons=wording.comparisons(facts),
            choices=wording.choices(facts),
            monitor=wording.monitor_table(facts),
            command=wording.command(facts),
            check_command=wording.check_command(facts),
            recipe_yaml=yaml_dump(facts["recipe"]["sections"], sort_keys=False).strip(),
            limitations=wording.limitations(facts),
            has_pretraining=has_pretraining,
            facts=facts,
        )
    except TemplateNotFound as error:
        raise UserError(f"expected the card's text in model_cards/{error.name}, it is not there.") from error
    except UndefinedError as error:
        raise UserError(f"a fact that the card needs is missing: {error.message}.") from error


def metadata(facts: Facts) -> ModelCardData:
    """What the Hub reads: library, task, tags, data, base model, and the results as `model-index`."""
    tags = list(dict.fromkeys([*TAGS, facts["method"]["name"], *facts["tags"]]))
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "license": facts["license"],
        "tags": tags,
        "datasets": None if facts["data"]["hub_id"] is None else [facts["data"]["hub_id"]],
        "base_model": facts["backbone"]["base_model"],
    }
    results = model_index(facts)
    if results:
        fields |= {"model_name": facts["name"], "eval_results": results}
    return ModelCardData(**fields)


def model_index(facts: Facts) -> list[EvalResult]:
    """The trained encoder's results, each with its protocol, in the form that a README carries."""
    evaluation = facts["evaluation"]
    if evaluation is None:
        return []
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification by frozen features",
            dataset_type=evaluation["hub_id"] or evaluation["name"],
            dataset_name=evaluation["name"],
            dataset_config=evaluation["config"],
            dataset_split=evaluation["test_split"],
            dataset_revision=evaluation["revision"],
            metric_type="accuracy",
            metric_name=measurement.name,
            metric_value=measurement.value,
            metric_args={"protocol": measurement.protocol},
        )
        for measurement in wording.measurements(facts["results"]["trained"])
    ]


def evaluation_entries(facts: Facts) -> list[EvalResultEntry]:
    """The same for `.eval_results/`, which knows data sets of the Hub only; in percent, as is usual there."""
    evaluation = facts["evaluation"]
    if evaluation is None or evaluation["hub_id"] is None:
        return []
    repo_id = facts["repo_id"]
    source = (
        {}
        if repo_id is None
        else {"source_url": f"https://huggingface.co/{repo_id}", "source_name": "Model card"}
    )
    return [
        EvalResultEntry(
            dataset_id=evaluation["hub_id"],
            dataset_revision=evaluation["revision"],
            task_id=measurement.key,
            value=round(100 * measurement.value, 2),
            date=facts["date"],
            notes=measurement.protocol,
            **source,
        )
        for measurement in wording.measurements(facts["results"]["trained"])
    ]
