"""Runs a graph on meta tensors at two example sizes, to tell what is constant in it from what follows the inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_arg

from passes.fx import node_meta
from passes.fx.arguments import fetch, submodule
from passes.fx.meta_calls import MetaCalls
from passes.fx.node_meta import Phase
from passes.fx.run_passes import PassContext, PassResult
from passes.ops.data_dependent import expectation


@dataclass(frozen=True, slots=True)
class Example:
    """The inputs by name at one choice of sizes, and what the sizes are called: {"B": 11, "S": 23, "T": 52}."""

    inputs: Mapping[str, Any]
    symbols: Mapping[str, int]
    known: Mapping[torch.fx.Node, Any] = field(default_factory=dict)  # what a run with these inputs has found already


class ShapeInterpreter(torch.fx.Interpreter):
    """Interprets on the meta device and keeps every node's value. Parameters and buffers are taken as meta tensors."""

    def __init__(self, graph_module: torch.fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self._meta: dict[str, torch.Tensor] = {}
        self._calls = MetaCalls()

    def values(self, example: Example) -> dict[torch.fx.Node, Any]:
        """Returns the value of every node for the inputs of `example`, as meta tensors and Python values."""
        names = [n.target for n in self.module.graph.nodes if n.op == "placeholder"]
        with torch.no_grad(), torch.device("meta"):  # also what is made of numbers alone, on no device by name
            self.run(*(example.inputs[name] for name in names), initial_env=dict(example.known))
        return dict(self.env)

    def fetch_attr(self, target: str) -> Any:
        value = fetch(self.module, target)
        if isinstance(value, torch.Tensor) and value.device.type != "meta":
            value = self._meta.setdefault(target, value.to("meta"))
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._calls(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._calls(getattr(type(args[0]), target), args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = submodule(self.module, target)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        if all(t.device.type == "meta" for t in state.values()):
            return module(*args, **kwargs)
        meta = {name: t.to("meta") for name, t in state.items()}
        return torch.func.functional_call(module, meta, args, kwargs)


class Sizes:
    """Gives integers their size symbols, by their values at two examples."""

    def __init__(self, a: Mapping[str, int], b: Mapping[str, int]) -> None:
        self._names: dict[tuple[int, int], str] = {}
        for x in a:
            for y in a:
                if x <= y:
                    self._names[a[x] * a[y], b[x] * b[y]] = f"{x}*{y}"
        for x in a:
            self._names[a[x], b[x]] = x

    def symbol(self, first: int, second: int) -> str:
        """Returns "" for a constant, "B" for an input's size, "B*16" for a multiple of one, "?5|8" for one that follows
        the inputs in an unknown way, "?5~B*S/8" where an expected value can be said."""
        if first == second:
            return ""
        for (a, b), name in {(first, second): self._names.get((first, second)), **self._names}.items():
            times = first // a if a else 0
            if name is not None and times and (times * a, times * b) == (first, second):
                return name if times == 1 else f"{name}*{times}"
        one, other = expectation(first), expectation(second)
        if one is not None and other is not None and one[0] != other[0]:
            whole = self.symbol(one[0], other[0])
            if not whole.startswith("?"):
                return f"?{first}~{whole}/{one[1]}"  # so many are expected to be selected
        return f"?{first}|{second}"

    def of_shape(self, first: torch.Size, second: torch.Size) -> tuple[str, ...]:
        """Returns the size symbol of each dim; those of a rank that differs between the examples are unknown."""
        if len(first) != len(second):
            return tuple(f"?{n}" for n in first)
        return tuple(self.symbol(x, y) for x, y in zip(first, second, strict=True))


_BENDING = ("mod", "floordiv", "max", "min")


def bending_points(
    graph_module: torch.fx.GraphModule, examples: tuple[Example, Example]
) -> tuple[set[int], tuple[Example, Example]]:
    """Returns the numbers that sizes are divided by or compared with, such as the chunk that a sequence is padded to
    multiples of, and the examples with the values that were computed on the way.

    What comes of such an op may be equal for two lengths without being constant, so that examples have to be chosen on
    both sides of these numbers, and with different remainders. The second result is `examples` with what is known of
    them now, so that nothing has to run twice where they will do.
    """
    candidates = [
        (node, [a for a in node.args if type(a) is int and a > 1])
        for node in graph_module.graph.nodes
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _BENDING
    ]
    if not any(numbers for _, numbers in candidates):
        return set(), examples
    interpreter = ShapeInterpreter(graph_module)
    first, second = interpreter.values(examples[0]), interpreter.values(examples[1])
    points = {
        number
        for node, numbers in candidates
        if any(type(first[a]) is int and first[a] != second[a] for a in node.all_input_nodes)
        for number in numbers
    }
    return points, (replace(examples[0], known=first), replace(examples[1], known=second))


@dataclass
class NormalizeContext(PassContext):
    """The knowledge of the passes over the whole graph: its inputs at two example sizes, and every node's value
    there."""

    examples: tuple[Example, Example]
    others: Sequence[Example] = ()  # at which the graph may be checked, where its guards hold there
    # every node's value at the second example, set by shape_propagation; passes add those of the nodes that they make
    second: dict[torch.fx.Node, Any] = field(default_factory=dict)
    # each of `others` at which the guards hold, and every node's value there before sizes became nodes and literals
    elsewhere: list[tuple[Example, dict[torch.fx.Node, Any]]] = field(default_factory=list)

    @classmethod
    def of(cls, examples: tuple[Example, Example], others: Sequence[Example] = ()) -> NormalizeContext:
        """Returns the context of a graph as a front end made it."""
        return cls(Phase.TRACED, examples, others)


def shape_propagation(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Writes `val`, a node's value at the first example (a meta tensor, a number, or a tuple of them), and its size
    symbols: for a tensor one a dim ("" where constant), for a tuple a tuple of such, for an int its own.

    `ctx.second` is then every node's value at the second example.
    """
    interpreter = ShapeInterpreter(graph_module)
    first, second = interpreter.values(ctx.examples[0]), interpreter.values(ctx.examples[1])
    sizes = Sizes(ctx.examples[0].symbols, ctx.examples[1].symbols)
    for node, value in first.items():
        node_meta.set_val(node, value)
        if isinstance(value, torch.Tensor):
            node_meta.set_symbols(node, sizes.of_shape(value.shape, second[node].shape))
        elif type(value) is int and type(second[node]) is int:
            node_meta.set_symbols(node, sizes.symbol(value, second[node]))
        elif isinstance(value, (tuple, list)):
            known = tuple(
                sizes.of_shape(x.shape, y.shape) if isinstance(x, torch.Tensor) else None
                for x, y in zip(value, second[node], strict=False)
            )
            node_meta.set_symbols(node, known)
    node_meta.drop_ended(graph_module, Phase.ANNOTATED)
    ctx.phase, ctx.second = Phase.ANNOTATED, second
    for example in ctx.others:
        again = replace(example, inputs=copy.deepcopy(dict(example.inputs)))  # a run adds to the cache that it is given
        if (values := _where_guards_hold(interpreter, example)) is not None:
            ctx.elsewhere.append((again, values))
    return PassResult(graph_module, len(first))


def _where_guards_hold(interpreter: ShapeInterpreter, example: Example) -> dict[torch.fx.Node, Any] | None:
    """Returns every node's value at an example; None where a guard comes out otherwise, and where an op refuses it."""
    try:
        values = interpreter.values(example)
    except Exception:  # whatever an op says of sizes that it does not take
        return None
    asked = ((value, node_meta.guard_outcome(node)) for node, value in values.items() if node_meta.is_guard(node))
    return values if all(bool(value) == outcome for value, outcome in asked) else None


def shaped_node(
    ctx: NormalizeContext, like: torch.fx.Node, op: str, target: Any, args: tuple[Any, ...], kwargs: Any = None
) -> torch.fx.Node:
    """Inserts a call where the graph inserts now, with its `val`, symbols and value at the second example, which follow
    from its arguments', and the source line of `like`. For passes that follow shape_propagation at once."""
    node = like.graph.create_node(op, target, args, dict(kwargs or {}))
    node_meta.copy(like, node, only=("nn_module_stack", "source"))

    def value(of: Any) -> Any:
        given, named = map_arg((node.args, node.kwargs), of)
        with torch.no_grad(), torch.device("meta"):
            return getattr(given[0], target)(*given[1:], **named) if op == "call_method" else target(*given, **named)

    first, second = value(node_meta.val), value(ctx.second.__getitem__)
    node_meta.set_val(node, first)
    ctx.second[node] = second
    if isinstance(first, torch.Tensor):
        sizes = Sizes(ctx.examples[0].symbols, ctx.examples[1].symbols)
        node_meta.set_symbols(node, sizes.of_shape(first.shape, second.shape))
    return node
