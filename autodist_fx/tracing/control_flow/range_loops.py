"""Loops over a length become one node: the loop statement alone, outlined into a function that the graph calls.

    before  for t in range(x.shape[1]):              # fx: a proxy is no integer
                state = a[:, t] * state + x[:, t]
                outs.append(state)
            y = torch.stack(outs, dim=1)
    after   y, state = loop_41(x, a, state, outs)    # plain Python when the graph runs, for any length

What stands before and after the loop is traced as ever. A list that the loop fills must be used up behind it
(stack, cat): these statements go into the function too, since a graph has no lists of unknown length. Loops of known
but large counts are outlined as well, rather than written out as that many copies of their body.

Functions are changed by swapping their code objects, so that references which modules took earlier follow.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import Proxy

from autodist_fx.tracing.control_flow.constants import constant
from passes.ops.loops import LoopSource, own_copy

_UNROLLED = 16  # loops of known counts up to this are written out
_COUNTS, _FITS, _LEAF, _OWN = "_is_outlined_", "_fit_a_node_", "_outlined_", "_own_"
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
_IN_PLACE = ("append", "extend", "insert")


@contextlib.contextmanager
def outlined_loops(modules: Sequence[str]) -> Iterator[None]:
    """While it lasts, loops over proxies in the functions and methods of these Python modules can be traced."""
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
    """The functions and methods that a module defines, without what decorates them."""
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
    """The code of every function of a module that has an outlined loop, by qualified name, and the globals it calls."""
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
        outliner = _Outliner(function, path, module)
        if outliner.rewrite():
            code = _code_of(function, path)
            if code is not None:
                helpers |= {_COUNTS: _is_outlined, _FITS: _fit, **outliner.leaves}
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
    """The code object of a definition alone; its defaults, annotations and decorators stay those of the function."""
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


# -- the rewrite ----------------------------------------------------------------------------------------------------


class _Outliner:
    """Puts, in front of each loop over `range(...)`, the choice to call an outlined copy of it instead."""

    def __init__(self, function: ast.FunctionDef, path: str, module: types.ModuleType) -> None:
        self.function, self.path, self.module = function, path, module
        self.locals = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)} | _stored(function.body)
        self.leaves: dict[str, Callable[..., Any]] = {}

    def rewrite(self) -> bool:
        """Rewrites the definition in place; False if it has no loop that can be outlined."""
        if any(isinstance(n, (ast.Nonlocal, ast.Global, ast.Yield, ast.YieldFrom)) for n in ast.walk(self.function)):
            return False
        self.function.body = self._block(self.function.body, nested=False)
        return bool(self.leaves)

    def _block(self, body: list[ast.stmt], nested: bool) -> list[ast.stmt]:
        body = _sink_uses_of_lists(body)
        done: list[ast.stmt] = []
        while body:
            statement, *body = body
            if _is_counting(statement):
                region = [statement, *_uses_of_lists(statement, body)]
                body = body[len(region) - 1 :]
                done += self._outline(region, nested)
                continue
            if isinstance(statement, (ast.If, ast.For, ast.While, ast.With, ast.Try)):
                inside = nested or isinstance(statement, (ast.For, ast.While))
                for name in ("body", "orelse", "finalbody"):
                    block = getattr(statement, name, None)
                    if block:
                        setattr(statement, name, self._block(block, inside))
            done.append(statement)
        return done

    def _outline(self, region: list[ast.stmt], nested: bool) -> list[ast.stmt]:
        loop = region[0]
        assert isinstance(loop, ast.For) and isinstance(loop.iter, ast.Call)
        chains = _Chains()
        inner = [chains.visit(copy.deepcopy(statement)) for statement in region]
        changed = _changed(inner)
        written = _stored(inner) | changed
        last = max(getattr(n, "end_lineno", 0) or 0 for s in region for n in ast.walk(s))
        inside = {id(n) for s in region for n in ast.walk(s)} | self._counters(last)
        later = {
            n.id
            for n in ast.walk(self.function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in inside
            and (nested or n.lineno > last)
        }  # fmt: skip
        outputs = sorted(written & later)
        inputs = sorted(((_exposed(inner) | (changed & self.locals)) & self.locals) | set(chains.names))
        if not outputs or "self" in inputs:
            return region
        own = sorted(changed & set(inputs))
        name = f"{_LEAF}{self.function.name}_{loop.lineno}"
        leaf: Callable[..., Any] = self._leaf(name.strip("_"), inputs, own, inner, outputs, loop)
        if set(outputs) <= set(own) - _stored(inner):
            leaf = _as_large_as_before(leaf, [inputs.index(o) for o in outputs])
        self.leaves[name] = _Call(leaf, len(outputs))
        given = [chains.names.get(i) or _value_of(i) for i in inputs]
        everything = ast.Tuple(list(given), ast.Load())
        guard = ast.BoolOp(ast.And(), [_call(_COUNTS, loop.iter.args), _call(_FITS, [everything])])
        target: ast.expr = ast.Name(outputs[0], ast.Store())
        if len(outputs) > 1:
            target = ast.Tuple([ast.Name(o, ast.Store()) for o in outputs], ast.Store())
        call = ast.Assign([target], _call(name, copy.deepcopy(given)))
        choice = ast.If(guard, [call], region)
        for node in (choice, *ast.walk(guard), *ast.walk(call)):
            ast.copy_location(node, loop)
        return [ast.fix_missing_locations(choice)]

    def _counters(self, line: int) -> set[int]:
        """Ids of the names behind `line` that are read as the counter of the loop around them."""
        return {
            id(n)
            for loop in ast.walk(self.function)
            if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name) and loop.lineno > line
            for n in ast.walk(loop)
            if isinstance(n, ast.Name) and n.id == loop.target.id
        }

    def _leaf(
        self,
        name: str,
        inputs: list[str],
        own: list[str],
        body: list[ast.stmt],
        outputs: list[str],
        loop: ast.For,
    ) -> types.FunctionType:
        """The loop as a function of `inputs` that returns `outputs`; what it writes into (`own`) it copies first."""
        copies = [ast.Assign([ast.Name(o, ast.Store())], _call(_OWN, [ast.Name(o, ast.Load())])) for o in own]
        leaf = self._function(name, inputs, [*copies, *body, _returning(outputs)], loop)
        leaf.source = self._source(name, inputs, own, body, outputs, loop)  # type: ignore[attr-defined]
        return leaf

    def _source(
        self,
        name: str,
        inputs: list[str],
        own: list[str],
        body: list[ast.stmt],
        outputs: list[str],
        loop: ast.For,
    ) -> LoopSource:
        """The same in the parts that can be made graphs of, for a model that is to be saved."""
        inner, *behind = copy.deepcopy(body)
        assert isinstance(inner, ast.For) and isinstance(inner.iter, ast.Call) and isinstance(inner.target, ast.Name)
        variables = sorted(set(inputs) | _stored([inner]) | _stored(behind))
        counter = inner.target.id
        everything = sorted({counter, *variables})
        again = [n for n in ast.walk(inner) if isinstance(n, (ast.Break, ast.Continue))]
        step = [ast.Raise(None, None)] if again else [*inner.body, _returning(variables, always_tuple=True)]
        bounds: list[ast.stmt] = [ast.Return(ast.Tuple(list(inner.iter.args), ast.Load()))]
        return LoopSource(
            name=name,
            inputs=tuple(inputs),
            own=tuple(own),
            counter=counter,
            variables=tuple(variables),
            lists=frozenset(_lists(inner)),
            bounds=self._function(f"{name}_bounds", everything, bounds, loop),
            body=self._function(f"{name}_body", everything, step, loop),
            results=self._function(f"{name}_results", everything, [*behind, _returning(outputs)], loop),
        )

    def _function(
        self, name: str, inputs: Sequence[str], body: Sequence[ast.stmt], loop: ast.For
    ) -> types.FunctionType:
        arguments = ast.arguments([], [ast.arg(i) for i in inputs], None, [], [], None, [])
        definition = ast.FunctionDef(name, arguments, copy.deepcopy(list(body)), [])
        definition.type_params = []  # type: ignore[attr-defined]  # Python 3.12 asks for it
        for node in (definition, *definition.body, arguments):
            ast.copy_location(node, loop)
        tree = ast.fix_missing_locations(ast.Module([definition], []))
        scope = {**vars(self.module), _OWN: own_copy}
        for code in compile(tree, self.path, "exec").co_consts:
            if isinstance(code, types.CodeType) and code.co_name == name:
                function = types.FunctionType(code, scope, name)
                function.__module__ = self.module.__name__
                return function
        raise AssertionError(f"no code for {name}")


def _returning(names: Sequence[str], always_tuple: bool = False) -> ast.Return:
    results = [ast.Name(name, ast.Load()) for name in names]
    one = len(results) == 1 and not always_tuple
    return ast.Return(results[0] if one else ast.Tuple(list(results), ast.Load()))


def _is_counting(statement: ast.stmt) -> bool:
    """`for i in range(...)` that only ends by itself."""
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


def _names(statements: Sequence[ast.AST], context: type[ast.expr_context]) -> set[str]:
    return {
        n.id for s in statements for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, context)
    }  # fmt: skip


def _stored(statements: Sequence[ast.AST]) -> set[str]:
    return _names(statements, ast.Store)


def _root(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Subscript, ast.Attribute)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _changed(statements: Sequence[ast.AST]) -> set[str]:
    """Names of objects that are written into: x[i] = ..., x += ..., x.append(...), x.copy_(...)."""
    found = set()
    for node in (n for s in statements for n in ast.walk(s)):
        if isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(_root(node))
        elif isinstance(node, ast.AugAssign):
            found.add(_root(node.target))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = node.func.attr
            if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
                found.add(_root(node.func.value))
    return {name for name in found if name is not None}


def _lists(loop: ast.stmt) -> set[str]:
    """Names that a loop appends to."""
    return {
        root
        for n in ast.walk(loop)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in _IN_PLACE
        and (root := _root(n.func.value)) is not None
    }  # fmt: skip


def _uses_of_lists(loop: ast.stmt, following: Sequence[ast.stmt]) -> list[ast.stmt]:
    """The statements right behind the loop, up to the last that reads a list which the loop fills."""
    lists, last = _lists(loop), 0
    for position, statement in enumerate(following, start=1):
        if lists & _names([statement], ast.Load):
            last = position
        lists -= _stored([statement])
    return list(following[:last])


def _sink_uses_of_lists(body: list[ast.stmt]) -> list[ast.stmt]:
    """Where branches end with a loop that fills a list, what uses the list up moves into the branches."""
    for position, statement in enumerate(body):
        if not isinstance(statement, ast.If):
            continue
        ends = [b[-1] for b in (statement.body, statement.orelse) if b and _is_counting(b[-1])]
        used = max((len(_uses_of_lists(end, body[position + 1 :])) for end in ends), default=0)
        if 0 < used <= 3 and not any(isinstance(n, ast.Return) for n in ast.walk(statement)):
            tail = body[position + 1 : position + 1 + used]
            statement.body = [*statement.body, *copy.deepcopy(tail)]
            statement.orelse = [*statement.orelse, *copy.deepcopy(tail)]
            return [*body[: position + 1], *_sink_uses_of_lists(body[position + 1 + used :])]
    return body


def _exposed(statements: Sequence[ast.stmt]) -> set[str]:
    """Names that are read before the statements have surely written them."""
    exposed: set[str] = set()
    known: set[str] = set()

    def expression(node: ast.AST | None) -> None:
        if node is not None:
            exposed.update(_names([node], ast.Load) - known)

    def run(block: Sequence[ast.stmt], sure: bool) -> None:
        for statement in block:
            if isinstance(statement, ast.Assign):
                expression(statement.value)
                for target in statement.targets:
                    expression(target)  # the index and the object of x[i] = ...
                if sure:
                    known.update(_stored(statement.targets))
            elif isinstance(statement, ast.AugAssign):
                exposed.update(({_root(statement.target)} - {None}) - known)  # type: ignore[arg-type]
                expression(statement.target)
                expression(statement.value)
            elif isinstance(statement, ast.For):
                expression(statement.iter)
                counted, before = _stored([statement.target]), set(known)
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


class _Chains(ast.NodeTransformer):
    """`self.a.b`, wherever it is read, becomes an argument of the function: an object has no place in a graph."""

    def __init__(self) -> None:
        self.names: dict[str, ast.expr] = {}

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        parts, at = [], node
        while isinstance(at, ast.Attribute):
            parts.append(at.attr)
            at = at.value  # type: ignore[assignment]
        if isinstance(at, ast.Name) and at.id == "self" and isinstance(node.ctx, ast.Load):
            name = "_".join(["self", *reversed(parts)])
            self.names[name] = node
            return ast.copy_location(ast.Name(name, ast.Load()), node)
        return self.generic_visit(node)


def _call(name: str, arguments: Sequence[ast.expr]) -> ast.expr:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _value_of(name: str) -> ast.expr:
    """A local variable's value; None where it has none yet (one that a first iteration sets for the next)."""
    return ast.Call(ast.Attribute(_call("locals", []), "get", ast.Load()), [ast.Constant(name)], [])


