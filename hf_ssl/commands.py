# SPDX-License-Identifier: Apache-2.0
"""Runs each command of `hf-ssl` (layer 5). Commands that only print do not import torch or transformers."""

import argparse
import gc
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_ssl.conversion.releases import find_checkpoint
from hf_ssl.errors import UserError, counted
from hf_ssl.evaluation.protocols import PROTOCOLS
from hf_ssl.methods import METHODS
from hf_ssl.progress import progress
from hf_ssl.resources import recipe_files
from hf_ssl.sections import MISSING
from hf_ssl.signals import end_with_sweep

_DATA_PATH = re.compile(r"^data:\n(?:(?: .*)?\n)*?  path: *(\S+)", re.MULTILINE)


def demo(arguments: argparse.Namespace) -> None:
    """Pretrain, evaluate and demonstrate an encoder of handwritten digits, offline."""
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl import run

    run.demo(arguments.overrides, not arguments.no_space)


def pretrain(arguments: argparse.Namespace) -> None:
    """Pretrain an encoder, export it, evaluate it and write its card."""
    with quick_imports():
        with progress(f"reading the recipe {arguments.recipe}"):
            from hf_ssl.recipe import load_recipe

            recipe = load_recipe(arguments.recipe, arguments.overrides)
        from hf_ssl.files import newest_checkpoint

        output = recipe.output_dir
        if arguments.resume and newest_checkpoint(output) is None:
            raise UserError(f"--resume: expected a checkpoint in {output}, got none; start without --resume")
        with progress("loading torch and transformers"):
            from hf_ssl import run

    run.pretrain(recipe)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause the garbage collector during the import of torch and transformers.

    Later collections ignore the imported objects. Otherwise the collector searches these 800,000 objects
    repeatedly, which takes two CPU seconds. This function does nothing in a process that has already imported
    torch, because existing garbage would never be collected.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def sweep(arguments: argparse.Namespace) -> None:
    """Run a grid of settings with several seeds, and write a page with a table and a plot."""
    if arguments.job is not None:
        end_with_sweep()
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.sweep_file import load_sweep

        found = load_sweep(arguments.recipe, arguments.overrides, arguments.seeds)
        from hf_ssl import sweeps
    output = arguments.output or Path("runs/sweeps") / Path(arguments.recipe).stem
    if arguments.list_jobs:
        print("\n".join(sweeps.list_jobs(found, output)))
    elif arguments.job is not None:
        sweeps.run_job(found, output, arguments.job)
    else:
        command = sweeps.Command(arguments.recipe, arguments.overrides, arguments.seeds, output)
        finished = sweeps.run_sweep(found, command, arguments.at_once)
        print((output / "README.md").read_text(encoding="utf-8"), end="")
        print(f"README.md, sweep.csv, sweep.png and runs.json in {output}")
        if len(finished) < len(found.runs):
            runs = counted(len(found.runs), "run")
            raise UserError(
                f"sweep: expected results of {runs}, got those of {len(finished)}; see {output}/README.md"
            )


def evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate an encoder by standard protocols: k-NN, linear probe and others."""
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.recipe import read_sections
        from hf_ssl.recipe.source import apply_overrides, is_overridden

        overrides = list(arguments.overrides)
        is_suite = arguments.suite is not None
        if arguments.protocols is not None and not is_suite:
            given = apply_overrides({}, overrides, ("data", "evaluation"))["evaluation"].get("protocols")
            if given is not None:
                raise UserError(
                    f"--protocols: expected no evaluation.protocols with it, got {arguments.protocols} and "
                    f"evaluation.protocols={given}; use only one of them"
                )
        if arguments.protocols is not None and not (is_suite and arguments.protocols == "all"):
            quick = [name for name, protocol in PROTOCOLS.items() if not protocol.takes_long]
            names = ",".join(quick) if arguments.protocols == "all" else arguments.protocols
            overrides.append(f"evaluation.protocols=[{names}]")
        _check_suite_options(arguments)
        if arguments.suite is not None:
            from hf_ssl import suites
            from hf_ssl.suite_file import load_suite

            suite = load_suite(arguments.suite, overrides, arguments.root)
        else:
            data, evaluation = read_sections(overrides)
            chosen = is_overridden(overrides, "evaluation.protocols")
            from hf_ssl import run

    if is_suite and arguments.list_jobs:
        print("\n".join(suites.list_jobs(suite, arguments.output)))
    elif is_suite:
        suites.run_suite(arguments.model, suite, arguments.output, arguments.job)
    else:
        run.evaluate(arguments.model, data, evaluation, arguments.output, arguments.layer, chosen)


def _check_suite_options(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that needs another one, or that has no effect with another one."""
    for option in ("root", "job", "list_jobs"):
        value = getattr(arguments, option)
        if arguments.suite is None and value not in (None, False):
            raise UserError(f"--{option.replace('_', '-')}: expected a suite, got none; add --suite NAME")
    if arguments.suite is not None and arguments.layer != "encoder":
        raise UserError(
            f"--layer: expected encoder for the suite {arguments.suite}, got {arguments.layer}; leave it out"
        )
    if arguments.suite is not None and arguments.output is None and not arguments.list_jobs:
        raise UserError("--output: expected a folder for the suite's results, got none; add --output FOLDER")


def plot(arguments: argparse.Namespace) -> None:
    """Draw encoders side by side: t-SNE, UMAP, confusion matrices, neighbors and curves."""
    settings = [text for text in arguments.models if "=" in text and not Path(text).exists()]
    models = [text for text in arguments.models if text not in settings]
    if not models:
        raise UserError(
            f"plot: expected an encoder, got only the setting {settings[0]}; add its folder or its Hub id"
        )
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.recipe import read_sections

        data, evaluation = read_sections([*settings, *arguments.overrides])
        from hf_ssl.plotting import KINDS
        from hf_ssl.plotting import plot as draw

    kinds = list(KINDS) if arguments.kinds is None else arguments.kinds.split(",")
    draw(models, data, evaluation, arguments.output, kinds, arguments.layer, arguments.images)


def compare(arguments: argparse.Namespace) -> None:
    """Compare runs in a table and a plot: means over seeds, and differences from the best row."""
    from hf_ssl.cards.comparison_text import markdown
    from hf_ssl.comparing import compare_runs

    comparison = compare_runs(arguments.runs, arguments.output, arguments.baselines)
    print(markdown(comparison), end="")
    print(f"Markdown, CSV, LaTeX and a plot are in {arguments.output}")


def supervise(arguments: argparse.Namespace) -> None:
    """Train an encoder with labels, as a reference for encoders that were pretrained without labels."""
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.recipe import load_recipe

        folder = f"training.output_dir=runs/supervised/{Path(arguments.recipe).stem}"
        recipe = load_recipe(arguments.recipe, [folder, *arguments.overrides])
        from hf_ssl import supervised

    supervised.supervise(recipe)


def export(arguments: argparse.Namespace) -> None:
    """Write the encoder of a training checkpoint as a plain transformers model."""
    with progress(f"exporting the encoder of {arguments.checkpoint}"):
        from hf_ssl.hub.export import export_checkpoint

        export_checkpoint(arguments.checkpoint, arguments.directory)


def convert(arguments: argparse.Namespace) -> None:
    """Convert a released checkpoint of other code to an encoder of transformers, with a card."""
    find_checkpoint(arguments.file, arguments.release)  # before the slow imports
    with progress(f"converting {arguments.file}"), quick_imports():
        from hf_ssl.conversion.converting import convert, summary

        facts = convert(
            arguments.file, arguments.release, arguments.output, place=arguments.prefix,
            heads=arguments.heads, size=arguments.size, mean=arguments.mean, std=arguments.std,
        )  # fmt: skip
    print("\n".join(summary(facts)))
    command = shlex.join(["hf-ssl", "evaluate", str(arguments.output)])
    print(f"the encoder is in {arguments.output}; {command} data.path=... measures it")


