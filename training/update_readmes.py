# SPDX-License-Identifier: Apache-2.0
"""Writes the generated parts of the READMEs: `python -m training.update_readmes`.

A generated part stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. A test compares the READMEs
with the output of this program.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_ssl.cards.text import markdown_row
from hf_ssl.conversion.releases import RELEASES
from hf_ssl.effects import WITHOUT_EFFECT
from hf_ssl.evaluation.config import MEASUREMENTS
from hf_ssl.evaluation.fine_tuning import RECIPES
from hf_ssl.evaluation.protocols import PROTOCOLS, load_protocol
from hf_ssl.methods import METHODS
from hf_ssl.recipe.recipe import PUBLISH_KEYS, REPLACED
from hf_ssl.resources import study_files
from hf_ssl.sections import default_values
from hf_ssl.sweep_file import load_sweep, needed_keys
from hf_ssl.trainer.arguments import SSLTrainingArguments
from hf_ssl.trainer.transformers_arguments import REJECTED

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "training/README.md")


def methods() -> str:
    """Return a Markdown table of all methods."""
    lines = ["| method | what it does | paper |", "|---|---|---|"]
    for name, method in METHODS.items():
        lines.append(
            f"| [{method.title}](model_cards/methods/{name}.md) | {method.summary} | {method.paper} |"
        )
    return "\n".join(lines)


def arguments() -> str:
    """Return a Markdown table of all arguments of the installed transformers' Trainer."""
    lines = ["| argument | Python | recipe and command line |", "|---|---|---|"]
    working: list[str] = []
    for name in sorted(field.name for field in dataclasses.fields(TrainingArguments) if field.init):
        if name in REJECTED:
            lines.append(f"| `{name}` | rejected: {REJECTED[name]} | rejected |")
        elif name in WITHOUT_EFFECT:
            lines.append(f"| `{name}` | no effect, with a warning: {WITHOUT_EFFECT[name]} | no effect |")
        elif name in REPLACED:
            lines.append(f"| `{name}` | works | rejected: {REPLACED[name]} |")
        elif name in PUBLISH_KEYS:
            lines.append(f"| `{name}` | works | works, as `publish.{PUBLISH_KEYS[name]}` |")
        else:
            working.append(f"`{name}`")
    lines.append(f"| {', '.join(working)} | work | work |")
    stock, ours = (
        {field.name: field.default for field in dataclasses.fields(cls)}
        for cls in (TrainingArguments, SSLTrainingArguments)
    )
    other = [
        f"`{name}` {ours[name]} (not {value})"
        for name, value in sorted(stock.items())
        if ours[name] != value and not isinstance(value, type(dataclasses.MISSING))
    ]
    return "\n".join([*lines, "", f"Defaults that differ from those of transformers: {', '.join(other)}."])


def measurements() -> str:
    """Return a Markdown table of the measurements of the monitor."""
    lines = ["| name | measurement |", "|---|---|"]
    return "\n".join(lines + [f"| `eval_{name}` | {each.text} |" for name, each in MEASUREMENTS.items()])


def protocols() -> str:
    """Return a Markdown table of the evaluation protocols with their settings and default values."""
    lines = ["| protocol | measurement | settings and default values |", "|---|---|---|"]
    for name, protocol in PROTOCOLS.items():
        values = default_values(load_protocol(name).Config).items()
        settings = ", ".join(f"`{key}` {_default(value)}" for key, value in values)
        lines.append(f"| `{name}` | {protocol.title}: {protocol.summary} | {settings} |")
    return "\n".join(lines)


