"""Mistakes to plant: one small change of a source file each, such as people make, found by walking its syntax."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FLIPPED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.GtE),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.LtE),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
DROPPED = {"detach", "abs", "clamp", "square", "sqrt", "exp", "log", "flip", "cumsum", "float", "double", "strip"}
"""Methods whose call is left out."""
RENAMED = {"mean": "sum", "sum": "mean", "max": "min", "min": "max", "any": "all", "all": "any"}
RENAMED |= {"argmax": "argmin", "argmin": "argmax", "zeros": "ones", "ones": "zeros", "amax": "amin", "ceil": "floor"}
RENAMED |= {"new_zeros": "new_ones", "zeros_like": "ones_like", "ones_like": "zeros_like", "sorted": "list"}
SILENT = {"warn", "print", "info", "debug", "add_argument", "Card", "Option", "arg", "conf", "Annotated", "TypeVar"}
"""Calls that speak or declare: a mistake in a message, a page of help or a type is none in a result."""
ALIKE = {"device", "encoding", "strict", "stacklevel", "dtype_hint", "help", "timeout"}
"""Keywords that change nothing where all is right: the only device is the processor, and zipped lists are as long."""
TYPED = {"isinstance", "issubclass", "hasattr", "getattr", "setattr", "replace", "fullmatch", "match", "search"}
"""Calls whose first two arguments are of other types: no hand swaps them and goes on."""
COMMUTE = {"max", "min", "maximum", "minimum", "larger", "smaller", "allclose", "equal", "isclose", "gcd", "logaddexp"}
"""Calls that take their first two arguments in any order."""
CASES = ("check/oracles/", "check/benches.py")
"""Files whose plain numbers and switches are cases that laws are tried on: others do as well."""
LOOKS = ("figures/", "comparison/report/", "cli/printing.py", "training/progress.py", "comparison/progress.py")
"""Files whose numbers, sums and switches are sizes and places in pictures and on a screen: a matter of taste."""
TASTES = ("another number", "another operator", "true for false", "leave", "drop the sign")


@dataclass(frozen=True)
class Mistake:
    """One change of a file of `src/stepwell`: the expression or statement `before` from `line` on becomes `after`.

    `text` is the line as it stands and `place` tells equal changes of equal lines of a file apart: a mistake is known
    by what it changes and not by where in the file that is, so that an edit elsewhere leaves the draw as it is.
    """

    path: str
    line: int
    end: int
    text: str
    kind: str
    before: str
    after: str
    place: int
    span: tuple[int, int]

    @property
    def room(self) -> str:
        return self.path.split("/")[0].removesuffix(".py")

    def order(self, seed: int) -> str:
        """A random number that the seed and the change decide."""
        words = (seed, self.path, self.text, self.kind, self.before, self.after, self.place)
        return hashlib.sha256(repr(words).encode()).hexdigest()

    def planted(self, source: str) -> str:
        """The file with the mistake in it."""
        begin, end = self.span
        data = source.encode()
        return (data[:begin] + self.after.encode() + data[end:]).decode()


def mistakes(root: Path, path: str) -> list[Mistake]:
    """All mistakes that can be planted in a file below `root`, in the order of its lines."""
    source = (root / path).read_text(encoding="utf-8")
    data = source.encode()
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    lines = source.splitlines()
    seen: dict[tuple[str, ...], int] = defaultdict(int)
    found = []
    for node, kind, changed in _changes(ast.parse(source), path):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)
        before = data[begin:end].decode()
        after = ast.unparse(changed) if isinstance(changed, ast.AST) else changed
        if isinstance(changed, ast.expr) and isinstance(node, _TIGHT):
            after = f"({after})"
        text = lines[node.lineno - 1].strip()
        key = (text, kind, before, after)
        last = node.end_lineno or node.lineno
        found.append(Mistake(path, node.lineno, last, text, kind, before, after, seen[key], (begin, end)))
        seen[key] += 1
    return found


_TIGHT = (ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.IfExp)
"""Expressions that stand in others without brackets, which may bind more tightly."""


def _changes(tree: ast.AST, path: str) -> Iterator[tuple[ast.expr | ast.stmt, str, ast.AST | str]]:
    """Nodes, the kind of a change, and the node that takes the place of each."""
    looks = path.startswith(LOOKS)
    for node in _reached(tree):
        if isinstance(node, ast.expr):
            changes = _of_expression(node, path)
            yield from ((node, kind, changed) for kind, changed in changes if not (looks and kind.startswith(TASTES)))
        elif isinstance(node, ast.stmt):
            yield from _of_statement(node)


def _reached(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes that decide a result: no annotations, decorators, docstrings, messages, assertions or texts."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_comment"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            if isinstance(child, ast.Call) and _name(child) in SILENT:
                continue
            if isinstance(child, ast.keyword) and child.arg in ALIKE:
                continue
            yield child
            yield from _reached(child)


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def _of_expression(node: ast.expr, path: str) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operator in FLIPPED[type(node.ops[0])]:
            yield "compare otherwise", _changed(node, ops=[operator()])
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS and not _is_text(node):
        yield "another operator", _changed(node, op=OPERATORS[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield "drop the sign", node.operand
    elif isinstance(node, ast.BoolOp):
        yield "and for or", _changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.IfExp):
        yield "swap the branches", _changed(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant):
        yield from _of_constant(node, path)
    elif isinstance(node, ast.Slice):
        if node.lower is not None:
            yield "slice later", _changed(node, lower=ast.BinOp(node.lower, ast.Add(), ast.Constant(1)))
        if node.upper is not None:
            yield "slice further", _changed(node, upper=ast.BinOp(node.upper, ast.Add(), ast.Constant(1)))
    elif isinstance(node, ast.Call):
        yield from _of_call(node)


def _is_text(node: ast.BinOp) -> bool:
    """True where texts are joined."""
    sides = (node.left, node.right)
    return any(isinstance(side, ast.JoinedStr | ast.Constant) and not _is_number(side) for side in sides)


def _is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def _of_constant(node: ast.Constant, path: str) -> Iterator[tuple[str, ast.AST]]:
    value = node.value
    if path.startswith(CASES):
        return
    if isinstance(value, bool):
        yield "true for false", ast.Constant(not value)
    elif isinstance(value, int | float):
        other = {0: 1, 1: 0}.get(value, value + 1) if isinstance(value, int) else (value * 2 if value else 1.0)
        yield "another number", ast.Constant(other)


def _of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = _name(node)
    plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    if isinstance(node.func, ast.Attribute) and name in DROPPED:
        yield "leave the call out", node.func.value
    if name in RENAMED:
        other = RENAMED[name]
        function = (
            _changed(node.func, attr=other) if isinstance(node.func, ast.Attribute) else ast.Name(other, ast.Load())
        )
        yield "another function", _changed(node, func=function)
    if len(plain) == len(node.args) >= 2 and name not in TYPED | COMMUTE and not _same(*plain[:2]):
        yield "swap the arguments", _changed(node, args=[plain[1], plain[0], *plain[2:]])
    for place, keyword in enumerate(node.keywords):
        if keyword.arg is not None and keyword.arg not in ALIKE:
            rest = node.keywords[:place] + node.keywords[place + 1 :]
            yield f"leave {keyword.arg} out", _changed(node, keywords=rest)


def _same(one: ast.expr, other: ast.expr) -> bool:
    return ast.unparse(one) == ast.unparse(other)


def _of_statement(node: ast.stmt) -> Iterator[tuple[ast.expr | ast.stmt, str, ast.AST | str]]:
    if isinstance(node, ast.If | ast.While):
        yield node.test, "never", ast.Constant(False)
        if isinstance(node, ast.If):
            yield node.test, "always", ast.Constant(True)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value) not in SILENT:
        yield node, "drop the statement", "pass"
    elif isinstance(node, ast.AugAssign):
        yield node, "drop the statement", "pass"
        yield node, "assign only", _changed_assignment(node)
    elif isinstance(node, ast.Continue):
        yield node, "break for continue", "break"
    elif isinstance(node, ast.Break):
        yield node, "drop the statement", "pass"
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield node, "return nothing", "return None"


def _changed_assignment(node: ast.AugAssign) -> str:
    return f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
