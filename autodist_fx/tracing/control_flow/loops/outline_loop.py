"""Rewrites the source of a function: each loop over `range(...)` gets an outlined copy, and a choice in front of it."""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

from autodist_fx.tracing.control_flow.loops.loop_analysis import (
    changed_names,
    exposed_names,
    filled_lists,
    is_counting,
    sink_uses_of_lists,
    stored_names,
    uses_of_lists,
)
from autodist_fx.tracing.control_flow.loops.outlined_call import OutlinedCall, as_large_as_before
from passes.ops.loops import LoopSource, own_copy

COUNTS, FITS, _LEAF, _OWN = "_is_outlined_", "_fit_a_node_", "_outlined_", "_own_"


class LoopOutliner:
    """Puts, in front of each loop over `range(...)`, the choice to call an outlined copy of it instead."""

    def __init__(self, function: ast.FunctionDef, path: str, module: types.ModuleType) -> None:
        self.function, self.path, self.module = function, path, module
        self.locals = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)} | stored_names(function.body)
        self.leaves: dict[str, Callable[..., Any]] = {}

    def rewrite(self) -> bool:
        """Rewrites the definition in place; False if it has no loop that can be outlined."""
        if any(isinstance(n, (ast.Nonlocal, ast.Global, ast.Yield, ast.YieldFrom)) for n in ast.walk(self.function)):
            return False
        self.function.body = self._block(self.function.body, nested=False)
        return bool(self.leaves)

    def _block(self, body: list[ast.stmt], nested: bool) -> list[ast.stmt]:
        body = sink_uses_of_lists(body)
        done: list[ast.stmt] = []
        while body:
            statement, *body = body
            if is_counting(statement):
                region = [statement, *uses_of_lists(statement, body)]
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
        changed = changed_names(inner)
        written = stored_names(inner) | changed
        last = max(getattr(n, "end_lineno", 0) or 0 for s in region for n in ast.walk(s))
        inside = {id(n) for s in region for n in ast.walk(s)} | self._counters(last)
        later = {
            n.id
            for n in ast.walk(self.function)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in inside
            and (nested or n.lineno > last)
        }  # fmt: skip
        outputs = sorted(written & later)
        inputs = sorted(((exposed_names(inner) | (changed & self.locals)) & self.locals) | set(chains.names))
        if not outputs or "self" in inputs:
            return region
        own = sorted(changed & set(inputs))
        name = f"{_LEAF}{self.function.name}_{loop.lineno}"
        leaf: Callable[..., Any] = self._leaf(name.strip("_"), inputs, own, inner, outputs, loop)
        if set(outputs) <= set(own) - stored_names(inner):
            leaf = as_large_as_before(leaf, [inputs.index(o) for o in outputs])
        self.leaves[name] = OutlinedCall(leaf, len(outputs))
        given = [chains.names.get(i) or _value_of(i) for i in inputs]
        everything = ast.Tuple(list(given), ast.Load())
        guard = ast.BoolOp(ast.And(), [_call(COUNTS, loop.iter.args), _call(FITS, [everything])])
        target: ast.expr = ast.Name(outputs[0], ast.Store())
        if len(outputs) > 1:
            target = ast.Tuple([ast.Name(o, ast.Store()) for o in outputs], ast.Store())
        call = ast.Assign([target], _call(name, copy.deepcopy(given)))
        choice = ast.If(guard, [call], region)
        for node in (choice, *ast.walk(guard), *ast.walk(call)):
            ast.copy_location(node, loop)
        return [ast.fix_missing_locations(choice)]

    def _counters(self, line: int) -> set[int]:
        """Return the ids of the names behind `line` that are read as the counter of the loop around them."""
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
        """Return the loop as a function of `inputs` that returns `outputs`; what it writes into (`own`) it copies
        first."""
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
        """Return the same in the parts that can be made graphs of, for a model that is to be saved."""
        inner, *behind = copy.deepcopy(body)
        assert isinstance(inner, ast.For) and isinstance(inner.iter, ast.Call) and isinstance(inner.target, ast.Name)
        variables = sorted(set(inputs) | stored_names([inner]) | stored_names(behind))
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
            lists=frozenset(filled_lists(inner)),
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


class _Chains(ast.NodeTransformer):
    """Makes `self.a.b`, wherever it is read, an argument of the function: an object has no place in a graph."""

    def __init__(self) -> None:
        self.names: dict[str, ast.expr] = {}

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Replace a chain of attributes by the argument."""
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
    """Return a local variable's value; None where it has none yet (one that a first iteration sets for the next)."""
    return ast.Call(ast.Attribute(_call("locals", []), "get", ast.Load()), [ast.Constant(name)], [])
