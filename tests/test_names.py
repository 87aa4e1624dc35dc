# SPDX-License-Identifier: Apache-2.0
"""Public names are imported at their first use, from the imports that a package has for type checkers."""

import math
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

import hf_ssl
from hf_ssl.evaluation import EvaluationConfig
from hf_ssl.names import lazy_names, renamed_arguments
from hf_ssl.recipe import load_recipe

ROOT = Path(hf_ssl.__file__).parent
LAZY = sorted(
    path.parent.relative_to(ROOT.parent).as_posix().replace("/", ".")
    for path in ROOT.rglob("__init__.py")
    if "lazy_names(" in path.read_text()
)


@pytest.mark.parametrize("package", LAZY)
def test_every_name_exists(package: str) -> None:
    module = import_module(package)
    assert module.__all__ and set(dir(module)) >= set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in vars(module)  # the second use costs nothing
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        module.unknown  # noqa: B018


def test_public_names_are_the_imports_for_type_checkers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "__init__.py"
    file.write_text(
        "from os import getcwd\n"
        "if TYPE_CHECKING:\n    import io\n    from math import (\n        pi,\n        tau as tau,\n    )\n"
        "if other:\n    from math import e\n"
    )
    package = ModuleType("painting")
    monkeypatch.setitem(sys.modules, "painting", package)
    options = {"modules": ["color"], "further": {"sqrt": "math"}, "renamed": {"Tau": "math.tau"}}
    get, directory, public = lazy_names("painting", str(file), **options)
    assert directory() == public == ["color", "pi", "sqrt", "tau"]
    assert (get("tau"), get("sqrt")(4)) == (math.tau, 2)
    assert vars(package)["tau"] == math.tau
    with pytest.warns(DeprecationWarning, match=r"painting.Tau is deprecated; use math.tau"):
        assert get("Tau") == math.tau
    with pytest.raises(ModuleNotFoundError, match=r"painting.color"):
        get("color")
    with pytest.raises(AttributeError, match="module 'painting' has no attribute 'e'"):
        get("e")


@pytest.mark.parametrize(
    ("called", "given"),
    [
        ("hf_ssl.evaluation.EvaluationConfig", {"neighbours": [3]}),
        ("hf_ssl.SSLTrainingArguments", {"monitor_neighbours": 3}),
    ],
)
def test_renamed_arguments_of_settings(called: str, given: dict, recwarn: pytest.WarningsRecorder) -> None:
    package, _, name = called.rpartition(".")
    settings = getattr(import_module(package), name)
    ((old, value),) = given.items()
    new = old.replace("neighbours", "neighbors")
    with pytest.warns(FutureWarning, match=f"{name}: the argument {old} is deprecated; use {new}"):
        found = settings(**given)
    recwarn.clear()
    assert found == settings(**{new: value})
    assert not [item for item in recwarn if old in str(item.message)]


def test_renamed_arguments_of_functions() -> None:
    @renamed_arguments(colour="color")
    def paint(color: str = "red", *, coats: int = 1) -> tuple[str, int]:
        """Return both."""
        return color, coats

    assert paint("blue", coats=2) == ("blue", 2) and paint.__doc__ == "Return both."
    with pytest.warns(FutureWarning, match="paint: the argument colour is deprecated; use color"):
        assert paint(colour="blue") == ("blue", 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("LabelledImages", "LabeledData"),
        ("Neighbour", "Neighbor"),
        ("attention_mask_of", "threshold_attention"),
        ("pca_colours", "pca_colors"),
        ("spotlight", "darken_outside_mask"),
    ],
)
def test_old_names_of_the_evaluation_work(old: str, new: str) -> None:
    evaluation = import_module("hf_ssl.evaluation")
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(evaluation, old) is getattr(evaluation, new)


def test_the_warning_about_a_deprecated_setting_has_the_line_of_the_user() -> None:
    for given in (lambda: EvaluationConfig(draws=3), lambda: EvaluationConfig.of({"draws": 3})):
        with pytest.warns(FutureWarning, match="evaluation.draws") as found:
            given()
        assert [item.filename for item in found] == [__file__]
    with pytest.warns(FutureWarning, match="evaluation.neighbours") as found:
        load_recipe("smoke/simclr", ["evaluation.neighbours=[3]"])
    assert {item.filename for item in found} == {__file__}
