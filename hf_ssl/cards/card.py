# SPDX-License-Identifier: Apache-2.0
"""Writes the model card (README.md with its metadata) and `.eval_results/` from recorded facts alone."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, constants, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateNotFound, UndefinedError

from hf_ssl.cards import text
from hf_ssl.cards.facts import Facts
from hf_ssl.cards.facts_files import FILE as FACTS
from hf_ssl.cards.facts_files import read_facts
from hf_ssl.cards.privacy import public_facts
from hf_ssl.cards.result_files import RESULTS, suite_results
from hf_ssl.cards.suite_text import Summary, table
from hf_ssl.cards.usage import usage
from hf_ssl.errors import UserError, counted
from hf_ssl.evaluation.plots import CAPTIONS
from hf_ssl.files import METHOD_MODEL, disk_errors_as_user_errors, write_text
from hf_ssl.resources import resource

CARD = "README.md"
EVALUATION_RESULTS = ".eval_results/hf_ssl.yaml"
_PICTURES = (".png", ".jpg", ".webp", ".svg")
_SUITES = re.compile(r"^## Results on other data sets\n.*?(?=^## )", re.MULTILINE | re.DOTALL)
TAGS = ("self-supervised-learning", "hf_ssl")


def write_card(directory: str | Path, facts: Facts) -> None:
    """Write the card of the encoder in `directory`, and its results for the leaderboards of the Hub.

    The layout is in `model_cards/card.md`, the text about the method in `model_cards/methods/<method>.md`.
    All numbers and names come from `facts`, without private information, and from the results of suites.

    Args:
        directory: folder with the output of `export_encoder` and the pictures that `facts` names. The card
            contains the table of each suite in its folder `results/`.
        facts: the facts of the run, see `hf_ssl.cards.facts`.

    Raises:
        UserError: a fact, a picture or the text of the method is missing, or a file cannot be written. An
            earlier card then stays unchanged.
    """
    directory, facts = Path(directory), public_facts(facts)
    picture_files(directory, facts)
    has_pretraining = (directory / METHOD_MODEL).is_dir()
    texts = card_texts(facts, has_pretraining=has_pretraining, suites=suite_results(directory, facts))
    if EVALUATION_RESULTS not in texts:
        with disk_errors_as_user_errors(f"{EVALUATION_RESULTS} to {directory.name}"):
            (directory / EVALUATION_RESULTS).unlink(missing_ok=True)  # the file of an earlier card
    for name, content in texts.items():
        write_text(directory / name, content)


def update_card(directory: Path, output: Path) -> None:
    """Write the card of a finished run again if new results of a suite belong to it, and print a message.

    A card that a user edited stays unchanged. The function does nothing for an encoder that is not a run.

    Args:
        directory: folder of the evaluated encoder.
        output: folder of the results. They belong to the card if it is in the folder `results/` of the run.

    Raises:
        UserError: see `write_card`.
    """
    card, results = directory / CARD, (directory / RESULTS).resolve()
    if not ((directory / FACTS).is_file() and card.is_file() and output.resolve().is_relative_to(results)):
        return
    facts = read_facts(directory)
    has_pretraining = (directory / METHOD_MODEL).is_dir()
    if is_generated(card.read_text(encoding="utf-8"), facts, has_pretraining):
        write_card(directory, facts)
        print(f"{card} shows these results")
    else:
        print(f"{card} does not show these results, because it was edited")


def is_generated(card: str, facts: Facts, has_pretraining: bool) -> bool:
    """Return whether a card equals the text of the facts. The results of suites are not compared."""
    own = render_card(facts, has_pretraining=has_pretraining)
    return _SUITES.sub("", card) == own


def picture_files(directory: Path, facts: Facts) -> dict[str, Path]:
    """Return the pictures of a run by their names.

    Raises:
        UserError: a picture is missing, outside of the folder, or of another type.
    """
    files = {name: directory / name for name in facts["pictures"]}
    for name, file in files.items():
        if Path(name).name != name or file.suffix not in _PICTURES or not file.is_file():
            raise UserError(
                f"facts.pictures.{name}: expected a picture in {directory}, found none; restore it"
            )
    return files


def card_texts(facts: Facts, *, has_pretraining: bool, suites: Sequence[Summary] = ()) -> dict[str, str]:
    """Return the content of each file that `write_card` writes; the card is the last one.

    Args:
        facts: public facts.
        has_pretraining: whether the folder contains the method model in `pretraining/`.
        suites: the results of suites.
    """
    texts = {}
    entries = evaluation_entries(facts)
    if entries:
        texts[EVALUATION_RESULTS] = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return texts | {CARD: render_card(facts, has_pretraining=has_pretraining, suites=suites)}


def render_card(facts: Facts, *, has_pretraining: bool, suites: Sequence[Summary] = ()) -> str:
    """Return the text of README.md; the arguments are those of `card_texts`."""
    return render(
        "card.md",
        metadata=metadata(facts).to_yaml(),
        usage=usage(facts),
        suites=[(suite.title, table(suite)) for suite in suites],
        main=text.main_number(facts),
        results=text.results_table(facts["results"]),
        grids=text.grids(facts),
        result_pictures=list(CAPTIONS),
        comparisons=text.comparisons(facts),
        choices=text.choices(facts),
        monitor=text.monitor_table(facts),
        command=text.command(facts),
        check_command=text.check_command(facts),
        recipe_yaml=yaml_dump(facts["recipe"]["sections"], sort_keys=False).strip(),
        limitations=text.limitations(facts),
        has_pretraining=has_pretraining,
        facts=facts,
    )


def render(template: str, **values: Any) -> str:
    """Return the text of a template of `model_cards/`.

    Raises:
        UserError: the template or a text that it includes is missing, or uses an unknown fact.
    """
    templates = Environment(
        loader=FileSystemLoader(resource("model_cards")),
        undefined=StrictUndefined,
        autoescape=False,  # Markdown, not HTML
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for filter_function in (
        text.percent,
        text.whole,
        text.duration,
        text.code,
        text.literal,
        text.plain,
        counted,
    ):
        templates.filters[filter_function.__name__] = filter_function
    try:
        return templates.get_template(template).render(**values)
    except TemplateNotFound as error:
        raise UserError(
            f"facts.method.name: expected model_cards/{error.name}, found none; write it"
        ) from error
    except UndefinedError as error:
        raise UserError(
            f"model_cards/{template}: expected declared facts only, got {error.message}; declare it in "
            "hf_ssl/cards/facts.py"
        ) from error


def metadata(facts: Facts) -> ModelCardData:
    """Return the metadata for the Hub: library, task, tags, data, base model, and results (`model-index`)."""
    results = model_index(facts)
    return encoder_metadata(
        facts["method"]["name"],
        facts["tags"],
        license=facts["license"],
        datasets=None if facts["data"]["hub_id"] is None else [facts["data"]["hub_id"]],
        base_model=facts["backbone"]["base_model"],
        model_name=facts["name"] if results else None,
        eval_results=results or None,
    )


def encoder_metadata(method: str, tags: Iterable[str], **further: Any) -> ModelCardData:
    """Return the metadata of every encoder of a method; `further` are arguments of `ModelCardData`."""
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        tags=[*TAGS, method, *tags],  # ModelCardData removes duplicates
        **further,
    )


def model_index(facts: Facts) -> list[EvalResult]:
    """Return the results of the trained encoder with their protocols, for the metadata of README.md."""
    evaluation = facts["evaluation"]
    if evaluation is None:
        return []
    return [
        EvalResult(
            task_type="image-classification",
            task_name="Image classification with frozen features",
            dataset_type=evaluation["hub_id"] or evaluation["name"],
            dataset_name=evaluation["name"],
            dataset_config=evaluation["config"],
            dataset_split=evaluation["test_split"],
            dataset_revision=evaluation["revision"],
            metric_type=measurement.metric,
            metric_name=measurement.name,
            metric_value=measurement.value,
            metric_args={"protocol": measurement.protocol},
        )
        for measurement in text.measurements(facts["results"]["trained"])
    ]


def evaluation_entries(facts: Facts) -> list[EvalResultEntry]:
    """Return the results of the trained encoder for `.eval_results/`, with accuracies in percent.

    Leaderboards accept only data sets on the Hub. The result is [] for other data.
    """
    evaluation = facts["evaluation"]
    if evaluation is None or evaluation["hub_id"] is None:
        return []
    repo_id = facts["repo_id"]
    return [
        EvalResultEntry(
            dataset_id=evaluation["hub_id"],
            dataset_revision=evaluation["revision"],
            task_id=measurement.key,
            value=round(100 * measurement.value, 2),
            date=facts["date"],
            notes=measurement.protocol,
            source_url=None if repo_id is None else f"{constants.ENDPOINT}/{repo_id}",
            source_name="Model card",  # not written without an address
        )
        for measurement in text.measurements(facts["results"]["trained"])
    ]
