"""static_cache: makes a step's program for a cache of constant size, whose shapes are the same at every step.

before  past = past_key_values.get_seq_length(0); total = sym_size(attention_mask, 1)
        query = add(arange(seq), past); keys = arange(total); seen = le(keys, query)
after   past_tokens = placeholder
        query = add(arange(seq), past_tokens); keys = arange(64); seen = le(keys, query)

One token a row is cached. How many are cached already, P, is a tensor: a number would be the same at each replay. The
tokens that keys are of, T = P + 1, are as many as the cache has room for: `attention_mask` is as long, zeros behind
token P, and what the cache returns is as long, too. So attention sees rows that nobody wrote, and weighs them with
zeros, as the mask says. Whoever runs such a program sees to it that they hold no NaN, and compares a step with the
original's: that nothing else reads them (a mean over T) follows from no rule here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.nodes import op_name, writes
from passes.ops.functional_writes import with_item

PAST = "past_tokens"  # the input int64 [] that the program takes beside those of the original
_SIZED = frozenset({
    "view", "reshape", "expand", "repeat", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty",
    "new_full", "broadcast_to",
})  # fmt: skip
_NUMBERS: dict[Any, Callable[[int, int], int]] = {operator.add: operator.add, operator.sub: operator.sub}
_WITH_TENSORS = frozenset({
    "add", "sub", "mul", "lt", "le", "gt", "ge", "eq", "ne", "rsub", "truediv", "floordiv", "div", "minimum", "maximum",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Length:
    """P + `more` tokens, where P are cached before the step."""

    more: int

    def __str__(self) -> str:
        return f"P{self.more:+d}" if self.more else "P"


_TOTAL = Length(1)


def static_cache(module: torch.fx.GraphModule, capacity: int, cache: str = "past_key_values") -> torch.fx.GraphModule:
    """Returns the program for a cache of `capacity` tokens; `module` is not changed, and lends its weights.

    It takes the inputs of `module`, `attention_mask` [batch, capacity], and `past_tokens`; `input_ids` have one token a
    row. `cache` is the input whose layers' `update` and `read` return all `capacity` tokens. Raises PlanError, which
    names the node, for a use of a length that is neither a size nor a number for tensors.
    """
    graph = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, copies))
    for old, new in copies.items():
        node_meta.set_everything(new, node_meta.everything(old))
    made = torch.fx.GraphModule(module, graph, class_name=f"{module._get_name()}Static")
    _Rewrite(graph, capacity, cache).run()
    graph.eliminate_dead_code(lambda node: node.is_impure() or writes(node))
    graph.lint()
    made.recompile()
    return made.eval()


class _Rewrite:
    """One graph's rewrite. `known`: the nodes that are numbers of tokens."""

    def __init__(self, graph: torch.fx.Graph, capacity: int, cache: str) -> None:
        self.graph, self.capacity, self.cache = graph, capacity, cache
        self.known: dict[Node, Length | int] = {}
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        with graph.inserting_before(inputs[0]):
            self.past = graph.placeholder(PAST)
        node_meta.set_val(self.past, torch.empty((), dtype=torch.long, device="meta"))
        inputs[-1].append(self.past)
        self.sums: dict[int, Node] = {0: self.past}  # past_tokens + n

    def run(self) -> None:
        """Rewrites all nodes, in order."""
        for node in list(self.graph.nodes):
            if node is self.past or node.op in ("placeholder", "get_attr"):
                continue
            number = self._number(node)
            if number is not None:
                self.known[node] = number
            elif node.target in (operator.getitem, with_item) and node_meta.is_tensor(node.args[0]):
                self._index(node)
            elif any(n in self.known for n in node.all_input_nodes):
                self._use(node)

    # ------------------------------------------------------------------------------------------------ what a number is

    def _number(self, node: Node) -> Length | int | None:
        """Returns what a node counts, None for anything that is no number of tokens."""
        if node.op == "call_method" and self._is_cache(node.args[0]):
            return Length(0) if node.target == "get_seq_length" else None
        if node.op != "call_function":
            return None
        if node.target is torch.ops.aten.sym_size.int:
            return self._size(node.args[0], int(node.args[1]))
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            source = node.args[0]
            if source.op == "call_method" and source.target == "get_mask_sizes" and self._is_cache(source.args[0]):
                return _TOTAL if node.args[1] == 0 else 0
        if node.target in _NUMBERS and not any(node_meta.is_tensor(n) for n in node.all_input_nodes):
            a, b = (self.known.get(x, x) if isinstance(x, Node) else x for x in node.args)
            return _sum(a, b, _NUMBERS[node.target])
        return None

    def _size(self, tensor: Node, dim: int) -> Length | int | None:
        named: dict[str, Length | int] = {"T": _TOTAL, "P": Length(0), "S": 1}
        return named.get(_symbol(tensor, dim))

    def _is_cache(self, node: Any) -> bool:
        return isinstance(node, Node) and node.op == "placeholder" and node.target == self.cache

    # --------------------------------------------------------------------------------------------- what is done with it

    def _use(self, node: Node) -> None:
        """Rewrites a node that reads numbers of tokens."""
        if not any(isinstance(self.known.get(n), Length) for n in node.all_input_nodes):
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: self.known.get(n, n))
        elif node.target == "get_mask_sizes" or node.op == "output":
            if node.op == "output":
                self._refuse(node, "returns it")
            node.args = map_arg(node.args, lambda n: self._as_size(node, n))
        elif node.target is torch.arange:
            self._arange(node)
        elif op_name(node) in _SIZED or op_name(node) == "recv":
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: self._as_size(node, n))
        elif op_name(node) in _WITH_TENSORS and any(node_meta.is_tensor(n) for n in node.all_input_nodes):
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: self._as_tensor(node, n))
        else:
            self._refuse(node, "reads it")

    def _as_size(self, node: Node, n: Node) -> Any:
        number = self.known.get(n, n)
        if isinstance(number, Length):
            if number != _TOTAL:
                self._refuse(node, f"has a size of {number} tokens")
            return self.capacity
        return number

    def _as_tensor(self, node: Node, n: Node) -> Any:
        number = self.known.get(n, n)
        return self._sum_before(node, number.more) if isinstance(number, Length) else number

    def _sum_before(self, node: Node, more: int) -> Node:
        """Returns the node of P + `more`, a tensor without dims."""
        if more not in self.sums:
            with self.graph.inserting_after(self.past):
                self.sums[more] = self.graph.call_function(operator.add, (self.past, more))
            node_meta.set_val(self.sums[more], node_meta.val(self.past))
        return self.sums[more]

    def _arange(self, node: Node) -> None:
        bounds = [self.known.get(a, a) if isinstance(a, Node) else a for a in node.args]
        if len(bounds) == 1:
            bounds = [0, *bounds]
        start, stop, *step = bounds
        if step not in ([], [1]) or any(isinstance(b, Node) for b in bounds):
            self._refuse(node, "counts in steps, or to a length of another kind")
        if not isinstance(start, Length):
            if isinstance(stop, Length) and stop != _TOTAL:
                self._refuse(node, f"counts to {stop}")
            node.args = (start, self.capacity if isinstance(stop, Length) else stop)
            return
        if not isinstance(stop, Length):
            self._refuse(node, f"counts from {start}")
        count = stop.more - start.more
        with self.graph.inserting_before(node):
            counted = self.graph.call_function(torch.arange, (count,), node.kwargs)
            node_meta.copy(node, counted)
        node.target, node.args, node.kwargs = operator.add, (counted, self._sum_before(node, start.more)), {}

    def _index(self, node: Node) -> None:
        """Rewrites `x[..., a:b]`, read or written, where it counts tokens of T: from the end, which is elsewhere now,
        or from P."""
        x, index = node.args[:2]
        items = index if isinstance(index, tuple) else (index,)
        dims = node_meta.tensor(x).dim()
        dim, found = 0, []
        for place, item in enumerate(items):
            if item is Ellipsis:
                dim = dims - sum(i is not None for i in items[place + 1 :])
            elif item is not None:
                found.append((place, _symbol(x, dim) == "T", item))
                dim += 1
            if isinstance(item, Node) and node_meta.is_tensor(item) and len(found) > 1:
                break  # elements that a tensor names, of several dims at once: in order from the start
        for place, counts_tokens, item in found:
            bounds = [item.start, item.stop, item.step] if isinstance(item, slice) else [item]
            bounds = [self.known.get(b, b) if isinstance(b, Node) else b for b in bounds]
            if counts_tokens or any(isinstance(b, Length) for b in bounds):
                self._slice(node, items, place, item, bounds, counts_tokens)
                items = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)

    def _slice(
        self, node: Node, items: tuple[Any, ...], place: int, item: Any, bounds: list[Any], counts_tokens: bool
    ) -> None:
        if isinstance(item, Node) and node_meta.is_tensor(item):
            return
        if not isinstance(item, slice):
            position = bounds[0]
            if isinstance(position, int) and position < 0 and counts_tokens:
                position = Length(1 + position)
            new: Any = self._sum_before(node, position.more) if isinstance(position, Length) else position
        else:
            start, stop, step = bounds
            if step not in (None, 1) or not counts_tokens:
                self._refuse(node, "takes it as a bound of another dim")
            start, stop = _from_start(start), _from_start(stop)
            if stop is None:
                stop = _TOTAL
            if start in (None, 0) and (stop == _TOTAL or isinstance(stop, int)):
                new = slice(None, None if stop == _TOTAL else stop)
            elif isinstance(start, Length) and isinstance(stop, Length):
                with self.graph.inserting_before(node):
                    counted = self.graph.call_function(torch.arange, (stop.more - start.more,), self._device(node))
                    node_meta.set_val(counted, torch.empty(stop.more - start.more, dtype=torch.long, device="meta"))
                    new = self.graph.call_function(operator.add, (counted, self._sum_before(node, start.more)))
                    node_meta.set_val(new, node_meta.val(counted))
            else:
                self._refuse(node, f"takes tokens {start} to {stop}")
        changed = (*items[:place], new, *items[place + 1 :])
        node.args = (node.args[0], changed if isinstance(node.args[1], tuple) else changed[0], *node.args[2:])

    def _device(self, node: Node) -> dict[str, Any]:
        with self.graph.inserting_after(self.past):
            return {"device": self.graph.call_function(getattr, (self.past, "device"))}

    def _refuse(self, node: Node, what: str) -> NoReturn:
        raise PlanError(
            f"{node.name} ({node_meta.where(node)}) reads how many tokens are cached, and {what}: such a program has "
            "no form for a cache of constant size; generate without cuda_graphs"
        )


def _symbol(tensor: Node, dim: int) -> str:
    """Returns the size symbol of a dim, "" where none is known."""
    symbols = node_meta.symbols(tensor)
    return symbols[dim] if -len(symbols) <= dim < len(symbols) else ""


def _sum(a: Any, b: Any, operation: Callable[[int, int], int]) -> Length | int | None:
    """Returns a + b or a - b, None where that is no number of tokens that can be said."""
    if isinstance(a, int) and isinstance(b, int):
        return operation(a, b)
    if isinstance(a, Length) and isinstance(b, int):
        return Length(operation(a.more, b))
    if isinstance(a, int) and isinstance(b, Length) and operation is operator.add:
        return Length(a + b.more)
    if isinstance(a, Length) and isinstance(b, Length) and operation is operator.sub:
        return a.more - b.more
    return None


def _from_start(bound: Any) -> Any:
    """Returns a bound that counts from the end, at T, as one that counts from the start."""
    return Length(1 + bound) if isinstance(bound, int) and bound < 0 else bound
