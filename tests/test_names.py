# SPDX-License-Identifier: Apache-2.0
"""Public names are imported at their first use; the lists for programs and for type checkers agree."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import hf_ssl
from hf_ssl.names import renamed_arguments

ROOT = Path(hf_ssl.__file__).parent
LAZY = sorted(
    path.parent.relative_to(ROOT.parent).as_posix().replace("/", ".")
    for path in ROOT.rglob("__init__.py")
    if "lazy_names(" in path.read_text()
)


def for_type_checkers(package: str) -> set[str]:
    """Return the names that `if TYPE_CHECKING` imports in the package."""
    tree = ast.parse(Path(import_module(package).__file__).read_text())
    blocks = [
        node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    statements = [part for block in blocks for part in block.body if isinstance(part, ast.ImportFrom)]
    return {alias.asname or alias.name for statement in statements for alias in statement.names}


@pytest.mark.parametrize("package", LAZY)
def test_every_name_exists_and_type_checkers_know_it(package: str) -> None:
    module = import_module(package)
    assert module.__all__ and set(dir(module)) >= set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        assert name in vars(module)  # the second use costs nothing
    if package != "hf_ssl":  # the methods' classes come from the table
        assert for_type_checkers(package) == set(module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'unknown'"):
        module.unknown  # noqa: B018


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
        assert getattr(settings(**given), new) == value
    recwarn.clear()
    assert getattr(settings(**{new: value}), new) == value
    assert not [item for item in recwarn if item.category is FutureWarning]


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
