# SPDX-License-Identifier: Apache-2.0
"""Makes small changes to a source file, one at a time, like those of a programming mistake."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult, ast.Mod: ast.FloorDiv,
}  # fmt: skip
NAMES = {
    name: other
    for pair in (("min", "max"), ("amin", "amax"), ("mean", "sum"), ("sin", "cos"), ("any", "all"),
                 ("floor", "ceil"), ("argmin", "argmax"), ("exp", "log"), ("zeros", "ones"))
    for name, other in (pair, pair[::-1])
}  # fmt: skip


Place = tuple[ast.AST, str, int | None, ast.expr | ast.stmt]


@dataclass(frozen=True)
class Mutant:
    """One changed version of a file."""

    file: str
    line: int
    column: int
    change: str  # the smallest part that differs, before and after
    number: int  # index among all mutants of the file

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.column} {self.change}"


def mutants(file: str, source: str) -> list[Mutant]:
    """Return every mutant of a file. Messages, annotations and docstrings are never changed."""
    return [
        Mutant(file, node.lineno, node.col_offset, f"{_short(node)} -> {_short(changed)}", number)
        for number, ((*_, node), changed) in enumerate(_all_changes(ast.parse(source)))
    ]


def mutated(source: str, number: int) -> str:
    """Return the source with one change."""
    tree = ast.parse(source)
    (parent, field, index, _), changed = next(islice(_all_changes(tree), number, None))
    _put(parent, field, index, changed)
    return ast.unparse(ast.fix_missing_locations(tree))


def _all_changes(tree: ast.AST) -> Iterator[tuple[Place, ast.AST]]:
    for place in list(_places(tree)):
        for changed in _changes(place[-1]):
            yield place, changed


def _places(node: ast.AST) -> Iterator[Place]:
    """Yield each expression and statement that may be changed, with its place in the tree."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        several = isinstance(value, list)
        for index, child in enumerate(value if several else [value]):
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                continue
            if isinstance(child, ast.expr | ast.stmt):
                yield node, field, index if several else None, child
            yield from _places(child)


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def _changes(node: ast.expr | ast.stmt) -> Iterator[ast.AST]:
    """Yield the possible replacements of a node."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in COMPARISONS:
            yield _with(node, lambda new: setattr(new, "ops", [COMPARISONS[type(operator)]()]))
        case ast.BinOp(op=operator) | ast.AugAssign(op=operator) if type(operator) in OPERATORS:
            if not (isinstance(node, ast.BinOp) and isinstance(node.left, ast.Constant | ast.JoinedStr)
                    and isinstance(getattr(node.left, "value", ""), str)):  # fmt: skip
                yield _with(node, lambda new: setattr(new, "op", OPERATORS[type(operator)]()))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.BoolOp(op=operator):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield _with(node, lambda new: setattr(new, "op", other))
        case ast.Constant(value=bool(value)):
            yield ast.copy_location(ast.Constant(not value), node)
        case ast.Constant(value=int(number)):
            yield ast.copy_location(ast.Constant(number + 1), node)
        case ast.Constant(value=float(number)):
            yield ast.copy_location(ast.Constant(2 * number if number else 1.0), node)
        case ast.Name(id=name) if name in NAMES:
            yield ast.copy_location(ast.Name(NAMES[name], node.ctx), node)
        case ast.Call(func=ast.Attribute(value=inner, attr="detach" | "clone" | "contiguous" | "abs")):
            yield inner
        case ast.Attribute(attr=name) if name in NAMES:
            yield _with(node, lambda new: setattr(new, "attr", NAMES[name]))
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield ast.copy_location(ast.Pass(), node)
        case ast.If(test=test) | ast.IfExp(test=test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            negated = ast.UnaryOp(ast.Not(), test)
            yield _with(node, lambda new: setattr(new, "test", negated))


def _with(node: ast.AST, change: Callable[[ast.AST], None]) -> ast.AST:
    new = copy.copy(node)
    change(new)
    return new


def _short(node: ast.AST) -> str:
    """Return the text of an expression, or the first line of a statement."""
    if isinstance(node, ast.If):
        node = ast.If(node.test, [ast.Pass()], [])
    return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0][:100]
