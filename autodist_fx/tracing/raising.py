"""`if condition: raise ...`: the answer that raises nothing, found where a frame stands in its source."""

from __future__ import annotations

import ast
import functools
import linecache
import types
from collections.abc import Iterator


def answer_without_error(frame: types.FrameType) -> bool | None:
    """What a value must be, which is asked for its truth where `frame` stands, so that no error is raised by an `if`
    whose body does nothing else; None where it is not asked by such an `if`."""
    start_line, end_line, start, end = _position(frame)
    if start_line is None or end_line is None or start is None or end is None:
        return None
    for test in _tests_before_errors(frame.f_code.co_filename):
        if test.lineno <= start_line and end_line <= (test.end_lineno or test.lineno):
            for part, negated in _parts(test, False):
                if (part.lineno, part.col_offset) == (start_line, start) and (
                    part.end_lineno, part.end_col_offset) == (end_line, end):  # fmt: skip
                    return negated
    return None


def _position(frame: types.FrameType) -> tuple[int | None, int | None, int | None, int | None]:
    for offset, position in enumerate(frame.f_code.co_positions()):
        if 2 * offset == frame.f_lasti:
            return position
    return None, None, None, None


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
        if isinstance(node, ast.If) and len(node.body) == 1 and isinstance(node.body[0], ast.Raise)
    )


def _parts(test: ast.expr, negated: bool) -> Iterator[tuple[ast.expr, bool]]:
    """The expressions whose truth decides about `test`, and whether it needs them true to be false."""
    yield test, negated
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _parts(value, negated)
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _parts(test.operand, not negated)
    elif isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "bool" and test.args:
        yield from _parts(test.args[0], negated)
