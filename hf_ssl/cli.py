# SPDX-License-Identifier: Apache-2.0
"""Implements the command `hf-ssl` (layer 5). Commands that only print do not import torch or transformers."""

import argparse
import errno
import gc
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hf_ssl.data.config import MISSING
from hf_ssl.errors import UserError
from hf_ssl.evaluation.protocols import DEFAULT_PROTOCOLS, PROTOCOLS
from hf_ssl.methods import METHODS
from hf_ssl.progress import progress
from hf_ssl.resources import MAX_IMAGES, PORT, recipe_files

_DATA_PATH = re.compile(r"^data:\n(?:(?: .*)?\n)*?  path: *(\S+)", re.MULTILINE)
OVERRIDES = "section.key=value, e.g. data.path=photos training.max_steps=1000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    It is 0, or 2 after a mistake of the user, 130 after Ctrl-C, 141 if nobody reads standard output.
    """
    arguments = _parsed(argv)
    try:
        with _ends_on_sigterm():
            arguments.run(arguments)
            sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_closed():
            return 141  # as a shell reports a program that SIGPIPE ended
        if error.errno != errno.ENOSPC:
            raise
        from hf_ssl.files import SAVED_FILES, disk_error_reason

        where = f" for {error.filename}" if error.filename else ""
        return _fail(f"{disk_error_reason(error)}{where}; {SAVED_FILES}")
    except KeyboardInterrupt:
        print("hf-ssl: interrupted", file=sys.stderr)
        return 130
    return 0


def _output_is_closed() -> bool:
    """Return whether nobody reads standard output, as after `hf-ssl recipes | head -1`.

    Python would write what is left at its end, and print a message about the error.
    """
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments. Settings may follow options, which argparse does not support."""
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if others and not ("overrides" in arguments and all(_is_setting(text) for text in others)):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        arguments.overrides += others
    return arguments


def _is_setting(text: str) -> bool:
    return not text.startswith("-") and "=" in text


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143), so that cleanup code removes incomplete files.

    Training sets its own handler, which saves a checkpoint first (`hf_ssl.trainer.callbacks.StopOnSignal`).
    """

    def end(number: int, frame: FrameType | None) -> None:
        print("hf-ssl: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # handlers need the main thread
        yield
        return
    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _fail(sentence: str) -> int:
    print(f"hf-ssl: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-ssl", description="Self-supervised image pretraining on the Hugging Face stack."
    )
    command = _commands(parser)
    demo = command("demo", _demo)
    demo.add_argument(
        "--no-space", action="store_true", help="do not serve the Space that demonstrates the encoder"
    )
    demo.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. training.output_dir=digits"
    )

    pretrain = command("pretrain", _pretrain)
    pretrain.add_argument("recipe", help="a name that `hf-ssl recipes` lists, or a YAML file")
    pretrain.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    pretrain.add_argument(
        "--resume",
        action="store_true",
        help="report an error if the output folder contains no checkpoint (default: start at step 0 in this "
        "case)",
    )

    evaluate = command("evaluate", _evaluate)
    evaluate.add_argument("model", help="a folder with an exported encoder, or any vision encoder on the Hub")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="data.path=... and evaluation.key=value"
    )
    evaluate.add_argument(
        "--protocols",
        metavar="NAME,...",
        help=f"what is measured: {', '.join(PROTOCOLS)}, or all (default: {','.join(DEFAULT_PROTOCOLS)})",
    )

    evaluate.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for results.json and pictures of the results"
    )

    compare = command("compare", _compare)
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="RESULTS",
        help="results files, output folders of runs, folders of such folders, and Hub ids (user/name)",
    )
    compare.add_argument(
        "--output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="output folder of comparison.md, .csv, .tex and .png (default: comparison)",
    )  # fmt: skip
    compare.add_argument(
        "--baselines", action="store_true", help="add rows of the encoder before training and of raw pixels"
    )

    supervise = command(
        "supervise", _supervise, "Train a reference encoder with labels from scratch, and export it."
    )
    supervise.add_argument(
        "recipe", help="a name or a YAML file; its encoder, data and views are used, not its method"
    )
    supervise.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="data.path=..., training.output_dir=..., and evaluation.settings.fine_tune.key=value with the "
        "keys recipe (default: scratch), epochs, learning_rates, batch_size, weight_decay, mixup, ...",
    )

    export = command("export", _export)
    export.add_argument("checkpoint", type=Path, help="a folder checkpoint-N of a run")
    export.add_argument("directory", type=Path, help="output folder of the encoder, new or empty")

    publish = command("publish", _publish)
    publish.add_argument("folder", metavar="run", type=Path, help="the output folder of a run")
    publish.add_argument(
        "repo", nargs="?", help="user/name, created if it does not exist; default: publish.repo_id"
    )
    publish.add_argument("--private", action="store_true", help="make a new repository private")
    publish.add_argument(
        "--dry-run", action="store_true", help="list the files; this needs neither network nor token"
    )
    publish.add_argument(
        "--space",
        type=Path,
        metavar="FOLDER",
        help="a folder of `hf-ssl space build`, which is published as a Space",
    )

    attention = command("attention", _attention)
    attention.add_argument(
        "model", help="a folder with an exported encoder, or one of the ViT family on the Hub"
    )
    attention.add_argument("images", nargs="+", type=Path, metavar="image", help="photos")
    attention.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="output folder, with one folder per photo",
    )
    attention.add_argument(
        "--layer", type=int, default=-1, help="0 is the first layer, -1 the last (default: -1)"
    )
    attention.add_argument(
        "--size",
        type=int,
        help="resize the shortest edge of the photo to this many pixels, without a crop (default: resize and "
        "center crop as the image processor of the encoder does)",
    )
    _add_space(command("space", _space_run, "Build and serve a page that demonstrates an encoder."))

    command("methods", _methods)
    command("recipes", _recipes)
    return parser


def _commands(parser: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """Return a function that adds a command to a parser, and returns the parser of the command.

    The returned function takes a command name, the function that runs the command, and a description. The
    default description is the docstring of the function that runs the command.
    """
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], None], description: str | None = None
    ) -> argparse.ArgumentParser:
        text = description or run.__doc__ or name
        summary = text[0].lower() + text[1:].removesuffix(".")
        added = commands.add_parser(name, help=summary, description=text)
        added.set_defaults(run=run)
        return added

    return add


def _add_space(space: argparse.ArgumentParser) -> None:
    """Add `hf-ssl space build` and `hf-ssl space run`."""
    command = _commands(space)
    build = command("build", _space_build)
    build.add_argument("model", help="a folder with an exported encoder, or any vision encoder on the Hub")
    build.add_argument(
        "folder", type=Path, help="output folder: new, empty, or an earlier Space, which is replaced"
    )
    build.add_argument("overrides", nargs="*", metavar="data.key=value", help="data.path=... of the gallery")
    build.add_argument(
        "--images", type=int, default=MAX_IMAGES, help=f"largest number of images (default: {MAX_IMAGES:,})"
    )
    build.add_argument("--title", help="heading of the page")
    serve = command("run", _space_run)
    serve.add_argument("folder", type=Path, help="a folder of `hf-ssl space build`")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 allows connections from other machines")
    serve.add_argument(
        "--port", type=int, default=PORT, help=f"port, or the next free port (default: {PORT})"
    )


def _demo(arguments: argparse.Namespace) -> None:
    """Pretrain, evaluate and demonstrate an encoder of handwritten digits, offline."""
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl import run

    run.demo(arguments.overrides, not arguments.no_space)


def _pretrain(arguments: argparse.Namespace) -> None:
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


def _evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate an encoder by standard protocols: k-NN, linear probe and others."""
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.recipe import read_sections

        overrides = list(arguments.overrides)
        if arguments.protocols is not None:
            names = ",".join(PROTOCOLS) if arguments.protocols == "all" else arguments.protocols
            overrides.append(f"evaluation.protocols=[{names}]")
        data, evaluation = read_sections(overrides)
        from hf_ssl import run

    run.evaluate(arguments.model, data, evaluation, arguments.output)


