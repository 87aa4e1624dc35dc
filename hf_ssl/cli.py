# SPDX-License-Identifier: Apache-2.0
"""Reads the command line of `hf-ssl`, and returns its exit status (layer 5)."""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_ssl import __version__, commands
from hf_ssl.conversion.releases import RELEASES
from hf_ssl.errors import UserError
from hf_ssl.evaluation.protocols import DEFAULT_PROTOCOLS, PROTOCOLS
from hf_ssl.names import short_deprecations
from hf_ssl.resources import MAP_IMAGES, MAX_IMAGES, PORT
from hf_ssl.signals import ends_on_sigterm, output_is_closed

OVERRIDES = "section.key=value, e.g. data.path=photos training.max_steps=1000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    The status is 0, or 2 after a mistake of the user, 130 after Ctrl-C, or 141 if the reader of the output
    has ended.
    """
    arguments = _parsed(argv)
    advice = "; the same command continues" if _continues(arguments) else ""
    try:
        with ends_on_sigterm(advice), short_deprecations():
            arguments.run(arguments)
            sys.stdout.flush()
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            return 141  # as a shell reports a program that SIGPIPE ended
        if error.errno != errno.ENOSPC:
            raise
        from hf_ssl.files import SAVED_FILES, disk_error_reason

        where = f" for {error.filename}" if error.filename else ""
        return _fail(f"{disk_error_reason(error)}{where}; {SAVED_FILES}")
    except KeyboardInterrupt:
        print(f"hf-ssl: interrupted{advice}", file=sys.stderr)
        return 130
    return 0


def _continues(arguments: argparse.Namespace) -> bool:
    """Return whether the same command continues after an interruption, and does not start again."""
    lists_only = getattr(arguments, "list_jobs", False)
    has_suite = getattr(arguments, "suite", None) is not None
    return not lists_only and (
        has_suite or arguments.run in (commands.pretrain, commands.supervise, commands.sweep)
    )


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments. Settings may follow options, which argparse does not support."""
    parser = _parser()
    given = sys.argv[1:] if argv is None else argv
    arguments, others = parser.parse_known_args(given or ["--help"])
    if others and not ("overrides" in arguments and all(_is_setting(text) for text in others)):
        text, bare = " ".join(others), others[0].lstrip("-")
        advice = f'; put a value with spaces in quotes: "{text}"' if _is_setting(text) else ""
        if bare != others[0] and "overrides" in arguments and "." in bare.partition("=")[0]:
            advice = f"; write settings without dashes: {bare}"
        parser.error(f"unrecognized arguments: {text}{advice}")
    if others:
        arguments.overrides += others
    return arguments


def _is_setting(text: str) -> bool:
    return not text.startswith("-") and "=" in text


