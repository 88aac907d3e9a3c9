"""A loop over a size as graphs of its own: what a saved model has in place of a function made while it was traced.

    for t in range(x.shape[1]):         bounds   (x) -> (x.shape[1],)
        state = a * state + x[:, t]     body     (t, x, a, state) -> {"set": {"state": ...}, "append": {"outs": [...]}}
        outs.append(state)
    y = torch.stack(outs, dim=1)        results  (outs, state) -> (stack(outs, 1), state)

The first iterations may have bodies of their own, where a variable is None at first and a tensor later.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from cost_model.errors import AutodistError

_MOST_BODIES = 3
_PREFIX = "in_"  # of a graph's inputs, so that any variable may be one
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)


class LoopError(AutodistError):
    """A loop that is no graph: its Python looks at values, or at how far it is."""


@dataclass(frozen=True, eq=False)
class LoopGraphs:
    """A loop as graphs. `inputs`: the names of the function's arguments; `own`: those it writes into, which are
    copied first."""

    name: str
    inputs: tuple[str, ...]
    own: tuple[str, ...]
    counter: str
    bounds: GraphModule
    bodies: tuple[GraphModule, ...]
    results: GraphModule

    def __call__(self, *args: Any) -> Any:
        values = dict(zip(self.inputs, args, strict=True))
        values |= {name: own_copy(values[name]) for name in self.own}
        runs = [(body.forward, _inputs(body)) for body in self.bodies]
        for number, count in enumerate(range(*_called(self.bounds, values))):
            values[self.counter] = count
            body, names = runs[min(number, len(runs) - 1)]
            found = body(*(values.get(name) for name in names))
            for name, items in found["append"].items():
                values[name].extend(items)
            values |= found["set"]
        return _called(self.results, values)

    def is_sound(self) -> bool:
        """Returns whether each body gives variables anew, and items for lists."""
        for body in self.bodies:
            found = body.graph.output_node().args[0]
            if not isinstance(found, dict) or found.keys() != {"set", "append"}:
                return False
            sets, appends = found["set"], found["append"]
            if not isinstance(sets, dict) or not isinstance(appends, dict):
                return False
            if not all(isinstance(items, list) for items in appends.values()):
                return False
        return True

    def function(self) -> Callable[..., Any]:
        """Makes the function that a graph's node calls."""

        def run(*args: Any) -> Any:
            return self(*args)

        run.__name__ = run.__qualname__ = self.name
        run.graphs = self  # type: ignore[attr-defined]
        return run


@dataclass(frozen=True)
class LoopSource:
    """A loop as Python: `body(counter, *variables)` gives the variables anew, `bounds` and `results` take them."""

    name: str
    inputs: tuple[str, ...]
    own: tuple[str, ...]
    counter: str
    variables: tuple[str, ...]
    lists: frozenset[str]  # variables that the body appends to
    bounds: Callable[..., Any]
    body: Callable[..., Any]
    results: Callable[..., Any]

    def graphs(self, args: Sequence[Any]) -> LoopGraphs:
        """Traces the loop's graphs for a node with these arguments. Raises LoopError.

        Numbers among them are inputs, too, unless the loop's Python asks for them.
        """
        try:
            return self._graphs(args, (int, float))
        except LoopError:
            return self._graphs(args, ())

    def _graphs(self, args: Sequence[Any], open_types: tuple[type, ...]) -> LoopGraphs:
        given = dict(zip(self.inputs, args, strict=True))
        kinds = {name: _kind(given.get(name), name in self.lists) for name in self.variables}
        for name, value in given.items():
            if type(value) in open_types:
                kinds[name] = _TENSOR
        try:
            bounds = _traced(lambda values: self.bounds(**values), kinds)
            bodies: list[GraphModule] = []
            while len(bodies) < _MOST_BODIES:
                body, after = self._body(kinds)
                bodies.append(body)
                if after == kinds:
                    break
                kinds = after
            else:
                raise LoopError("its iterations differ")
            results = _traced(lambda values: self.results(**values), {**kinds, self.counter: _TENSOR})
        except LoopError:
            raise
        except Exception as error:  # whatever Python says of a proxy that it cannot work with
            raise LoopError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error
        return LoopGraphs(self.name, self.inputs, self.own, self.counter, bounds, tuple(bodies), results)

    def _body(self, kinds: dict[str, Any]) -> tuple[GraphModule, dict[str, Any]]:
        """Returns the graph of one iteration, and what the variables are after it."""
        after = dict(kinds)

        def run(values: dict[str, Any]) -> dict[str, Any]:
            lists = {name: _Appended() for name in self.lists}
            found = dict(zip(self.variables, self.body(**{**values, **lists}), strict=True))
            changed = {n: x for n, x in found.items() if n not in lists and x is not values[n] and n != self.counter}
            for name, value in changed.items():
                after[name] = _TENSOR if isinstance(value, Proxy) else _kind(value, False)
            for name, items in lists.items():
                if found[name] is not items:
                    raise LoopError(f"{name} is another list in each iteration")
            return {"set": changed, "append": {name: list(items.items) for name, items in lists.items()}}

        return _traced(run, {**kinds, self.counter: _TENSOR}), after


def own_copy(value: Any) -> Any:
    """Copies a tensor, or a list, that a loop writes into."""
    if isinstance(value, (list, tuple)):
        return list(value)
    return value.clone() if isinstance(value, torch.Tensor) else value


# -- tracing ----------------------------------------------------------------------------------------------------------

_TENSOR, _LIST = "a value", "a list"  # kinds of variables; any other one is a tuple of what it is


def _kind(value: Any, is_list: bool) -> Any:
    if is_list:
        return _LIST
    if isinstance(value, _PLAIN):
        return (value,)
    if isinstance(value, (Node, list, tuple)):
        return _TENSOR
    raise LoopError(f"a {type(value).__name__} goes in")


class _Value(Proxy):
    """A proxy that may be written into, as a tensor may."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})


class _Appended:
    """A list that a body may append to, and nothing else."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Sequence[Any]) -> None:
        self.items.extend(values)


class _Tracer(GraphAppendingTracer):
    def proxy(self, node: Node) -> Proxy:
        return _Value(node, self)


def _traced(function: Callable[[dict[str, Any]], Any], kinds: dict[str, Any]) -> GraphModule:
    graph = Graph()
    tracer = _Tracer(graph)
    values = {
        name: kind[0] if isinstance(kind, tuple) else tracer.proxy(graph.placeholder(_PREFIX + name))
        for name, kind in kinds.items()
    }
    graph.output(tracer.create_arg(function(values)))
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    graph.lint()
    return GraphModule({}, graph, "Loop")


def _inputs(module: GraphModule) -> list[str]:
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    return [name.removeprefix(_PREFIX) for name in names]


def _called(module: GraphModule, values: dict[str, Any]) -> Any:
    return module.forward(*(values.get(name) for name in _inputs(module)))
