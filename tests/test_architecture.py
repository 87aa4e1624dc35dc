# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and the limits of files. The tests read the sources and import nothing."""

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SPDX = "# SPDX-License-Identifier: Apache-2.0"
LONGEST_FILE = 300
GATHERS = "hf_ssl.modeling.gather"
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc"}

# Imports run from a higher number to a lower one, or stay within it.
LAYERS = {
    "hf_ssl.allocation": 0,
    "hf_ssl.effects": 0,
    "hf_ssl.errors": 0,
    "hf_ssl.files": 0,
    "hf_ssl.resources": 0,
    "hf_ssl.precision": 0,
    "hf_ssl.progress": 0,
    "hf_ssl.random": 0,
    "hf_ssl.sections": 0,
    "hf_ssl.signals": 0,
    "hf_ssl.weight_files": 0,
    "hf_ssl.losses": 0,
    "hf_ssl.views": 0,
    "hf_ssl.data": 1,
    "hf_ssl.modeling": 1,
    "hf_ssl.evaluation": 1,
    "hf_ssl.methods": 2,
    "hf_ssl.metrics": 2,
    "hf_ssl.auto": 2,
    "hf_ssl.names": 0,
    "hf_ssl.cards": 3,
    "hf_ssl.hub": 3,
    "hf_ssl.trainer": 4,
    "hf_ssl.conversion": 4,
    "hf_ssl.recipe": 5,
    "hf_ssl.building": 5,
    "hf_ssl.comparing": 5,
    "hf_ssl.output_folder": 5,
    "hf_ssl.plotted_images": 5,
    "hf_ssl.plotting": 5,
    "hf_ssl.projector": 5,
    "hf_ssl.recording": 5,
    "hf_ssl.run": 5,
    "hf_ssl.space": 5,
    "hf_ssl.study": 5,
    "hf_ssl.suite_file": 5,
    "hf_ssl.sweep_file": 5,
    "hf_ssl.sweep_results": 5,
    "hf_ssl.sweeps": 5,
    "hf_ssl.suites": 5,
    "hf_ssl.supervised": 5,
    "hf_ssl.cli": 5,
    "hf_ssl.commands": 5,
    "hf_ssl.__main__": 5,
    "hf_ssl": 6,
}

# Distributions whose module has another name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "pillow_heif": "pillow-heif",
    "sklearn": "scikit-learn",
    "faiss": "faiss-cpu",
    "umap": "umap-learn",
}


PRIVATE = set(
    # of torch
    "_BatchNorm _foreach_add _foreach_add_ _foreach_clamp_max_ _foreach_lerp_ _foreach_mul_ _foreach_norm "
    "_foreach_reciprocal_ _forward_hooks _forward_pre_hooks _inductor _shutdown_workers "
    # of transformers
    "_attn_implementation _can_record_outputs _commit_hash _load_best_model _save_optimizer_and_scheduler "
    "_save_rng_state _save_scaler "
    # of datasets, of accelerate, of evaluate, and of Python
    "_distributed _ex_iterable _shared_state _feature_names _getframe".split()
)
"""Private names of other libraries that hf_ssl reads. Any release can remove them (transformers 5.24 removed
`_commit_hash` from configurations), so use a public name if there is one."""


