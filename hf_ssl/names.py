# SPDX-License-Identifier: Apache-2.0
"""Public names: their import at the first use, and the deprecated names of this release (layer 0)."""

import ast
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from hf_ssl.errors import suggestion

Anything = TypeVar("Anything", bound=Callable[..., Any])

RENAMED_KEYS = {
    "evaluation.neighbours": "evaluation.neighbors",
    "evaluation.settings.few_label_knn.labels": "evaluation.settings.few_label_knn.labels_per_class",
    "training.monitor_neighbours": "training.monitor_neighbors",
    "training.lars_trust_coefficient": "training.lars.trust_coefficient",
    "training.lars_variant": "training.lars.variant",
    "training.lars_clip": "training.lars.clip",
    "training.lars_adapt_all_parameters": "training.lars.adapt_all_parameters",
}
"""Deprecated key of a recipe -> its replacement. The old key works for one more release."""


def renamed_keys(*sections: str) -> dict[str, str]:
    """Return {deprecated key: its replacement} of these sections, without the name of the section.

    The section is all but the last part of the deprecated key, such as "evaluation.settings.few_label_knn".
    """
    split = [(*old.rpartition(".")[::2], new) for old, new in RENAMED_KEYS.items()]
    return {key: new.removeprefix(f"{section}.") for section, key, new in split if section in sections}


class DeprecatedSetting(FutureWarning):
    """A warning about a deprecated key or argument. The command line shows it without a source line."""


def warn_deprecated(message: str) -> None:
    """Issue a `DeprecatedSetting` warning for the line of the user's code that called hf_ssl."""
    package, level = str(Path(__file__).parent), 2
    frame = sys._getframe(1)
    # The constructor of a dataclass has the file name <string>.
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith((package, "<string>")) or "omegaconf" in frame.f_code.co_filename
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DeprecatedSetting, stacklevel=level)


def lazy_names(
    package: str,
    file: str,
    *,
    modules: Sequence[str] = (),
    further: Mapping[str, str] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` for the `__init__.py` of a package.

    The public names are those that the `if TYPE_CHECKING:` block of the file imports, in the form
    `from module import name`. Type checkers read the same block.

    Args:
        package: `__name__` of the package.
        file: `__file__` of the package.
        modules: modules of the package that are public names themselves.
        further: public name -> its module, for names that the block does not import.
        renamed: deprecated name -> its replacement, e.g. "hf_ssl.views.augment". The old name works for one
            more release, with a DeprecationWarning.
    """
    module_of = _names_for_type_checkers(file) | dict(further or {})
    public = sorted({*module_of, *modules})

    def get(name: str) -> Any:
        if renamed is not None and name in renamed:
            module, _, new = renamed[name].rpartition(".")
            message = f"{package}.{name} is deprecated; use {module}.{new}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return getattr(import_module(module), new)
        if name in module_of:
            value = getattr(import_module(module_of[name]), name)
        elif name in modules:
            value = import_module(f"{package}.{name}")
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: public, public


def _names_for_type_checkers(file: str) -> dict[str, str]:
    """Return {name: module} of the imports in the `if TYPE_CHECKING:` block of a Python file."""
    module_of: dict[str, str] = {}
    for block in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for statement in block.body:
                if isinstance(statement, ast.ImportFrom) and statement.module is not None:
                    module_of |= {alias.name: statement.module for alias in statement.names}
    return module_of


def renamed_arguments(**renamed: str) -> Callable[[Anything], Anything]:
    """Return a decorator for a function or a dataclass whose arguments have new names.

    A deprecated name still works as a keyword for one more release, with a FutureWarning.

    A misspelled keyword of a dataclass raises a TypeError with a suggestion.

    Args:
        renamed: deprecated name -> its replacement, for example "lars.variant" for a field of `lars`.
    """

    def decorate(function: Any) -> Any:
        original: Any = vars(function)["__init__"] if isinstance(function, type) else function
        known = [field.name for field in fields(function)] if is_dataclass(function) else []

        @wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            for old in renamed.keys() & kwargs.keys():
                message = f"{function.__name__}: the argument {old} is deprecated; use {renamed[old]}"
                warnings.warn(message, FutureWarning, stacklevel=2)
                _move(kwargs, old, renamed[old])
            for name in kwargs if known else ():
                if name not in known:
                    raise TypeError(
                        f"{function.__name__}: unknown argument {name}; {suggestion(name, known)}"
                    )
            return original(*args, **kwargs)

        if not isinstance(function, type):
            return wrapped
        setattr(function, "__init__", wrapped)  # noqa: B010  mypy rejects the assignment
        return function

    return decorate


def with_current_keys(record: Any) -> Any:
    """Return data that a run of an older version stored, with the current names of keys at any depth.

    Args:
        record: plain data: facts, results, or arguments of a recipe.
    """
    if isinstance(record, dict):
        record = {RENAMED_KEYS.get(key, key): with_current_keys(value) for key, value in record.items()}
        for old, new in renamed_keys("evaluation", "training").items():
            if old in record:
                _move(record, old, new)
        return record
    return [with_current_keys(value) for value in record] if isinstance(record, list) else record


def _move(values: dict[str, Any], old: str, new: str) -> None:
    """Move a value to its new key, in place. The key "group.field" is a field in a dict or a dataclass."""
    group, dot, field = new.partition(".")
    value, current = values.pop(old), values.get(group) or {}
    values[group] = (
        {**(current if isinstance(current, dict) else vars(current)), field: value} if dot else value
    )


@contextmanager
def short_deprecations() -> Iterator[None]:
    """Show warnings about deprecated keys as one line, without the source line that Python adds."""
    usual = warnings.formatwarning

    def short(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if issubclass(category, DeprecatedSetting):
            return f"hf-ssl: {message}\n"
        return usual(message, category, *where, **line)

    setattr(warnings, "formatwarning", short)  # noqa: B010  mypy rejects the assignment
    try:
        yield
    finally:
        warnings.formatwarning = usual
