"""Answers questions about the statements of a loop: which names they read, write, change in place, or fill as lists."""

from __future__ import annotations

import ast
import copy
from collections.abc import Sequence

_IN_PLACE = ("append", "extend", "insert")


def is_counting(statement: ast.stmt) -> bool:
    """Return whether a statement is a `for i in range(...)` that only ends by itself."""
    return (
        isinstance(statement, ast.For)
        and not statement.orelse
        and isinstance(statement.target, ast.Name)
        and isinstance(statement.iter, ast.Call)
        and isinstance(statement.iter.func, ast.Name)
        and statement.iter.func.id == "range"
        and not statement.iter.keywords
        and not any(isinstance(n, (ast.Return, ast.Await)) for n in ast.walk(statement))
    )


def names_in(statements: Sequence[ast.AST], context: type[ast.expr_context]) -> set[str]:
    """Return the names that statements read, or write, by the context."""
    return {
        n.id for s in statements for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, context)
    }  # fmt: skip


def stored_names(statements: Sequence[ast.AST]) -> set[str]:
    """Return the names that statements write."""
    return names_in(statements, ast.Store)


def root_name(node: ast.expr) -> str | None:
    """Return the name that an expression's attributes and items start from; None without."""
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def changed_names(statements: Sequence[ast.AST]) -> set[str]:
    """Return the names of objects that are written into: x[i] = ..., x += ..., x.append(...), x.copy_(...)."""
    found = set()
    for node in (n for s in statements for n in ast.walk(s)):
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(root_name(node))
        elif isinstance(node, ast.AugAssign):
            found.add(root_name(node.target))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
                found.add(root_name(node.func.value))
    return {name for name in found if name is not None}


def filled_lists(loop: ast.stmt) -> set[str]:
    """Return the names that a loop appends to."""
    return {
        root
        for n in ast.walk(loop)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in _IN_PLACE
        and (root := root_name(n.func.value)) is not None
    }  # fmt: skip


def uses_of_lists(loop: ast.stmt, following: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Return the statements right behind the loop, up to the last that reads a list which the loop fills."""
    lists, last = filled_lists(loop), 0
    for position, statement in enumerate(following, start=1):
        if lists & names_in([statement], ast.Load):
            last = position
        lists -= stored_names([statement])
    return list(following[:last])


def sink_uses_of_lists(body: list[ast.stmt]) -> list[ast.stmt]:
    """Move what uses a list up into the branches that end with a loop which fills it."""
    for position, statement in enumerate(body):
        if not isinstance(statement, ast.If):
            continue
        ends = [b[-1] for b in (statement.body, statement.orelse) if b and is_counting(b[-1])]
        used = max((len(uses_of_lists(end, body[position + 1 :])) for end in ends), default=0)
        if 0 < used <= 3 and not any(isinstance(n, ast.Return) for n in ast.walk(statement)):
            tail = body[position + 1 : position + 1 + used]
            statement.body = [*statement.body, *copy.deepcopy(tail)]
            statement.orelse = [*statement.orelse, *copy.deepcopy(tail)]
            return [*body[: position + 1], *sink_uses_of_lists(body[position + 1 + used :])]
    return body


def exposed_names(statements: Sequence[ast.stmt]) -> set[str]:
    """Return the names that are read before the statements have surely written them."""
    exposed: set[str] = set()
    known: set[str] = set()

    def expression(node: ast.AST | None) -> None:
        if node is not None:
            exposed.update(names_in([node], ast.Load) - known)

    def run(block: Sequence[ast.stmt], sure: bool) -> None:
        for statement in block:
            if isinstance(statement, ast.Assign):
                expression(statement.value)
                for target in statement.targets:
                    expression(target)  # the index and the object of x[i] = ...
                if sure:
                    known.update(stored_names(statement.targets))
            elif isinstance(statement, ast.AugAssign):
                exposed.update(({root_name(statement.target)} - {None}) - known)  # type: ignore[arg-type]
                expression(statement.target)
                expression(statement.value)
            elif isinstance(statement, ast.For):
                expression(statement.iter)
                counted, before = stored_names([statement.target]), set(known)
                known.update(counted)
                run(statement.body, sure)
                known.intersection_update(before)  # it may run zero times
            elif isinstance(statement, ast.If):
                expression(statement.test)
                before = set(known)
                run(statement.body, sure)
                after = set(known)
                known.clear()
                known.update(before)
                run(statement.orelse, sure)
                known.intersection_update(after)
            else:
                expression(statement)

    run(statements, True)
    return exposed
