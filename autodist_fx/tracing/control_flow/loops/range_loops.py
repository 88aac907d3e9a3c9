"""Makes one node of a loop over a size: the loop statement alone, outlined into a function that the graph calls.

    before  for t in range(x.shape[1]):              # fx: a proxy is no integer
                state = a[:, t] * state + x[:, t]
                outs.append(state)
            y = torch.stack(outs, dim=1)
    after   y, state = loop_41(x, a, state, outs)    # plain Python when the graph runs, for any length

What stands before and after the loop is traced as ever. A list that the loop fills must be used up behind it
(stack, cat): these statements go into the function too, since a graph has no lists of unknown length. Loops of known
but large counts are outlined as well, rather than written out as that many copies of their body.

outline_loop.py rewrites the source (questions about it: loop_analysis.py); outlined_call.py has what the rewritten code
calls. Functions are changed by swapping their code objects, so that references which modules took earlier follow.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

from autodist_fx.tracing.control_flow.loops.outline_loop import COUNTS, FITS, LoopOutliner
from autodist_fx.tracing.control_flow.loops.outlined_call import fit_a_node, is_outlined


@contextlib.contextmanager
def outlined_loops(modules: Sequence[str]) -> Iterator[None]:
    """Let loops over proxies in the functions and methods of these Python modules be traced, while the context
    lasts."""
    with contextlib.ExitStack() as undo:
        for name in modules:
            module = sys.modules.get(name)
            if module is None:
                continue
            codes, helpers = _rewritten(name)
            for function in _functions(module) if codes else ():
                found = codes.get(function.__qualname__)
                if found is None or function.__code__.co_freevars or found.co_freevars:
                    continue
                undo.callback(setattr, function, "__code__", function.__code__)
                function.__code__ = found
            for helper, value in helpers.items():
                undo.callback(vars(module).pop, helper)
                vars(module)[helper] = value
        yield


def _functions(module: types.ModuleType) -> Iterator[types.FunctionType]:
    """Return the functions and methods that a module defines, without what decorates them."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).values() if isinstance(value, type) else (value,)
        for member in members:
            inner = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) or isinstance(
                member, (staticmethod, classmethod)
            ) else None  # fmt: skip
            if isinstance(inner, types.FunctionType) and inner.__module__ == module.__name__:
                yield inner


@functools.cache
def _rewritten(name: str) -> tuple[dict[str, types.CodeType], dict[str, Any]]:
    """Return the code of every function of a module that has an outlined loop, by qualified name, and the globals it
    calls."""
    module = sys.modules[name]
    path = inspect.getsourcefile(module)
    try:
        source = inspect.getsource(module)
    except OSError:
        return {}, {}
    if path is None or " in range(" not in source:
        return {}, {}
    codes: dict[str, types.CodeType] = {}
    helpers: dict[str, Any] = {}
    for qualname, function in _definitions(ast.parse(source).body, ""):
        outliner = LoopOutliner(function, path, module)
        if outliner.rewrite():
            code = _code_of(function, path)
            if code is not None:
                helpers |= {COUNTS: is_outlined, FITS: fit_a_node, **outliner.leaves}
                codes[qualname] = code
    return codes, helpers


def _definitions(body: Sequence[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            yield prefix + statement.name, statement
        elif isinstance(statement, ast.ClassDef):
            yield from _definitions(statement.body, f"{prefix}{statement.name}.")
        elif isinstance(statement, (ast.If, ast.Try)):
            yield from _definitions([*statement.body, *statement.orelse], prefix)


def _code_of(function: ast.FunctionDef, path: str) -> types.CodeType | None:
    """Return the code object of a definition alone; its defaults, annotations and decorators stay those of the
    function."""
    function = copy.deepcopy(function)
    function.decorator_list, function.returns = [], None
    arguments = function.args
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [None if d is None else ast.Constant(None) for d in arguments.kw_defaults]
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    tree = ast.fix_missing_locations(ast.Module([function], []))
    constants = compile(tree, path, "exec").co_consts
    return next((c for c in constants if isinstance(c, types.CodeType) and c.co_name == function.name), None)