# -- called by the rewritten code -------------------------------------------------------------------------------------


def _is_outlined(*counts: Any) -> bool:
    """Whether a loop over range(*counts) would become a node: one of a length, or one of many steps."""
    try:
        numbers = [constant(c) if isinstance(c, Proxy) else c for c in counts]
    except TypeError:
        return True
    return all(type(n) is int for n in numbers) and len(range(*map(int, numbers))) >= _UNROLLED


def _fit(values: tuple[Any, ...]) -> bool:
    """Whether the loop's inputs can be arguments of a node."""
    return next(_proxies(values), None) is not None and all(_fits_a_graph(v) for v in values)


def _fits_a_graph(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_fits_a_graph(v) for v in value)
    return isinstance(value, (Proxy, torch.Tensor, *_PLAIN))


def _as_large_as_before(leaf: Callable[..., Any], written: Sequence[int]) -> Callable[..., Any]:
    """A loop that only writes into tensors which are there before it (arguments number `written`), also for meta ones:
    where it looks at values, as for where to write, these leave their shapes."""

    @functools.wraps(leaf)
    def run(*args: Any) -> Any:
        try:
            return leaf(*args)
        except (RuntimeError, TypeError):
            results = tuple(args[i] for i in written)
            if not all(isinstance(r, torch.Tensor) and r.is_meta for r in results):
                raise
            return results[0].clone() if len(results) == 1 else tuple(r.clone() for r in results)

    return run


class _Call:
    """What the rewritten code calls instead of a loop: one node, and an item of it for each output."""

    def __init__(self, leaf: Callable[..., Any], outputs: int) -> None:
        self.leaf, self.outputs = leaf, outputs

    def __call__(self, *args: Any) -> Any:
        tracer = next(_proxies(args)).tracer
        result = tracer.create_proxy("call_function", self.leaf, args, {})
        known = getattr(result, "_metadata", None)
        if any(not isinstance(v, torch.Tensor) for v in (known if isinstance(known, tuple) else (known,))):
            raise TypeError("a loop over a length leaves something else than tensors")
        return result if self.outputs == 1 else tuple(result[i] for i in range(self.outputs))


def _proxies(values: Sequence[Any]) -> Iterator[Proxy]:
    for value in values:
        if isinstance(value, Proxy):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _proxies(value)
