# SPDX-License-Identifier: Apache-2.0
"""The command `hf-ssl` (layer 5). What only prints loads neither torch nor transformers, so it answers at
once."""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_ssl.errors import UserError
from hf_ssl.methods import METHODS
from hf_ssl.resources import recipe_files

OVERRIDES = "section.key=value, e.g. data.path=photos training.max_steps=1000"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 after a mistake of the user (told in one sentence), 130
    after Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = f" for {error.filename}" if error.filename else ""
        return _fail(f"no space left on the disk{where}; what was saved before is whole")
    except KeyboardInterrupt:
        print("hf-ssl: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(sentence: str) -> int:
    print(f"hf-ssl: {sentence}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-ssl", description="Self-supervised image pretraining on the Hugging Face stack."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], summary: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        added.set_defaults(run=run)
        return added

    demo = command(
        "demo", _demo, "pretrain, export, evaluate and describe an encoder of handwritten digits, offline"
    )
    demo.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="e.g. training.output_dir=digits"
    )

    pretrain = command("pretrain", _pretrain, "pretrain an encoder, export it, measure it and write its card")
    pretrain.add_argument("recipe", help="a name that `hf-ssl recipes` lists, or a YAML file")
    pretrain.add_argument("overrides", nargs="*", metavar="section.key=value", help=OVERRIDES)
    pretrain.add_argument(
        "--resume",
        action="store_true",
        help="refuse to start anew; without it a run goes on if its output folder holds a checkpoint of it",
    )

    evaluate = command("evaluate", _evaluate, "measure an encoder with k-NN and a linear probe")
    evaluate.add_argument("model", help="a folder with an exported encoder, or any vision encoder on the Hub")
    evaluate.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="data.path=... and evaluation.key=value"
    )

    export = command(
        "export", _export, "write the encoder of a training checkpoint as a plain transformers model"
    )
    export.add_argument("checkpoint", type=Path, help="a folder checkpoint-N of a run")
    export.add_argument("directory", type=Path, help="where the encoder is written; new or empty")

    command("methods", _methods, "list the methods")
    command("recipes", _recipes, "list the recipes that come with hf_ssl")
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    from hf_ssl import run

    run.demo(arguments.overrides)


def _pretrain(arguments: argparse.Namespace) -> None:
    from hf_ssl.recipe import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    output = Path(recipe.training["output_dir"])
    if arguments.resume and not any(output.glob("checkpoint-*")):
        raise UserError(f"nothing to resume: {output} holds no checkpoint; start without --resume")
    from hf_ssl import run

    run.pretrain(recipe)


def _evaluate(arguments: argparse.Namespace) -> None:
    from hf_ssl.recipe import read_sections

    data, evaluation = read_sections(arguments.overrides)
    from hf_ssl import run

    run.evaluate(arguments.model, data, evaluation)


def _export(arguments: argparse.Namespace) -> None:
    from hf_ssl import run

    run.export(arguments.checkpoint, arguments.directory)


def _methods(arguments: argparse.Namespace) -> None:
    _print_table(
        [(name, f"{method.title}: {method.summary} ({method.paper})") for name, method in METHODS.items()]
    )


def _recipes(arguments: argparse.Namespace) -> None:
    _print_table([(name, recipe_title(path)) for name, path in recipe_files().items()])


def recipe_title(path: Path) -> str:
    """The first line of a recipe's header that says something: not the licence."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and not text.startswith("SPDX-"):
            return text
    return ""


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        print(f"{name:{width}}  {text}")