def _fail(sentence: str) -> int:
    print(f"hf-ssl: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-ssl", description="Self-supervised image pretraining on the Hugging Face stack."
    )
    parser.add_argument("--version", action="version", version=f"hf_ssl {__version__}")
    command = _commands(parser)
    demo = command("demo", commands.demo)
    demo.add_argument("--no-space", action="store_true", help="do not serve the Space of the encoder")
    demo.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. training.output_dir=digits"
    )

    pretrain = command("pretrain", commands.pretrain)
    pretrain.add_argument("recipe", help="a name that `hf-ssl recipes` lists, or a YAML file")
    pretrain.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    pretrain.add_argument(
        "--resume",
        action="store_true",
        help="report an error if the output folder contains no checkpoint (default: start at step 0 in this "
        "case)",
    )

    sweep = command("sweep", commands.sweep)
    sweep.add_argument("recipe", help="a recipe, a study, or a YAML file with a recipe or a study")
    sweep.add_argument(
        "overrides", nargs="*", metavar="section.key=value",
        help="settings for all runs; a list of values, such as training.batch_size=[64,128,256], is an axis "
        "of the grid",
    )  # fmt: skip
    sweep.add_argument(
        "--seeds", type=int, metavar="N", help="number of seeds (default: 1, or that of the study)"
    )
    sweep.add_argument(
        "--output", type=Path, metavar="FOLDER",
        help="folder of the runs and of the results (default: runs/sweeps/NAME)",
    )  # fmt: skip
    sweep.add_argument(
        "--at-once", type=int, default=1, metavar="N",
        help="number of runs at the same time, which share the cores (default: 1)",
    )  # fmt: skip
    _add_jobs(sweep, "run", "start one run; at the end, the command without --job writes the page")

    evaluate = command("evaluate", commands.evaluate)
    evaluate.add_argument("model", help="a folder with an exported encoder, or any vision encoder on the Hub")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="data.path=... and evaluation.key=value"
    )
    slow = [name for name, protocol in PROTOCOLS.items() if protocol.takes_long]
    evaluate.add_argument(
        "--protocols",
        metavar="NAME,...",
        help=f"protocols of the evaluation: {', '.join(PROTOCOLS)}; all: each one except "
        f"{', '.join(slow)} (default: {','.join(DEFAULT_PROTOCOLS)})",
    )

    evaluate.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder for results.json, which hf-ssl compare reads, and pictures of the results",
    )
    _add_layer(evaluate)
    _add_suite(evaluate)

    plot = command("plot", commands.plot)
    plot.add_argument(
        "models",
        nargs="+",
        metavar="ENCODER",
        help="folders or Hub ids of encoders to draw side by side, and settings such as data.path=...",
    )
    plot.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="folder for the pictures")
    plot.add_argument(
        "--kinds",
        metavar="NAME,...",
        help="tsne, umap (needs umap-learn), page (HTML with the maps and small images), confusion, "
        "neighbors, k_curve, curves (of the loss and its terms, from the logs of runs) (default: all that "
        "are possible)",
    )
    plot.add_argument(
        "--images",
        type=int,
        default=MAP_IMAGES,
        metavar="N",
        help=f"largest number of test images in a map, with balanced classes (default: {MAP_IMAGES:,})",
    )
    _add_layer(plot)
    plot.set_defaults(overrides=[])

    compare = command("compare", commands.compare)
    compare.add_argument(
        "runs",
        nargs="+",
        metavar="RESULTS",
        help="output folders of pretrain, evaluate --output and supervise, folders of such folders, results "
        "files and Hub ids (user/name)",
    )
    compare.add_argument(
        "--output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="output folder of comparison.md, .csv, .tex and .png (default: comparison)",
    )  # fmt: skip
    compare.add_argument(
        "--baselines", action="store_true", help="add rows of the encoder before training and of raw pixels"
    )

    supervise = command(
        "supervise", commands.supervise, "Train a reference encoder with labels, from random weights."
    )
    supervise.add_argument(
        "recipe", help="a name or a YAML file; its encoder, data and views are used, not its method"
    )
    supervise.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="data.path=..., training.KEY=value with the keys output_dir, seed, num_train_epochs, "
        "batch_size, learning_rate, weight_decay, warmup_epochs, precision, ..., and "
        "evaluation.settings.fine_tune.KEY=value with the keys recipe (default: scratch), mixup, flip, ...",
    )

    export = command("export", commands.export)
    export.add_argument("checkpoint", type=Path, help="a folder checkpoint-N of a run")
    export.add_argument("directory", type=Path, help="output folder of the encoder, new or empty")

    _add_convert(command("convert", commands.convert))
    publish = command("publish", commands.publish)
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

    attention = command("attention", commands.attention)
    attention.add_argument(
        "model", help="a folder with an exported encoder, or the Hub id of an encoder of the ViT family"
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
    _add_space(command("space", commands.space_run, "Build and serve a page that demonstrates an encoder."))

    command("methods", commands.methods)
    command("recipes", commands.recipes)
    return parser


def _add_convert(convert: argparse.ArgumentParser) -> None:
    """Add the arguments of `hf-ssl convert`."""
    convert.add_argument("file", type=Path, help="a checkpoint: a file of torch.save or safetensors")
    convert.add_argument(
        "--from", dest="release", required=True, metavar="RELEASE", help=f"one of {', '.join(RELEASES)}"
    )
    convert.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder for the encoder"
    )
    convert.add_argument(
        "--prefix", metavar="PLACE",
        help="where the encoder is in the file: keys of nested dicts and the start of its names of weights, "
        "such as state_dict/module.encoder. (default: that of the release)",
    )  # fmt: skip
    convert.add_argument(
        "--heads", type=int, metavar="N", help="number of attention heads (default: that of the release)"
    )
    convert.add_argument(
        "--size", type=int, metavar="N", help="side of the images in pixels (default: that of the release)"
    )
    for name, meaning in (("mean", "mean"), ("std", "standard deviation")):
        convert.add_argument(
            f"--{name}", type=numbers, metavar="N,...",
            help=f"{meaning} of each channel, for pixels from 0 to 1 (default: that of the release)",
        )  # fmt: skip


def numbers(text: str) -> list[float]:
    """Return the numbers in a text such as "0.5,0.5,0.5"."""
    return [float(part) for part in text.split(",")]


def _add_suite(evaluate: argparse.ArgumentParser) -> None:
    """Add the options of `hf-ssl evaluate` for suites of data sets."""
    suite = evaluate.add_argument_group(
        "suites of data sets",
        "Settings apply to all data sets. After an interruption, the same command continues.",
    )
    suite.add_argument(
        "--suite", metavar="NAME", help="a YAML file, or one of transfer_ericsson and transfer_small"
    )
    suite.add_argument(
        "--root", metavar="FOLDER", help="folder of the data sets; the paths of the suite are relative to it"
    )
    _add_jobs(suite, "job", "run one job; at the end, the command without --job writes the table")


def _add_jobs(parser: Any, noun: str, help_of_job: str) -> None:
    """Add the options of a command whose parts a scheduler can start."""
    parser.add_argument(
        "--list-jobs", action="store_true", help=f"list the {noun}s with their numbers, and start none"
    )
    parser.add_argument("--job", type=int, metavar="N", help=help_of_job)


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


def _add_layer(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--layer",
        choices=["encoder", "projector"],
        default="encoder",
        help="projector: measure the projector's output z = g(h) beside the encoder's features h; the "
        "model must be the output folder of a run (default: encoder)",
    )


def _add_space(space: argparse.ArgumentParser) -> None:
    """Add `hf-ssl space build` and `hf-ssl space run`."""
    command = _commands(space)
    build = command("build", commands.space_build)
    build.add_argument("model", help="a folder with an exported encoder, or any vision encoder on the Hub")
    build.add_argument(
        "folder", type=Path, help="output folder: new, empty, or an earlier Space, which is replaced"
    )
    build.add_argument("overrides", nargs="*", metavar="data.key=value", help="data.path=... of the gallery")
    build.add_argument(
        "--images", type=int, default=MAX_IMAGES, help=f"largest number of images (default: {MAX_IMAGES:,})"
    )
    build.add_argument("--title", help="heading of the page")
    serve = command("run", commands.space_run)
    serve.add_argument("folder", type=Path, help="a folder of `hf-ssl space build`")
    serve.add_argument("--host", default="127.0.0.1", help="0.0.0.0 allows connections from other machines")
    serve.add_argument(
        "--port", type=int, default=PORT, help=f"port; if it is in use, the next free port (default: {PORT})"
    )
