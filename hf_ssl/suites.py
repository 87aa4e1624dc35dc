# SPDX-License-Identifier: Apache-2.0
"""Evaluates an encoder on the data sets of a suite, in jobs that can run separately (layer 5).

The result of each job is stored in the file `<entry>/<group>.json` of the output folder. A later call reads
the stored results, so an interrupted suite continues.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers.utils import logging as transformers_logging

from hf_ssl.building import open_labeled_splits
from hf_ssl.cards import remove_private
from hf_ssl.cards.card import update_card
from hf_ssl.cards.facts import EvaluationFacts
from hf_ssl.cards.privacy import encoder_name
from hf_ssl.cards.result_files import EVALUATED, EVALUATION, with_trained_reading
from hf_ssl.cards.suite_plot import draw
from hf_ssl.cards.suite_text import Measured, csv_text, markdown, metric_value, summarize
from hf_ssl.data import LabeledImages
from hf_ssl.effects import NOTHING, effect
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig, evaluate_encoder, fastest_device, load_encoder
from hf_ssl.evaluation.feature_cache import encoder_fingerprint
from hf_ssl.evaluation.protocols import PROTOCOLS, has_checkpoints
from hf_ssl.evaluation.results import EncoderResult, check_result, percent
from hf_ssl.files import disk_errors_as_user_errors, read_json, replaced_file, write_json, write_text
from hf_ssl.modeling.gather import from_every_process, from_first_process, joined_processes, process_rank
from hf_ssl.progress import hidden_progress, notice, progress
from hf_ssl.recording import evaluated_encoder, evaluation_facts
from hf_ssl.suite_file import Job, Suite

FORMAT = 1


def list_jobs(suite: Suite, output: Path | None = None) -> list[str]:
    """Return one line for each job: its number, entry, group, state and protocols.

    Args:
        suite: the suite.
        output: the folder of the results, which determine the states; None: no job has a result.
    """
    width = max(len(job.entry) for job in suite.jobs)
    groups = max(len(job.group) for job in suite.jobs)
    lines = []
    for number, job in enumerate(suite.jobs, start=1):
        stored = None if output is None else _read(job.file(output))
        if stored is None or stored["result"] is None:
            state = "to do" if stored is None else "failed"
        else:
            state = "partial" if _skipped(job, stored["result"]) else "finished"
        protocols = ",".join(job.protocols.values())
        lines.append(f"{number:>3}  {job.entry:{width}}  {job.group:{groups}}  {state:8}  {protocols}")
    return lines


def _skipped(job: Job, result: EncoderResult) -> list[str]:
    """Return the protocols of a job without a number in its result, for example without a package."""
    names = list(dict.fromkeys(job.protocols.values()))
    measured = {each["protocol"] for each in result["protocols"]} | {"quality"} & result.keys()
    return [name for name in names if name not in measured]


def run_suite(model: str, suite: Suite, output: Path, number: int | None = None) -> dict[str, Any]:
    """Run the jobs of a suite that have no result yet, and write the table of all results.

    The files are `suite.md`, `suite.csv`, `suite.png` and `results.json`. If `model` is a run and
    `output` is in its folder `results/`, its card shows the table too. If a job fails, for example because
    its data set is missing, the table names it, and the other jobs run. Under torchrun or accelerate launch,
    the processes share each job.

    Args:
        model: a folder or the Hub id of an encoder with its image processor.
        suite: the suite.
        output: the folder of the results.
        number: run only this job, from 1, and write no table.

    Returns:
        The content of `results.json`, or of the file of a single job. In all processes but the main one, the
        result of a whole suite is empty.

    Raises:
        UserError: the encoder cannot be loaded, the folder contains results of another encoder or of other
            settings, or a single job or all jobs fail.
    """
    transformers_logging.disable_progress_bar()
    jobs = suite.jobs if number is None else [suite.job(number)]
    with disk_errors_as_user_errors(str(output)):
        output.mkdir(parents=True, exist_ok=True)
    with joined_processes(fastest_device().type):
        is_main = process_rank() == 0
        with hidden_progress(not is_main):
            with progress(f"loading {model}"):
                encoder, processor = load_encoder(model)
            name = encoder_name(model)
            fingerprint = encoder_fingerprint(encoder, processor.to_dict()) or f"unknown code of {name}"
            about = {"name": name, "fingerprint": fingerprint}
            stored = from_first_process([_read(job.file(output)) for job in jobs])
            for job, record in zip(jobs, stored, strict=True):
                _check_stored(job, record, about)
            records = []
            for job, record in zip(jobs, stored, strict=True):
                found = _run_job(job, record, (model, encoder, processor), output)
                found = remove_private(found) | {"format": FORMAT, "suite": suite.name, "encoder": about}
                if is_main and found != record:
                    write_json(job.file(output), found)
                elif number is not None and found["result"] is not None:
                    notice(f"{job.name}: {job.file(output)} contains the result already")
                is_complete = found["result"] is not None and not _skipped(job, found["result"])
                if is_main and is_complete:  # until now, checkpoints may be needed again
                    shutil.rmtree(_checkpoints(job, output), ignore_errors=True)
                records.append(found)
    if number is not None:
        if records[0]["result"] is None:
            raise UserError(f"job {number}, {jobs[0].name}: {records[0]['error']}")
        return records[0]
    if not is_main:
        return {}
    merged = _merge(suite, records, name, output)
    update_card(Path(model).expanduser(), output)
    return merged


def _read(path: Path) -> dict[str, Any] | None:
    """Return a stored record; None if there is none, or if it has another `FORMAT`.

    Raises:
        UserError: the file contains other data, or a part is missing.
    """
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        return None
    parts = (("settings", dict), ("encoder", dict), ("images", dict | None), ("error", str | None))
    if any(key not in record or not isinstance(record[key], kind) for key, kind in parts):
        check_result(None, str(path))
    if record.get("result") is not None or "result" not in record:
        check_result(record.get("result"), str(path))
    return record


def _check_stored(job: Job, record: dict[str, Any] | None, about: dict[str, str]) -> None:
    """Raise UserError if a stored result belongs to another encoder or to other settings."""
    if record is None or record["result"] is None:
        return
    if record["encoder"]["fingerprint"] != about["fingerprint"]:
        raise UserError(
            f"--output: expected an empty folder or results of {about['name']}, got results of another "
            f"encoder, {record['encoder']['name']}, for {job.name}; use another folder"
        )
    before, now = record["settings"], remove_private(job.settings)
    keys = [key for key in (*before, *now) if effect(key) != NOTHING]
    changed = [key for key in keys if before.get(key, "-") != now.get(key, "-")]
    if changed:
        key = changed[0]
        raise UserError(
            f"{key}: expected {before.get(key, 'the default')} as in the stored result of {job.name}, got "
            f"{now.get(key, 'the default')}; use another folder, or delete {job.file(Path())}"
        )


def _run_job(
    job: Job, stored: dict[str, Any] | None, loaded: tuple[str, Any, Any], output: Path
) -> dict[str, Any]:
    """Return the stored record if it is valid, otherwise the record of a new measurement.

    Args:
        job: the job.
        stored: the record in its file, if any.
        loaded: folder or Hub id of the encoder, the encoder, and its image processor.
        output: the folder of the results.
    """
    model, encoder, processor = loaded
    kept = stored if stored is not None and stored["result"] is not None else None
    record = {"entry": job.entry, "group": job.group, "settings": job.settings}
    try:
        splits = _open(job, model)
        images = {split: _identity(part) for split, part in zip(("train", "test"), splits, strict=True)}
        evaluation = _with_checkpoints(job, output)
        before: EncoderResult | None = None
        if kept is not None and kept["images"] == images:
            kept = _described(kept, model, encoder, evaluation_facts(job.data, job.evaluation, *splits))
            before = kept["result"]
            if not (skipped := _skipped(job, before)):
                return kept
            notice(f"{job.name}: the stored result lacks {', '.join(skipped)}; only this is measured")
            precision = before.get("precision", evaluation.precision)  # `auto` can differ between machines
            evaluation = replace(evaluation, protocols=skipped, precision=precision)
        elif kept is not None:
            notice(f"{job.name}: the images differ from those of the stored result; the job runs again")
        result = evaluate_encoder(
            encoder, *splits, evaluation, processor, device=fastest_device(), description=job.name
        )
        if before is not None:
            result = _completed(before, result, evaluation.protocols)
    except UserError as error:
        notice(f"{job.name}: {error}" + ("" if kept is None else "; the stored result is kept"))
        failed = record | {"images": None, "result": None, "error": str(error)}
        return failed if kept is None else kept
    shown = [(each["column"], metric_value(each, job.metric)) for each in result["protocols"]]
    numbers = [f"{column} {percent(value)}" for column, value in shown if value is not None]
    notice(f"{job.name}: {', '.join(numbers) or f'no number for the metric {job.metric}'}")
    facts = evaluation_facts(job.data, job.evaluation, *splits)  # with the number of broken images
    return _described(record | {"images": images, "result": result, "error": None}, model, encoder, facts)


def _completed(before: EncoderResult, new: EncoderResult, protocols: list[str]) -> EncoderResult:
    """Return a result to which the protocols that it lacked were added, in the order of `PROTOCOLS`."""
    starts = tuple(f"{PROTOCOLS[name].title}: " for name in protocols)
    order = list(PROTOCOLS)
    numbers = sorted(
        [*before["protocols"], *new["protocols"]], key=lambda each: order.index(each["protocol"])
    )
    skipped = [text for text in before["skipped"] if not text.startswith(starts)]
    result = before | {
        "protocols": numbers,
        "skipped": list(dict.fromkeys([*skipped, *new["skipped"]])),
        "seconds": new["seconds"] | before["seconds"],
    }
    return cast(EncoderResult, result | ({"quality": new["quality"]} if "quality" in new else {}))


def _described(record: dict[str, Any], model: str, encoder: Any, facts: EvaluationFacts) -> dict[str, Any]:
    """Return a record with the entry of the encoder, which `hf-ssl compare` reads."""
    if EVALUATED in record:
        return record
    size = record["result"]["image_size"]
    return record | {EVALUATED: evaluated_encoder(model, encoder, facts, size, fastest_device())}


def _open(job: Job, model: str) -> tuple[LabeledImages, LabeledImages]:
    """Return both splits. If one process cannot open them, all processes raise UserError."""
    problem = None
    try:
        data = with_trained_reading(replace(job.data, streaming=False), model)
        splits = open_labeled_splits(data, job.evaluation)
    except UserError as error:
        problem = str(error)
    problems = [text for text in from_every_process(problem) if text is not None]
    if problems:
        raise UserError(problems[0])
    return splits


def _identity(images: LabeledImages) -> list[Any]:
    """Return what identifies the images. A stored result is valid only for equal values.

    The values are the revision, the number of images, and the fingerprint of a choice of them, if any.
    """
    return [images.revision, len(images), *([images.selection] if images.selection else [])]


def _checkpoints(job: Job, output: Path) -> Path:
    """Return the folder for the checkpoints of the encoders that a job trains."""
    return output / job.entry / f"_checkpoints_{job.group}"


def _with_checkpoints(job: Job, output: Path) -> EvaluationConfig:
    """Return the settings with a folder for checkpoints, if the user has set none.

    An interrupted training then resumes.
    """
    settings, folder = job.evaluation.settings, str(_checkpoints(job, output))
    own = {name: settings.get(name, {}) for name in job.evaluation.protocols if has_checkpoints(name)}
    changed = {name: {**each, "folder": folder} for name, each in own.items() if not each.get("folder")}
    return replace(job.evaluation, settings=settings | changed)


def _merge(suite: Suite, records: list[dict[str, Any]], encoder: str, output: Path) -> dict[str, Any]:
    """Write the tables and the plot of all results, and return the content of `results.json`."""
    measured = [
        Measured(job.entry, job.group, job.metric, job.protocols, record["result"], record["error"])
        for job, record in zip(suite.jobs, records, strict=True)
    ]
    if all(each.result is None for each in measured):
        raise UserError(
            f"{suite.name}: expected at least one job with a result, got none; error of the first "
            f"job: {measured[0].error}"
        )
    summary = summarize(suite.title, encoder, measured)
    plain = {"suite": suite.name, "fingerprint": records[0]["encoder"]["fingerprint"]} | summary.to_dict()
    write_json(output / EVALUATION, plain)
    write_text(output / "suite.md", markdown(summary))
    write_text(output / "suite.csv", csv_text(summary))
    with replaced_file(output / "suite.png") as staging:
        draw(summary, staging)
    print(markdown(summary), end="")
    print(f"{EVALUATION}, suite.md, suite.csv and suite.png in {output}")
    return plain
