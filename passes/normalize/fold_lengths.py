"""fold_lengths: computes sizes that follow the inputs in a few nodes at the top of the graph, and makes literals of all
others.

before  size = x.size(); getitem = size[0]; add = getitem + 0; view = q.view((add, getitem_1, -1, 64))
after   batch = sym_size(input_ids, 0); view = q.view((batch, seq, -1, 64))
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from passes.fx import node_meta
from passes.fx.nodes import is_pure, op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext


def fold_lengths(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Replaces every number, size, dtype and device by a literal or by one of a few nodes at the top, in place.

    What is the same at both examples is constant; guards alone go on reading it where it is computed of what is not,
    and may be otherwise at other lengths. The new nodes' values go to `ctx.second`; nodes that nothing reads any more
    are left to eliminate_dead_code.
    """
    graph, second, edit, matches = graph_module.graph, ctx.second, GraphEdit(graph_module), 0
    asked, bent = _asked_by_guards(graph), _bent(graph, second)
    lengths = _length_nodes(graph, second)
    lengths = _WithChunks(graph, second, lengths)
    anchor = next((n for n in graph.nodes if n.op == "placeholder" and node_meta.is_tensor(n)), None)
    device: Node | None = None

    def spelled(node: Node, a: Any, b: Any) -> Any:
        """`a` in literals and length nodes; raises KeyError where that can't be said."""
        nonlocal device
        if isinstance(a, torch.Size) or type(a) is tuple or type(a) is list:
            return tuple(spelled(node, x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, torch.device):
            if anchor is None:
                raise KeyError(a)
            if device is None:
                with graph.inserting_after(max(lengths.values(), key=_position(graph), default=anchor)):
                    device = graph.call_function(getattr, (anchor, "device"))
                    node_meta.set_val(device, a)
            return device
        if a is None or isinstance(a, (torch.dtype, str)):
            return a
        if isinstance(a, (bool, float)) and a == b:
            return a
        if isinstance(a, int) and not isinstance(a, bool):
            if a != b and (a, b) not in lengths:
                product = _product(graph, inputs, a, b)
                if product is not None:
                    lengths[a, b], second[product] = product, b
                    known.add(product)
            return a if a == b else lengths[a, b]
        raise KeyError(a)

    inputs = dict(lengths)
    known = set(lengths.values())
    for node in list(graph.nodes):
        value = node_meta.val(node)
        if isinstance(value, torch.Tensor) or not node.users:
            continue
        if node.op in ("placeholder", "output", "get_attr") or node in known or node is device or not is_pure(node):
            continue
        try:
            said = spelled(node, value, second[node])
        except (KeyError, TypeError, ValueError):
            if isinstance(value, int) and not isinstance(value, bool) and (value, second[node]) not in lengths:
                lengths[value, second[node]] = node  # the first to compute this length computes it for all
            continue
        _replace_everywhere(node, said, asked if node in bent else frozenset())
        matches += 1
    return edit.result(matches)


def _asked_by_guards(graph: torch.fx.Graph) -> frozenset[Node]:
    """Returns the guards and the numbers that they are computed of."""
    found: dict[Node, None] = {}
    pending = [node for node in graph.nodes if node_meta.is_guard(node)]
    while pending:
        node = pending.pop()
        if node not in found and not isinstance(node_meta.val(node), torch.Tensor):
            found[node] = None
            pending += node.all_input_nodes
    return frozenset(found)


def _bent(graph: torch.fx.Graph, second: dict[Node, Any]) -> set[Node]:
    """Returns the numbers that are the same at both examples and are computed of others that are not: blocks of 64
    tokens, of which both have one."""
    found: set[Node] = set()
    for node in graph.nodes:
        value = node_meta.val(node)
        if type(value) in (int, bool, float) and value == second.get(node):
            given = [n for n in node.all_input_nodes if type(node_meta.val(n)) in (int, bool, float)]
            if any(n in found or node_meta.val(n) != second.get(n) for n in given):
                found.add(node)
    return found


def _position(graph: torch.fx.Graph) -> Callable[[Node], int]:
    order = {n: i for i, n in enumerate(graph.nodes)}
    return lambda n: order.get(n, len(order))


def _length_nodes(graph: torch.fx.Graph, second: dict[Node, Any]) -> dict[tuple[int, int], Node]:
    """Makes a node for each distinct size among the graph inputs' dims, right behind the placeholders."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    sources: dict[tuple[int, int], tuple[Node, int]] = {}
    for node in inputs:
        value = node_meta.val(node)
        if isinstance(value, torch.Tensor):
            for dim, pair in enumerate(zip(value.shape, second[node].shape, strict=True)):
                if pair[0] != pair[1]:
                    sources.setdefault(pair, (node, dim))
    names = {"B": "batch", "S": "seq", "T": "total"}
    lengths: dict[tuple[int, int], Node] = {}
    for pair, (node, dim) in reversed(sources.items()):
        with graph.inserting_after(inputs[-1]):
            name = names.get(node_meta.symbols(node)[dim], "length")
            length = graph.create_node("call_function", torch.ops.aten.sym_size.int, (node, dim), name=name)
        node_meta.set_val(length, pair[0])
        second[length] = pair[1]
        lengths[pair] = length
    return lengths


class _WithChunks(dict[tuple[int, int], Node]):
    """A table of sizes by their values at both examples, which also finds the number of chunks that an input's size
    makes.

    ceil(S / 64), that and one more, and that times 64, are computed from S at the top of the graph, where the model
    may read them off a tensor that not every stage has. The examples tell them from floor(S / 64) and from
    floor(S / 64) + 1: the second length is a multiple of 64, the first is none. Both are where the graph's guards want
    a multiple (guard_examples.py): then floor and ceil are one.
    """

    def __init__(
        self, graph: torch.fx.Graph, second: dict[Node, Any], lengths: dict[tuple[int, int], Node]
    ) -> None:
        super().__init__(lengths)
        self.graph, self.second = graph, second
        self.sizes = {a for n in graph.nodes if op_name(n) in ("mod", "floordiv") for a in n.args if type(a) is int}
        self.inputs = dict(lengths)

    def __missing__(self, pair: tuple[int, int]) -> Node:
        for (a, b), length in self.inputs.items():
            for size in self.sizes:
                if size < 2 or b % size:
                    continue
                chunks = (-(-a // size), -(-b // size))
                steps = [(operator.add, size - 1), (operator.floordiv, size)]
                if pair == chunks:
                    return self._make(length, pair, steps)
                if pair == (chunks[0] * size, chunks[1] * size):
                    return self._make(length, pair, [*steps, (operator.mul, size)])
                if pair == (chunks[0] + 1, chunks[1] + 1):
                    return self._make(length, pair, [*steps, (operator.add, 1)])
        raise KeyError(pair)

    def _make(self, length: Node, pair: tuple[int, int], steps: list[tuple[Callable[[int, int], int], int]]) -> Node:
        last = max(self.values(), key=_position(self.graph))
        made = length
        for operation, number in steps:
            with self.graph.inserting_after(last):
                last = self.graph.call_function(operation, (made, number))
            node_meta.set_val(last, operation(node_meta.val(made), number))
            self.second[last] = operation(self.second[made], number)
            made = last
        self[pair] = made
        return made


def _product(graph: torch.fx.Graph, inputs: dict[tuple[int, int], Node], a: int, b: int) -> Node | None:
    """Makes a node at the top of the graph for a product of input sizes and a number ("B*S", "B*S*2") that is `a`
    and `b` at the two examples. So no stage has to know a tensor of another stage for its size."""
    for (x, y), length in inputs.items():
        if not x or not y or a % x or b % y:
            continue
        more = (a // x, b // y)
        rest = more[0] if more[0] == more[1] else inputs.get(more) or _product(graph, inputs, *more)
        if rest is not None:
            last = max((n for n in (length, rest) if isinstance(n, Node)), key=_position(graph))
            with graph.inserting_after(last):
                product = graph.call_function(operator.mul, (length, rest))
            node_meta.set_val(product, a)
            return product
    return None


def _replace_everywhere(node: Node, value: Any, but_in: frozenset[Node]) -> None:
    """Replaces the uses of a node, like replace_all_uses_with, by a literal or a tuple holding nodes; not those by
    nodes `but_in`."""
    for user in node.users.keys() - but_in:
        user.args = map_arg(user.args, lambda n: value if n is node else n)
        user.kwargs = map_arg(user.kwargs, lambda n: value if n is node else n)
