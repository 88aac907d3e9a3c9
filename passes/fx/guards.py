"""Guards: conditions on input sizes that the model's Python asked while it was traced, as a graph to be asked again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch.fx import Node

CACHED = "P"
NEVER_OTHERWISE = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
_ANY_LENGTH = 2  # stands for one that is not known, in computing others


@dataclass(frozen=True)
class Guards:
    """The guards of a traced graph: a GraphModule that maps size symbols to one bool per guard, and what each came to.
    """

    graph_module: torch.fx.GraphModule
    symbols: tuple[str, ...]  # of the sizes that `graph_module` takes
    expected: tuple[bool, ...]
    sources: tuple[str, ...]  # the model's lines

    @functools.cached_property
    def needs(self) -> tuple[frozenset[str], ...]:
        """Returns, for each guard, the size symbols that it depends on."""
        of: dict[Node, frozenset[str]] = {}
        for node in self.graph_module.graph.nodes:
            own = [str(node.target)] if node.op == "placeholder" else []
            of[node] = frozenset(own).union(*(of[source] for source in node.all_input_nodes))
        output = self.graph_module.graph.output_node()
        return tuple(of.get(asked, frozenset()) for asked in output.args[0])

    @functools.cached_property
    def numbers(self) -> frozenset[int]:
        """Returns the integer constants that sizes are compared with or divided by."""
        return frozenset(a for n in self.graph_module.graph.nodes for a in n.args if type(a) is int and a > 1)

    def answers(self, lengths: Mapping[str, int]) -> tuple[bool | None, ...]:
        """Evaluates each guard at these sizes; None where one depends on a size that is not given."""
        found = self.graph_module.forward(*(lengths.get(symbol, _ANY_LENGTH) for symbol in self.symbols))
        if all(symbol in lengths for symbol in self.symbols):
            return tuple(bool(answer) for answer in found)
        return tuple(bool(a) if n <= lengths.keys() else None for a, n in zip(found, self.needs, strict=True))

    def violated(self, lengths: Mapping[str, int], *, remainders: bool = True) -> list[str]:
        """Returns the source positions of the guards that come out otherwise at these sizes: none, mostly. Guards on
        sizes that are not given are not asked, nor, without `remainders`, those on what divides them."""
        found = []
        for number, (answer, expected) in enumerate(zip(self.answers(lengths), self.expected, strict=True)):
            if answer is not None and answer != expected and (remainders or not self._divides[number]):
                found.append(self.sources[number])
        return found

    @functools.cached_property
    def _divides(self) -> tuple[bool, ...]:
        of: dict[Any, bool] = {}
        for node in self.graph_module.graph.nodes:
            of[node] = node.target is operator.mod or any(of[source] for source in node.all_input_nodes)
        return tuple(of.get(asked, False) for asked in self.graph_module.graph.output_node().args[0])


def with_fixed(guards: Guards | None, fixed: Mapping[str, int]) -> Guards | None:
    """Adds the guard `symbol == n` for each size in `fixed`, which the graph holds as a number."""
    if not fixed:
        return guards
    graph, copies = torch.fx.Graph(), dict[Node, Node]()
    symbols = dict.fromkeys((*(() if guards is None else guards.symbols), *fixed))
    inputs = {symbol: graph.placeholder(symbol) for symbol in symbols}
    asked: list[Any] = []
    if guards is not None:
        for node in guards.graph_module.graph.nodes:
            if node.op == "output":
                asked = [copies.get(n, n) for n in node.args[0]]
            elif node.op == "placeholder":
                copies[node] = inputs[str(node.target)]
            else:
                copies[node] = graph.node_copy(node, copies.__getitem__)
    asked += [graph.call_function(operator.eq, (inputs[symbol], number)) for symbol, number in fixed.items()]
    graph.output(tuple(asked))
    before = ((), ()) if guards is None else (guards.expected, guards.sources)
    expected = (*before[0], *(True for _ in fixed))
    sources = (*before[1], *(f"{symbol} == {number}" for symbol, number in fixed.items()))
    return Guards(torch.fx.GraphModule({}, graph), tuple(symbols), expected, sources)
