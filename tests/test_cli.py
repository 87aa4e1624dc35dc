# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, what it calls, and that a mistake ends in one sentence and status 2."""

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from forks import Forks
from messages import mentions, missing
from omegaconf import OmegaConf

import hf_ssl
from hf_ssl import evaluation, run, space
from hf_ssl.cli import main
from hf_ssl.data import DataConfig
from hf_ssl.errors import UserError
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.evaluation.protocols import DEFAULT_PROTOCOLS, PROTOCOLS
from hf_ssl.hub import export
from hf_ssl.methods import METHODS
from hf_ssl.names import DeprecatedSetting, short_deprecations
from hf_ssl.recipe.source import apply_overrides
from hf_ssl.resources import recipe_files

ROOT = Path(__file__).parent.parent


def record(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    result: Callable[..., object] = lambda *a: {},
    module: ModuleType = run,
) -> list:
    """Replace a function and return the list of the arguments it is called with, options last."""
    calls: list = []

    def called(*arguments: object, **options: object) -> object:
        calls.append((*arguments, options) if options else arguments)
        return result(*arguments, **options)

    monkeypatch.setattr(module, name, called)
    return calls


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence on stderr of a command that must end with status 2 and print nothing else."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *_, sentence = captured.err.splitlines()
    assert sentence.startswith("hf-ssl: ") and "Traceback" not in captured.err
    return sentence


def test_pretrain_hands_over_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, "pretrain")
    assert main(["pretrain", "smoke/simclr", "training.max_steps=3"]) == 0
    ((recipe,),) = calls
    assert (recipe.name, recipe.training["max_steps"]) == ("smoke/simclr", 3)


def test_evaluate_hands_over_model_and_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, "evaluate")
    assert main(["evaluate", "folder", "data.path=digits", "evaluation.draws=2"]) == 0
    assert calls == [("folder", DataConfig(path="digits"), EvaluationConfig(draws=2), None, "encoder", False)]


def test_the_default_protocols_are_chosen_if_the_command_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, "evaluate")
    default = f"evaluation.protocols=[{','.join(DEFAULT_PROTOCOLS)}]"
    assert main(["evaluate", "folder", "data.path=digits", default]) == 0
    assert calls[0][2] == EvaluationConfig() and calls[0][-1] is True


def test_a_number_that_is_not_finite_keeps_the_other_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results = {"encoder": {"protocols": [{"value": math.nan}, {"value": 0.5}], "skipped": ["no file /a/b/c"]}}
    measured = results, {"model": "x"}, SimpleNamespace(revision="1")
    monkeypatch.setattr(run, "_evaluate", lambda *arguments: measured)
    monkeypatch.setattr(run, "terminal_text", str)
    monkeypatch.setattr(run, "write_plots", lambda *arguments: [])
    run.evaluate("x", DataConfig(), EvaluationConfig(), tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["encoder"] == {"protocols": [{"value": None}, {"value": 0.5}], "skipped": ["no file c"]}
    assert stored["evaluated"] == {"model": "x"}


def test_two_lists_of_protocols_are_a_mistake(capsys) -> None:
    assert main(["evaluate", "folder", "--protocols", "knn,ridge", "evaluation.protocols=[linear]"]) == 2
    error = capsys.readouterr().err
    assert not missing(error, "--protocols", "knn,ridge", "evaluation.protocols", "linear")


def test_the_warning_about_a_deprecated_key_is_one_line() -> None:
    warning = DeprecatedSetting("old is deprecated; use new")
    with short_deprecations():
        assert warnings.formatwarning(warning, DeprecatedSetting, "file.py", 3) == f"hf-ssl: {warning}\n"
        assert "file.py:3" in warnings.formatwarning(UserWarning("x"), UserWarning, "file.py", 3, line="")
    assert "file.py:3" in warnings.formatwarning(warning, DeprecatedSetting, "file.py", 3, line="")


def test_all_protocols_are_those_that_take_no_training_of_many_epochs(monkeypatch) -> None:
    calls = record(monkeypatch, "evaluate")
    assert main(["evaluate", "folder", "data.path=digits", "--protocols", "all"]) == 0
    chosen = calls[0][2].protocols
    assert {"knn", "linear", "attentive", "ridge", "quality"} <= set(chosen)
    assert set(PROTOCOLS) - set(chosen) == {"linear_augmented", "fine_tune", "detection"}


def test_a_value_with_blanks_needs_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    """The shell splits it, and the message must not show only the text that the user has typed."""
    with pytest.raises(SystemExit):
        main(
            ["evaluate", "folder", "data.path=digits", "--protocols", "knn", "evaluation.draws=[20,", "200]"]
        )
    assert 'in quotes: "evaluation.draws=[20, 200]"' in capsys.readouterr().err


def test_a_setting_with_dashes_is_named_without_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["pretrain", "smoke/simclr", "--data.path=photos", "training.max_steps=5"])
    error = capsys.readouterr().err
    assert "--data.path=photos" in error and error.endswith(" data.path=photos\n")
    with pytest.raises(SystemExit):
        main(["export", "run", "encoder", "--data.path=photos"])  # a command without settings
    assert "dashes" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("max_steps=5", "SECTION.max_steps=5"),
        ("training.max_steps", "training.max_steps=VALUE"),
        ("photos", "data.path=photos"),
    ],
)
def test_an_override_of_a_wrong_form_is_answered_with_what_to_type(override: str, advice: str) -> None:
    with pytest.raises(UserError, match=mentions(advice)):
        apply_overrides({}, [override])


