# SPDX-License-Identifier: Apache-2.0
"""No command runs code that a folder or a repository contains, also if standard input says yes."""

import ast
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
from foreign_encoder import VIT, foreign
from messages import mentions
from transformers import ViTConfig, ViTModel

from hf_ssl.cli import main
from hf_ssl.errors import UserError
from hf_ssl.evaluation import evaluate_encoder, load_encoder
from hf_ssl.evaluation.encoders import load_processor
from hf_ssl.hub.export import load_method_model
from hf_ssl.methods.simclr.modeling_simclr import SimCLRForPreTraining
from hf_ssl.modeling.loading import load_config, load_weights, view_settings

ROOT = Path(__file__).parent.parent
LOADING = ("from_pretrained", "from_config")


@pytest.fixture
def proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the foreign code writes. Standard input answers every question with yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    return tmp_path / "proof"


START = ["backbone.init_from={folder}", "training.output_dir={tmp}/out", "training.use_cpu=true"]
COMMANDS = {
    "evaluate": ["evaluate", "{folder}", "data.path=digits"],
    "suite": ["evaluate", "{folder}", "--suite", "{tmp}/suite.yaml", "--output", "{tmp}/suite"],
    "attention": ["attention", "{folder}", "{tmp}/photo.png", "--output", "{tmp}/maps"],
    "plot": ["plot", "{folder}", "data.path=digits", "--output", "{tmp}/plots"],
    "pretrain": ["pretrain", "smoke/simclr", *START],
    "supervise": ["supervise", "smoke/simclr", *START],
    "space": ["space", "build", "{folder}", "{tmp}/space", "data.path=digits"],
    "export": ["export", "{folder}", "{tmp}/exported"],
}
SUITE = """
suite: {title: Digits}
groups: {all: {protocols: [knn]}}
entries: {digits: {data: {path: digits}}}
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_foreign_code(
    tmp_path: Path, proof: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = foreign(tmp_path / "foreign", proof)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "suite.yaml").write_text(SUITE)
    words = [word.format(folder=folder, tmp=tmp_path) for word in COMMANDS[command]]
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(words))
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert not proof.exists()
    assert "Do you wish to run" not in said.out + said.err
    assert re.search("auto_map.*use a model type of transformers", said.err), said.err


LOADERS: dict[str, Callable[[str], object]] = {
    "evaluate_encoder": lambda folder: evaluate_encoder(folder, "digits", "digits"),
    "load_config": load_config,
    "load_weights": load_weights,
    "load_encoder": load_encoder,
    "load_method_model": lambda folder: load_method_model(Path(folder)),
    "from_backbone": SimCLRForPreTraining.from_backbone,
    "from_pretrained": SimCLRForPreTraining.from_pretrained,
}


@pytest.mark.parametrize("name", LOADERS)
def test_no_function_runs_foreign_code(tmp_path: Path, proof: Path, name: str) -> None:
    folder = foreign(tmp_path / "foreign", proof)
    with pytest.raises((UserError, ValueError, OSError, RuntimeError)):
        LOADERS[name](str(folder))
    assert not proof.exists()


def test_a_foreign_image_processor_does_not_run(
    tmp_path: Path, proof: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(foreign(tmp_path / "foreign", proof, encoder=False))
    for load in (load_encoder, lambda place: load_processor(place, ViTModel(ViTConfig(**VIT)))):
        with pytest.raises(UserError, match=mentions("auto_map", "processor")):
            load(folder)
    assert view_settings(folder, 3) == {}
    assert "auto_map" in caplog.text and not proof.exists()


def test_an_encoder_in_parts_with_foreign_code_does_not_run(tmp_path: Path, proof: Path) -> None:
    from hf_ssl.modeling.encoder_parts import PARTS, describe_views
    from hf_ssl.views.color_spaces import ColorViews

    views = ColorViews("lab", (1, 2), (0.5,) * 3, (0.25,) * 3)
    for name in ("view_l", "view_ab"):
        foreign(tmp_path / "model" / name, proof)
    (tmp_path / "model" / PARTS).write_text(json.dumps(describe_views(views)))
    for load in (load_config, load_weights):
        with pytest.raises(UserError, match=mentions("view_l", "auto_map")):
            load(str(tmp_path / "model"))
    assert not proof.exists()


def test_a_type_of_transformers_loads_without_the_code_beside_it(tmp_path: Path, proof: Path) -> None:
    """The exported encoder then does not name this code."""
    folder = foreign(tmp_path / "known", proof, encoder=False, processor=False)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "foreign.ForeignConfig", "AutoModel": "foreign.ForeignModel"}
    (folder / "config.json").write_text(json.dumps(config))
    encoder, _ = load_encoder(str(folder))
    assert type(encoder) is ViTModel and not proof.exists()
    encoder.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def loading_calls(source: str) -> list[ast.Call]:
    """Return the calls that load something, without those of `super()`, which pass on their arguments."""
    if not any(name in source for name in LOADING):
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    found = [each for each in calls if isinstance(each.func, ast.Attribute) and each.func.attr in LOADING]
    return [each for each in found if ast.unparse(each.func.value) != "super()"]


def is_safe(call: ast.Call) -> bool:
    return any(
        each.arg == "trust_remote_code" and isinstance(each.value, ast.Constant) and each.value.value is False
        for each in call.keywords
    )


def test_every_call_that_loads_excludes_foreign_code() -> None:
    """Also where a type of transformers is certain, because the test cannot know it."""
    unsafe, count = [], 0
    for folder in ("hf_ssl", "spaces"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in loading_calls(path.read_text(encoding="utf-8")):
                count += 1
                if not is_safe(call):
                    unsafe.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert count > 15 and not unsafe


def test_every_text_that_loads_excludes_foreign_code() -> None:
    """The code in cards: strings of the source, and the templates."""
    call = re.compile(
        r"Auto\w+\.(?:from_pretrained|from_config)\(([^()]*(?:\{\{.*?\}\})?[^()]*)\)", re.DOTALL
    )
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "model_cards").rglob("*.md"))}
    for path in [ROOT / "hf_ssl" / "cards" / "usage.py"]:
        nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        strings = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        texts[path] = "\n".join(node.value for node in strings)
    found = [(path.name, given) for path, text in texts.items() for given in call.findall(text)]
    assert {name for name, _ in found} == {"card.md", "usage.py"}
    assert not [each for each in found if "trust_remote_code=False" not in each[1]]
