"""Resolves an `if` that only guards a raise, or only says something to the user: reads the caller's source and
returns the bool that avoids it."""

from __future__ import annotations

import ast
import dis
import functools
import linecache
import types
from collections.abc import Iterator


def answer_without_error(frame: types.FrameType) -> bool | None:
    """Return what a value must be, which is asked for its truth where `frame` stands, so that no error is raised (or
    warning logged) by an `if` whose body does nothing else; None where it is not asked by such an `if`."""
    asked = _asked(frame)
    if asked is None:
        return None
    for test in _tests_before_errors(frame.f_code.co_filename):
        around = [(part, negated) for part, negated in _parts(test, False) if _contains(part, asked)]
        if around:
            part, negated = around[-1]  # the innermost one
            return None if any(isinstance(n, ast.IfExp) for n in ast.walk(part)) else negated
    return None


def _asked(frame: types.FrameType) -> dis.Positions | None:
    """Return the place of the expression whose truth the frame is about to branch on, or gives to `bool`."""
    before = None
    for instruction in dis.get_instructions(frame.f_code):
        if instruction.offset == frame.f_lasti:
            if instruction.opname.startswith("POP_JUMP"):
                return before
            return instruction.positions if instruction.opname in ("CALL", "PRECALL") else None
        if instruction.opname != "CACHE":
            before = instruction.positions
    return None


def _contains(part: ast.expr, at: dis.Positions) -> bool:
    if at.lineno is None or at.end_lineno is None or at.col_offset is None or at.end_col_offset is None:
        return False
    start, end = (part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)
    return start <= (at.lineno, at.col_offset) and (at.end_lineno, at.end_col_offset) <= end


@functools.cache
def _tests_before_errors(path: str) -> tuple[ast.expr, ...]:
    source = "".join(linecache.getlines(path))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return ()
    return tuple(
        node.test
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and len(node.body) == 1 and (
            isinstance(node.body[0], ast.Raise) or (_logs(node.body[0]) and not node.orelse)
        )
    )  # fmt: skip


def _logs(statement: ast.stmt) -> bool:
    """Return whether a statement only logs: logger.warning_once(...), warnings.warn(...)."""
    called = statement.value.func if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) else None
    by = called.value if isinstance(called, ast.Attribute) else None
    return isinstance(by, ast.Name) and by.id in ("logger", "logging", "warnings")


def _parts(test: ast.expr, negated: bool) -> Iterator[tuple[ast.expr, bool]]:
    """Return the expressions whose truth decides about `test`, and whether it needs them true to be false."""
    yield test, negated
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _parts(value, negated)
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _parts(test.operand, not negated)
    elif isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "bool" and test.args:
        yield from _parts(test.args[0], negated)