def publish(arguments: argparse.Namespace) -> None:
    """Publish a finished run on the Hub: encoder, card, results and pictures, in one commit."""
    from hf_ssl.hub.publish import is_private, publish, publish_space, recorded_repo

    repo = arguments.repo or recorded_repo(arguments.folder)
    options = {"private": arguments.private, "dry_run": arguments.dry_run}
    publish(arguments.folder, repo, **options)
    if arguments.space is not None:  # its gallery shows images, so it is private if the run is
        options["private"] = arguments.private or is_private(arguments.folder)
        publish_space(arguments.space, repo, **options)


def attention(arguments: argparse.Namespace) -> None:
    """Draw the attention maps of a vision transformer for your photos."""
    with progress("drawing attention maps"):
        from hf_ssl.cards.result_files import trained_value_range
        from hf_ssl.evaluation import write_attention_pictures

        folders = write_attention_pictures(
            arguments.model,
            arguments.images,
            arguments.output,
            layer=arguments.layer,
            size=arguments.size,
            value_range=trained_value_range(arguments.model),
        )
    print("\n".join(f"pictures in {folder}" for folder in folders))
    print(f"overview in {arguments.output / 'overview.png'}")


def space_build(arguments: argparse.Namespace) -> None:
    """Embed a gallery and write a Space that can be served on this machine and on the Hub."""
    from hf_ssl.space import check_packages

    check_packages()
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.recipe import read_sections
        from hf_ssl.recipe.source import is_overridden

        data, _ = read_sections(arguments.overrides)
        chosen = is_overridden(arguments.overrides, "data.split")
        from hf_ssl.space import build_space

    options = {"images": arguments.images, "title": arguments.title, "chosen_split": chosen}
    build_space(arguments.model, arguments.folder, data, **options)
    command = shlex.join(["hf-ssl", "space", "run", str(arguments.folder)])
    print(f"the Space is in {arguments.folder}; {command} serves it")


def space_run(arguments: argparse.Namespace) -> None:
    """Serve a Space on this machine."""
    from hf_ssl.space import run_space

    run_space(arguments.folder, arguments.host, arguments.port)


def methods(arguments: argparse.Namespace) -> None:
    """List the methods."""
    _print_table(
        [(name, f"{method.title}: {method.summary} ({method.paper})") for name, method in METHODS.items()]
    )


def recipes(arguments: argparse.Namespace) -> None:
    """List the recipes that come with hf_ssl."""
    groups: dict[str, list[tuple[str, str]]] = {MISSING: [], "digits": []}  # the first two headings
    for name, path in recipe_files().items():
        groups.setdefault(recipe_data(path), []).append((f"  {name}", recipe_title(path)))
    width = max(len(name) for rows in groups.values() for name, _ in rows)
    headings = {MISSING: "your own images (data.path=...)", "digits": "handwritten digits, offline"}
    for data, rows in groups.items():
        print(f"{headings.get(data, data)}:")
        _print_table(rows, width)


def recipe_data(path: Path) -> str:
    """Return `data.path` of a recipe, or "???" if the user must set it.

    This function does not import a YAML parser, to keep the start fast.
    """
    found = _DATA_PATH.search(path.read_text(encoding="utf-8"))
    return found[1] if found is not None else MISSING


def recipe_title(path: Path) -> str:
    """Return the first line of a recipe's header that is not the license."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("SPDX-"):
            return text
    return ""


def _print_table(rows: list[tuple[str, str]], width: int = 0) -> None:
    width = max([width, *(len(name) for name, _ in rows)])
    for name, text in rows:
        print(f"{name:{width}}  {text}")