def fine_tuning() -> str:
    """Return a Markdown table of the recipes of fine-tuning."""
    lines = [
        "| `recipe` | optimizer | learning rate for 256 images | weight decay | epochs | warmup epochs "
        "| others |",
        "|---|---|---|---:|---|---:|---|",
    ]
    for name, recipe in RECIPES.items():
        rates = ", ".join(f"{rate:g}" for rate in recipe.learning_rates)
        *few, (_, most) = recipe.epochs.items()
        of_few = [f", {number} with at most {100 * part:g} % of the labels" for part, number in few]
        epochs = f"{most}{''.join(of_few)}"
        factors = ("layer_decay", 1.0), ("mixup", 0.0), ("label_smoothing", 0.0)
        others = [f"`{key}` {getattr(recipe, key):g}" for key, off in factors if getattr(recipe, key) != off]
        cells = [f"`{name}`", recipe.optimizer, rates, f"{recipe.weight_decay:g}", epochs]
        lines.append(markdown_row([*cells, f"{recipe.warmup_epochs:g}", ", ".join(others) or "-"]))
    return "\n".join(lines)


def studies() -> str:
    """Return a Markdown table of all studies, with the result of those that ran."""
    lines = ["| study | question | runs per seed |", "|---|---|---:|"]
    for name in study_files():
        paths = [f"{key}=digits" for key in ["data.path", *needed_keys(name)]]
        sweep = load_sweep(name, paths, 1)
        page = f"results/studies/{name}/README.md"
        title = f"[{sweep.study.title}]({page})" if (ROOT / "training" / page).exists() else sweep.study.title
        lines.append(f"| [`{name}`](studies/{name}.yaml) | {title} | {len(sweep.runs)} |")
    return "\n".join(lines)


def releases() -> str:
    """Return a Markdown table of the checkpoints that `hf-ssl convert` reads."""
    lines = ["| `--from` | repository, and its license | files | weights in the file |", "|---|---|---|---|"]
    for name, release in RELEASES.items():
        page = f"[{release.title}]({release.page}), {release.license or 'depends on the checkpoint'}"
        files = ", ".join(_file(address, release.files) for address in release.files) or "see the repository"
        places = " or ".join(f"`{place}`" if place else "the whole file" for place in release.places)
        lines.append(markdown_row([f"`{name}`", page, f"{files}. {release.note}".strip(), places]))
    return "\n".join(lines)


def _file(address: str, addresses: Sequence[str]) -> str:
    """Return a link to a file. Its text also contains the folder if several files have the same name."""
    folder, _, name = address.rpartition("/")
    same = [other for other in addresses if other.rpartition("/")[2] == name]
    text = name if len(same) == 1 else f"{folder.rpartition('/')[2]}/{name}"
    return f"[{text}]({address})" if folder else f"`{text}`"


def _default(value: Any) -> str:
    """Return a default value in YAML. For a long list, return its length, its first and its last value."""
    if isinstance(value, list) and len(value) > 8 and not isinstance(value[0], str):
        return f"{len(value)} values from {value[0]:g} to {value[-1]:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_default, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _result(name: str) -> Callable[[], str]:
    return lambda: (ROOT / "training" / name).read_text(encoding="utf-8").strip()


def example() -> str:
    """Return the code of `training/example.py` as Markdown, without its first comments."""
    code = (ROOT / "training/example.py").read_text(encoding="utf-8")
    return f"```python\n{code[code.index('import sys') :].strip()}\n```"


PARTS: dict[str, Callable[[], str]] = {
    "methods": methods,
    "example": example,
    "arguments": arguments,
    "measurements": measurements,
    "protocols": protocols,
    "fine_tuning": fine_tuning,
    "studies": studies,
    "releases": releases,
    "compare": _result("results/compare.md"),
    "benchmarks": _result("benchmarks/results/cpu.md"),
}


def updated(text: str) -> str:
    """Return the text of a README with its generated parts as they should be."""

    def part(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- begin {name} -->\n{PARTS[name]()}\n<!-- end {name} -->"

    return re.sub(r"<!-- begin (\w+) -->\n.*?<!-- end \1 -->", part, text, flags=re.DOTALL)


if __name__ == "__main__":
    for readme in READMES:
        file = ROOT / readme
        file.write_text(updated(file.read_text(encoding="utf-8")), encoding="utf-8")