@dataclass(frozen=True)
class Import:
    """An import statement.

    Attributes:
        target: the dotted name of the imported object, as deep as the statement says.
        deferred: whether the import is inside a function.
        for_types: whether it is inside `if TYPE_CHECKING`.
    """

    target: str
    deferred: bool
    for_types: bool = False


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return the file of every module of the package by its dotted name."""
    found = {}
    for path in sorted((root / "hf_ssl").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str) -> Iterator[Import]:
    """Yield every import of a module, also those inside functions and inside `if TYPE_CHECKING`."""

    def visit(node: ast.AST, deferred: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for part in child.body:
                    yield from visit(ast.Module([part], []), deferred, True)
                for part in child.orelse:
                    yield from visit(ast.Module([part], []), deferred, for_types)
            elif isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, deferred, for_types)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    yield Import(f"{'.' * child.level}{child.module or ''}.{alias.name}", deferred, for_types)
            else:
                inside = deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, inside, for_types)

    return visit(ast.parse(source), False, False)


def lazy_modules(sources: dict[str, str]) -> dict[str, str]:
    """Return the module of each lazy name of a package: hf_ssl.views.crop -> hf_ssl.views.cropping."""
    return {
        f"{package}.{item.target.rpartition('.')[2]}": item.target.rpartition(".")[0]
        for package, source in sources.items()
        if "lazy_names(" in source
        for item in imports(source)
        if item.for_types
    }


def resolve(target: str, known: dict[str, str], module_of: dict[str, str] | None = None) -> str | None:
    """Return the module of hf_ssl that an import names; None for other packages."""
    target = (module_of or {}).get(target, target)
    while target:
        if target in known:
            return target
        target = target.rpartition(".")[0]
    return None


def room(module: str) -> str:
    """The part of the house that a module belongs to: a package or a file directly below hf_ssl."""
    return ".".join(module.split(".")[:2])


def wrong_directions(sources: dict[str, str]) -> list[str]:
    """Imports that run upwards, at any depth of the code, and rooms that no layer is known of."""
    problems = [f"{module} has no layer" for module in sources if room(module) not in LAYERS]
    for module, source in sources.items():
        for item in imports(source):
            target = resolve(item.target, sources)
            if item.target.startswith("."):
                problems.append(f"{module} imports {item.target} relatively")
            elif target is not None and item.target != "hf_ssl.__version__":
                if LAYERS.get(room(target), 0) > LAYERS.get(room(module), 0):
                    problems.append(f"{module} imports {item.target}, which is above it")
    return problems


def circle(sources: dict[str, str]) -> list[str]:
    """Return modules or packages that import each other, at any time and also only for type checkers.

    Lazy names count as the modules that define them. The imports of a package's `__init__` for type checkers
    do not count, because they are the lazy names.
    """
    module_of = lazy_modules(sources)
    by_module: dict[str, set[str]] = {}
    by_room: dict[str, set[str]] = {}
    for module, source in sources.items():
        for item in imports(source):
            target = resolve(item.target, sources, module_of)
            if target is None or target in (module, "hf_ssl") or (item.for_types and "lazy_names(" in source):
                continue
            by_module.setdefault(module, set()).add(target)
            if room(target) != room(module):
                by_room.setdefault(room(module), set()).add(room(target))
    for graph in (by_module, by_room):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            return list(error.args[1])
    return []


def open_ended_forwards(source: str) -> list[str]:
    """Classes whose `forward` or `embed` takes `**kwargs`: transformers would then rescale the loss, and
    typos would vanish."""
    return [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for function in node.body
        if isinstance(function, ast.FunctionDef)
        and function.name in ("forward", "embed")
        and function.args.kwarg
    ]


def touches_process_groups(source: str) -> bool:
    """Whether a file imports torch.distributed or uses it through torch."""
    if any(item.target.startswith("torch.distributed") for item in imports(source)):
        return True
    return any(
        isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed")
        for node in ast.walk(ast.parse(source))
    )


def undeclared(sources: dict[str, str], declared: set[str]) -> set[str]:
    """Third-party packages that are imported and not declared."""
    found = {item.target.split(".")[0] for source in sources.values() for item in imports(source)}
    third_party = found - set(sys.stdlib_module_names) - {"hf_ssl", "__future__", ""}
    return {DISTRIBUTIONS.get(name, name) for name in third_party} - declared


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return {name: path.read_text(encoding="utf-8") for name, path in modules().items()}


def python_files() -> list[Path]:
    return [
        path for folder in ("hf_ssl", "training", "spaces", "tests") for path in (ROOT / folder).rglob("*.py")
    ]


def test_imports_run_downwards(sources: dict[str, str]) -> None:
    assert wrong_directions(sources) == []


def test_no_circles(sources: dict[str, str]) -> None:
    assert circle(sources) == []


def test_forwards_are_contracts(sources: dict[str, str]) -> None:
    rooms = ("hf_ssl.methods", "hf_ssl.modeling")
    assert {name: open_ended_forwards(text) for name, text in sources.items() if room(name) in rooms} == {
        name: [] for name in sources if room(name) in rooms
    }


def test_one_file_knows_about_process_groups(sources: dict[str, str]) -> None:
    assert [name for name, text in sources.items() if touches_process_groups(text)] == [GATHERS]


def foreign_private_names(sources: dict[str, str]) -> set[str]:
    """Return the private names that sources read and that none of them defines."""
    used, defined = set[str](), set[str]()
    for node in (node for source in sources.values() for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            used.add(node.attr)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            defined.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not str(node.module).startswith("hf_ssl"):
            used.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            used.update(str(each.value) for each in node.args[1:2] if isinstance(each, ast.Constant))
    return {name for name in used - defined if name.startswith("_") and not name.startswith("__")}


def test_private_names_of_other_libraries_are_listed(sources: dict[str, str]) -> None:
    assert foreign_private_names(sources) == PRIVATE
    assert foreign_private_names({"a": "getattr(x, '_y', None)\nself._z = x._w\nx._z"}) == {"_y", "_w"}


def test_losses_and_views_know_no_model(sources: dict[str, str]) -> None:
    known = {
        name: {item.target.split(".")[0] for item in imports(text)}
        & {"transformers", "datasets", "accelerate"}
        for name, text in sources.items()
        if room(name) in ("hf_ssl.losses", "hf_ssl.views")
    }
    assert all(not found for found in known.values()), known


def lines_of_code(source: str) -> int:
    """Return the number of lines with code, without blank lines, comments and docstrings."""
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines: set[int] = set()
    for token in tokens:
        if token.type not in ignored and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_lines_of_code_are_counted_without_docstrings_and_comments() -> None:
    assert lines_of_code('"""One.\n\nTwo."""\n\nx = 1  # three\n# four\ny = (\n    2,\n)\n') == 4


def test_files_fit_in_a_head() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in python_files()
        if path.is_relative_to(ROOT / "hf_ssl") or path.is_relative_to(ROOT / "training")
        if (lines := lines_of_code(path.read_text(encoding="utf-8"))) > LONGEST_FILE
    }
    assert long == {}


def test_every_file_has_its_license() -> None:
    recipes = [
        path for folder in ("recipes", "suites") for path in (ROOT / "training" / folder).rglob("*.yaml")
    ]
    files = [*python_files(), *recipes]
    assert [str(path) for path in files if path.read_text(encoding="utf-8").split("\n", 1)[0] != SPDX] == []


def test_names_say_what_is_inside() -> None:
    assert [str(path) for path in python_files() if path.stem in VAGUE] == []


def test_every_import_is_declared(sources: dict[str, str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [
        name
        for extra in ("timm", "demo", "plots", "detection", "formats", "scientific")
        for name in project["optional-dependencies"][extra]
    ]
    requirements = [*project["dependencies"], *extras]
    declared = {re.split(r"[<>=\[ ]", requirement)[0] for requirement in requirements}
    assert undeclared(sources, declared) == set()


# The rules themselves, on sources that break them.

BAD = {
    "hf_ssl": "",
    "hf_ssl.losses": "",
    "hf_ssl.losses.triplet": "def f():\n    from hf_ssl.trainer import x\n",
    "hf_ssl.trainer": "import torch\n",
    "hf_ssl.data": "from hf_ssl import views\n",
    "hf_ssl.views": "if TYPE_CHECKING:\n    from hf_ssl.trainer import x\n",  # only for type checkers
}


def test_upward_imports_are_seen() -> None:
    assert wrong_directions(BAD) == [
        "hf_ssl.losses.triplet imports hf_ssl.trainer.x, which is above it",
        "hf_ssl.views imports hf_ssl.trainer.x, which is above it",
    ]
    assert wrong_directions({"hf_ssl.attic": ""}) == ["hf_ssl.attic has no layer"]
    assert wrong_directions({"hf_ssl.views": "from . import preset"}) == [
        "hf_ssl.views imports ..preset relatively"
    ]
    assert wrong_directions({"hf_ssl": "", "hf_ssl.views": "from hf_ssl import run"}) == [
        "hf_ssl.views imports hf_ssl.run, which is above it"
    ]
    assert wrong_directions({"hf_ssl": "", "hf_ssl.hub": "from hf_ssl import __version__"}) == []


def test_circles_are_seen() -> None:
    assert circle({"hf_ssl.data.a": "import hf_ssl.data.b", "hf_ssl.data.b": "from hf_ssl.data.a import x"})
    deferred, for_types = "def f():\n    import hf_ssl.", "if TYPE_CHECKING:\n    import hf_ssl."
    assert circle({"hf_ssl.data.a": "import hf_ssl.data.b", "hf_ssl.data.b": f"{deferred}data.a"})
    assert circle({"hf_ssl.data.a": "import hf_ssl.data.b", "hf_ssl.data.b": f"{for_types}data.a"})
    lazy = "if TYPE_CHECKING:\n    from hf_ssl.data.a import x\nlazy_names(__name__, __file__)"
    assert circle(
        {"hf_ssl.data": lazy, "hf_ssl.data.a": "import hf_ssl.b", "hf_ssl.b": "from hf_ssl.data import x"}
    )
    assert circle({"hf_ssl.data.a": "import hf_ssl.modeling.b", "hf_ssl.modeling.b": f"{deferred}data.a"})
    assert not circle(BAD | {"hf_ssl.losses.triplet": ""})


def test_other_breaches_are_seen() -> None:
    assert open_ended_forwards("class A:\n    def forward(self, x, **kwargs): ...") == ["A"]
    assert (
        open_ended_forwards("class A:\n    def forward(self, x): ...\n    def other(self, **kwargs): ...")
        == []
    )
    for source in (
        "import torch.distributed as dist",
        "from torch import distributed",
        "x = torch.distributed.rank()",
    ):
        assert touches_process_groups(source), source
    assert not touches_process_groups("import torch\nx = torch.distributions")
    assert undeclared({"a": "import numpy, os\nfrom PIL import Image\nimport hf_ssl.views"}, {"numpy"}) == {
        "pillow"
    }
