"""extract_guards: moves `if`s on input sizes, which the model's Python took while it was traced, into the graph's
guards.

    before  %gt = %seq > 24                      (guard_outcome False: so it was for the traced sizes)
    after   nothing in the graph; Guards.violated({"S": 30, ...}) computes `S > 24` for the sizes at hand

A graph has one branch of each `if`. A call at whose sizes a guard comes out otherwise needs another graph, which
whoever calls has made. Comparisons with 1 are no guards: that a single token needs no causal mask is the shortcut which
nearly every model takes, and it computes the same.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from passes.fx import node_meta
from passes.fx.guards import CACHED, NEVER_OTHERWISE, Guards
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext


def extract_guards(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Takes the marked nodes out of a normalised graph, and sets its guards: None where all came out as constants.

    A guard on something else than lengths of the inputs (devices, how many tokens chose an expert) stays as it was
    decided. What only guards read is left to eliminate_dead_code.
    """
    edit = GraphEdit(graph_module)
    guards = _taken(graph_module)
    node_meta.set_guards(graph_module, guards)
    return edit.result(0 if guards is None else len(guards.expected))


def _taken(module: torch.fx.GraphModule) -> Guards | None:
    marked = [node for node in module.graph.nodes if node_meta.is_guard(node)]
    asked = _GuardGraph()
    found: dict[Any, tuple[Any, bool, str]] = {}
    for node in marked:
        if any(type(a) is int and a == 1 for a in node.args):
            continue
        try:
            copy = asked.copied(node)
        except _NotOfLengthsError:
            continue
        if not isinstance(copy, Node) or not copy.all_input_nodes or _is_sure(copy):  # constant
            continue
        key = (copy.target, copy.args, tuple(copy.kwargs.items()))
        found.setdefault(key, (copy, node_meta.guard_outcome(node), node_meta.source(node)))
    for node in reversed(marked):
        if not node.users:
            module.graph.erase_node(node)
        else:
            node_meta.drop_guard(node)
    if not found:
        return None
    graph = asked.graph
    graph.output(tuple(copy for copy, _, _ in found.values()))
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users:
            graph.erase_node(node)
    symbols = tuple(str(n.target) for n in graph.nodes if n.op == "placeholder")
    expected, sources = tuple(e for _, e, _ in found.values()), tuple(s for _, _, s in found.values())
    return Guards(torch.fx.GraphModule({}, graph), symbols, expected, sources)


def _is_sure(node: Node) -> bool:
    """Returns whether a node compares a size with itself."""
    return node.target in NEVER_OTHERWISE and len(node.args) == 2 and node.args[0] == node.args[1]


class _NotOfLengthsError(Exception):
    pass


class _GuardGraph:
    """The graph of guards, in the making."""

    def __init__(self) -> None:
        self.graph = torch.fx.Graph()
        self._symbols: dict[str, Node] = {}
        self._copies: dict[Node, Any] = {}
        self._equal: dict[Any, Node] = {}

    def copied(self, node: Node) -> Any:
        """Returns the node's copy in this graph, made of sizes; a number where it is constant. Raises
        _NotOfLengthsError."""
        pending = [node]
        while pending:
            one = pending[-1]
            if one in self._copies:
                pending.pop()
                continue
            known = self._length(one)
            if known is not None:
                self._copies[one] = known
            elif one.op not in ("call_function", "call_method") or not _is_number(node_meta.val(one)):
                raise _NotOfLengthsError
            elif missing := [source for source in one.all_input_nodes if source not in self._copies]:
                pending += missing
            else:
                args, kwargs = map_arg((one.args, one.kwargs), lambda n: self._copies[n])
                self._copies[one] = self._made(one.op, one.target, args, kwargs)
        return self._copies[node]

    def _made(self, op: str, target: Any, args: Any, kwargs: Any) -> Node:
        key = (op, target, args, tuple(kwargs.items()))
        try:
            return self._equal[key] if key in self._equal else self._equal.setdefault(
                key, self.graph.create_node(op, target, args, kwargs)
            )
        except TypeError:  # a slice among the arguments
            return self.graph.create_node(op, target, args, kwargs)

    def _length(self, node: Node) -> Any:
        """Returns the size that a node reads off an input; None for any other node."""
        if node.op == "call_method" and node.target == "get_seq_length":  # before the step is cached, or after
            symbol = node_meta.size_symbol(node)
            return self._size("?" if symbol is None else symbol, node_meta.val(node))
        source = node.args[0] if node.args else None
        if not isinstance(source, Node) or source.op != "placeholder":
            return None
        value = node_meta.val(source)
        if not isinstance(value, torch.Tensor):
            if node.target is getattr and node.args[1] == "is_initialized":  # of a cache: once it holds something
                return self._made("call_function", operator.gt, (self._input(CACHED), 0), {})
            return None
        sizes = [self._size(name, n) for name, n in zip(node_meta.symbols(source), value.shape, strict=True)]
        if node.target is torch.ops.aten.sym_size.int:
            return sizes[node.args[1]]
        if node.op == "call_method" and node.target == "numel" and None not in sizes:
            return functools.reduce(self._product, sizes)
        return None

    def _size(self, symbol: str, number: int) -> Any:
        if not symbol:
            return number
        return self._input(symbol) if len(symbol) == 1 else None

    def _product(self, a: Any, b: Any) -> Any:
        if not isinstance(a, Node) and not isinstance(b, Node):
            return math.prod((a, b))
        return self._made("call_function", operator.mul, (a, b), {})

    def _input(self, symbol: str) -> Node:
        """Returns the placeholder of a size symbol, made in front of everything else."""
        if symbol not in self._symbols:
            first = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
            if first is None:
                self._symbols[symbol] = self.graph.placeholder(symbol)
            else:
                with self.graph.inserting_before(first):
                    self._symbols[symbol] = self.graph.placeholder(symbol)
        return self._symbols[symbol]


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (type(value) is tuple and all(map(_is_number, value)))
