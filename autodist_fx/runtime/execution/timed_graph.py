"""`TimedGraph`: runs a bound graph and notes when each of its nodes was done: a look at the clock between any two.

    bound   y = linear(x, t17);                          z = all_reduce(y, axis="tp")
    timed   y = linear(x, t17); note(); meet(y); note(); z = all_reduce(y, axis="tp"); note()

A look takes 0.1 us. In front of each collective the ranks meet, by an all_reduce of one number, so that what a rank
waits for the others is told from what moving the tensor takes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from autodist_fx.runtime.execution.bound_graph import BoundGraph
from passes.fx.nodes import op_name
from passes.ops import comm

MEETING = "meet"  # ends the name of what a rank waits in front of a collective


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run of a graph: when it began, by time.perf_counter_ns, and the nanoseconds of each name, in order."""

    began: int
    nanoseconds: tuple[int, ...]


class TimedGraph:
    """A bound graph with clocks between its nodes, whose names are `names`, and its runs so far."""

    def __init__(self, bound: BoundGraph) -> None:
        self._bound = bound
        self.runs: list[TimedRun] = []
        self._stamps: list[int] = []
        self._of: GraphModule | None = None
        self.names: list[str] = []

    @property
    def module(self) -> GraphModule:
        """Return the module that runs."""
        return self._timed()

    @property
    def nodes(self) -> dict[str, Node]:
        """Return the bound graph's nodes, by name."""
        return {node.name: node for node in self._bound.current().graph.nodes}

    def kind(self, node: Node) -> str:
        """Return what a node of the bound graph calls: "linear", "all_reduce", "VocabParallelEmbedding"."""
        if node.op == "call_module":
            return type(getattr(self._bound.module, str(node.target))).__name__
        return op_name(node)

    def __call__(self, inputs: Mapping[str, Any]) -> Any:
        """Return what the bound graph returns, and note how long each of its nodes took."""
        module, stamps = self._timed(), self._stamps
        stamps.clear()
        stamps.append(time.perf_counter_ns())
        result = module.forward(**inputs)
        taken = tuple(stop - start for start, stop in itertools.pairwise(stamps))
        self.runs.append(TimedRun(stamps[0], taken))
        return result

    def _timed(self) -> GraphModule:
        bound = self._bound.current()
        if self._of is not bound:
            self._of, self.runs = bound, []
            self._module = self._with_clocks(bound)
        return self._module

    def _with_clocks(self, bound: GraphModule) -> GraphModule:
        graph, copies, stamps = Graph(), dict[Node, Node](), self._stamps
        self.names = []

        def note() -> None:
            stamps.append(time.perf_counter_ns())

        for node in bound.graph.nodes:
            if node.op == "call_function" and node.target in comm.COLLECTIVES:
                x = copies[node.all_input_nodes[0]]
                graph.call_function(_meet, (x, node.kwargs.get("axis", "tp")))
                graph.call_function(note)
                self.names.append(f"{node.name} {MEETING}")
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op not in ("placeholder", "output"):
                graph.call_function(note)
                self.names.append(node.name)
        module = GraphModule({}, Graph(), type(bound).__name__)
        module.__dict__.update({name: value for name, value in vars(bound).items() if name not in vars(module)})
        module._modules.update(bound._modules)
        module.graph = graph
        return module


def _meet(x: torch.Tensor, axis: str) -> None:
    """Wait for the other ranks of `axis`."""
    with torch.no_grad():
        comm.all_reduce(torch.zeros(1, dtype=torch.float32, device=x.device), axis)