def test_settings_may_follow_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = record(monkeypatch, "evaluate")
    before = ["evaluate", "folder", "data.path=digits", "--protocols", "knn", "--output", "results"]
    after = ["evaluate", "folder", "--protocols", "knn", "data.path=digits", "--output", "results"]
    assert main(before) == main(after) == 0
    config = EvaluationConfig(protocols=["knn"])
    assert calls == [("folder", DataConfig(path="digits"), config, Path("results"), "encoder", True)] * 2
    for wrong in (["--output", "results", "other"], ["--outptu=results"]):
        with pytest.raises(SystemExit):
            main(["evaluate", "folder", "data.path=digits", *wrong])
        assert wrong[-1] in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "run", "encoder", "data.path=digits"])  # a command without settings


def test_export_hands_over_both_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(export, "export_checkpoint", lambda *arguments: calls.append(arguments))
    assert main(["export", "run/checkpoint-5", "encoder"]) == 0
    assert calls == [(Path("run/checkpoint-5"), Path("encoder"))]


def test_demo_hands_over_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = record(monkeypatch, "demo")
    assert main(["demo", "training.seed=3"]) == 0
    assert main(["demo", "--no-space"]) == 0
    assert calls == [(["training.seed=3"], True), ([], False)]


def test_attention_hands_over_photos(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = record(monkeypatch, "write_attention_pictures", lambda *a, **o: [Path("out/a")], evaluation)
    assert main(["attention", "folder", "a.jpg", "b.png", "--output", "out", "--size", "480"]) == 0
    options = {"layer": -1, "size": 480, "value_range": None}
    assert calls == [("folder", [Path("a.jpg"), Path("b.png")], Path("out"), options)]
    assert capsys.readouterr().out == "pictures in out/a\noverview in out/overview.png\n"


def test_space_hands_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    built = record(monkeypatch, "build_space", lambda *a, **o: {}, space)
    served = record(monkeypatch, "run_space", lambda *a: None, space)
    assert main(["space", "build", "folder", "my page", "data.path=digits", "--images", "50"]) == 0
    assert "hf-ssl space run 'my page'" in capsys.readouterr().out, "a command to copy"
    assert main(["space", "run", "page", "--port", "9000"]) == 0
    options = {"images": 50, "title": None, "chosen_split": False}
    assert built == [("folder", Path("my page"), DataConfig(path="digits"), options)]
    assert served == [(Path("page"), "127.0.0.1", 9000)]


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(method.summary in line for method, line in zip(METHODS.values(), lines, strict=True))


def test_recipes_are_listed_with_their_titles(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert sorted(line.split()[0] for line in lines) == sorted(recipe_files())
    assert all(len(line.split(maxsplit=1)) == 2 and "SPDX" not in line for line in lines)


def test_recipes_are_grouped_by_their_data(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    heading, groups = "", {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            groups[line.split()[0]] = heading
        else:
            heading = line
    for name, file in recipe_files().items():
        path = str(OmegaConf.to_container(OmegaConf.load(file))["data"]["path"])
        words = {"???": "your own images", "digits": "handwritten digits"}
        assert words.get(path, path) in groups[name], name


def test_what_only_prints_is_quick() -> None:
    """No torch, no transformers, no OmegaConf: asserted by what is loaded, not by time."""
    code = (
        "import sys\n"
        "from hf_ssl.cli import main\n"
        "helps = [['--help'], ['pretrain', '--help'], ['space', 'run', '--help']]\n"
        "for command in (['methods'], ['recipes'], *helps):\n"
        "    try: main(command)\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'evaluate', 'numpy', 'omegaconf', 'PIL'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_names_are_found_before_the_slow_imports(tmp_path: Path) -> None:
    """Names of recipes, studies and releases, and missing files."""
    code = (
        "import sys\n"
        "from hf_ssl.cli import main\n"
        "convert = ['convert', 'weights.pth', '--output', 'encoder', '--from']\n"
        "commands = [[name, 'smoke/simcrl'] for name in ('pretrain', 'supervise', 'sweep')]\n"
        "commands += [['sweep', 'batch_sizes'], [*convert, 'mocco'], [*convert, 'moco']]\n"
        "for command in commands: assert main(command) == 2\n"
        "heavy = {'torch', 'transformers', 'datasets'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hf-ssl: ")]
    names = ("smoke/simclr", "smoke/simclr", "smoke/simclr", "batch_size", "moco", "moco_v1_200ep")
    assert [missing(line, name) for line, name in zip(lines, names, strict=True)] == [[]] * 6


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("runpy.run_module('hf_ssl', run_name='__main__', alter_sys=True)", ["pretrain", "smoke/simcrl"]),
        (f"runpy.run_path({str(ROOT / 'training/pretrain.py')!r}, run_name='__main__')", ["smoke/simcrl"]),
    ],
    ids=["python -m hf_ssl", "training/pretrain.py"],
)
def test_entry_points_return_the_status(
    forks: Forks, tmp_path: Path, code: str, arguments: list[str]
) -> None:
    done = forks.run("hf_ssl", f"import runpy; {code}", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert missing(done.stderr.splitlines()[-1], "hf-ssl:", "smoke/simcrl", "smoke/simclr") == []
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["pretrain", "simcrl"], ["recipe", "simcrl"]),
        (["pretrain", "smoke/simclr", "method.name=simcrl"], ["method", "simcrl", "simclr"]),
        (["pretrain", "smoke/simclr", "training.max_step=1"], ["training.max_step", "training.max_steps"]),
        (["pretrain", "smoke/simclr", "training.max_steps=few"], ["training.max_steps", "few"]),
        (["pretrain", "simclr_vit_small"], ["data.path"]),
        (["evaluate", "folder"], ["data.path"]),
        (["space", "build", "folder", "page"], ["data.path"]),
        (["space", "run", "nowhere"], ["nowhere", "hf-ssl space build"]),
        (["attention", "nowhere", "a.png", "--output", "b"], ["nowhere"]),
        (["evaluate", "folder", "data.path=digits", "training.seed=1"], ["training"]),
    ],
)
def test_mistakes_end_in_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert missing(refused(capsys, *arguments), *parts) == []