def _compare(arguments: argparse.Namespace) -> None:
    """Compare runs in a table and a plot: means over seeds, with differences."""
    from hf_ssl.cards.comparison_text import markdown
    from hf_ssl.comparing import compare_runs

    comparison = compare_runs(arguments.runs, arguments.output, arguments.baselines)
    print(markdown(comparison), end="")
    print(f"Markdown, CSV, LaTeX and a plot are in {arguments.output}")


def _supervise(arguments: argparse.Namespace) -> None:
    """Train an encoder with labels, as a reference for encoders that were pretrained without labels."""
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.recipe import load_recipe

        folder = f"training.output_dir=runs/supervised/{Path(arguments.recipe).stem}"
        recipe = load_recipe(arguments.recipe, [folder, *arguments.overrides])
        from hf_ssl import supervised

    supervised.supervise(recipe)


def _export(arguments: argparse.Namespace) -> None:
    """Write the encoder of a training checkpoint as a plain transformers model."""
    with progress(f"exporting the encoder of {arguments.checkpoint}"):
        from hf_ssl.hub.export import export_checkpoint

        export_checkpoint(arguments.checkpoint, arguments.directory)


def _publish(arguments: argparse.Namespace) -> None:
    """Publish a finished run on the Hub: encoder, card, results and pictures, one commit."""
    from hf_ssl.hub.publish import is_private, publish, publish_space, recorded_repo

    repo = arguments.repo or recorded_repo(arguments.folder)
    options = {"private": arguments.private, "dry_run": arguments.dry_run}
    publish(arguments.folder, repo, **options)
    if arguments.space is not None:  # its gallery shows images, so it is private if the run is
        options["private"] = arguments.private or is_private(arguments.folder)
        publish_space(arguments.space, repo, **options)


def _attention(arguments: argparse.Namespace) -> None:
    """Draw the attention maps of a vision transformer for your photos."""
    with progress("drawing attention maps"):
        from hf_ssl.evaluation import write_attention_pictures

        folders = write_attention_pictures(
            arguments.model, arguments.images, arguments.output, layer=arguments.layer, size=arguments.size
        )
    print("\n".join(f"pictures in {folder}" for folder in folders))
    print(f"overview in {arguments.output / 'overview.png'}")


def _space_build(arguments: argparse.Namespace) -> None:
    """Embed a gallery and write a Space that can be served on this machine and on the Hub."""
    from hf_ssl.space import check_packages

    check_packages()
    with progress("loading torch and transformers"), quick_imports():
        from hf_ssl.recipe import read_sections

        data, _ = read_sections(arguments.overrides)
        from hf_ssl.space import build_space

    build_space(arguments.model, arguments.folder, data, images=arguments.images, title=arguments.title)
    print(f"the Space is in {arguments.folder}; hf-ssl space run {arguments.folder} serves it")


def _space_run(arguments: argparse.Namespace) -> None:
    """Serve a Space on this machine."""
    from hf_ssl.space import run_space

    run_space(arguments.folder, arguments.host, arguments.port)


def _methods(arguments: argparse.Namespace) -> None:
    """List the methods."""
    _print_table(
        [(name, f"{method.title}: {method.summary} ({method.paper})") for name, method in METHODS.items()]
    )


def _recipes(arguments: argparse.Namespace) -> None:
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