# Mistakes that are seen once data or folders are opened; nothing may be left behind by them.
LATE = {
    "data.path=nowhere/at_all": "nowhere/at_all",
    "data.path=some/dataset": "some/dataset",
    "data.split=trian": "trian",
    "data.image_column=picture": "picture",
    "training.batch_size=5000": "5000",
}


@pytest.mark.parametrize("override", LATE)
def test_late_mistakes_leave_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, override: str
) -> None:
    output = tmp_path / "run"
    command = ["pretrain", "smoke/simclr", f"training.output_dir={output}", override]
    assert LATE[override] in refused(capsys, *command)
    assert not output.exists()


def test_a_folder_of_somebody_else_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    sentence = refused(capsys, "pretrain", "smoke/simclr", f"training.output_dir={tmp_path}")
    assert "thesis.tex" in sentence and str(tmp_path) in sentence
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_resume_needs_something_to_resume(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record(monkeypatch, "pretrain")
    command = ["pretrain", "smoke/simclr", f"training.output_dir={tmp_path}", "--resume"]
    assert missing(refused(capsys, *command), tmp_path) == []
    (tmp_path / "checkpoint-old").mkdir()  # a copy that a user made: the run would start at step 0
    (tmp_path / "checkpoint-8").touch()
    assert missing(refused(capsys, *command), tmp_path) == []
    (tmp_path / "checkpoint-4").mkdir()
    assert main(command) == 0
    assert len(calls) == 1


def test_a_user_error_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise UserError("expected a, got b")

    record(monkeypatch, "demo", fail)
    assert refused(capsys, "demo") == "hf-ssl: expected a, got b"


def test_a_full_disk_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/model.safetensors")

    record(monkeypatch, "demo", fail)
    assert missing(refused(capsys, "demo"), "no space left", "runs/model.safetensors") == []


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    record(monkeypatch, "demo", fail)
    assert main(["demo"]) == 130


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EACCES, "denied")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*arguments: object) -> None:
        raise error

    record(monkeypatch, "demo", fail)
    with pytest.raises(type(error)):
        main(["demo"])


def test_unknown_commands_are_refused() -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["pretain", "smoke/simclr"])
    assert stopped.value.code == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal for a closed pipe")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_stops_ends_the_command_without_a_traceback(unbuffered: str) -> None:
    """As `hf-ssl recipes | head -1` does."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "hf_ssl", "recipes"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_without_a_command_the_commands_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, part in (([], "pretrain"), (["--version"], f"hf_ssl {hf_ssl.__version__}")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0 and part in capsys.readouterr().out
