"""Lesson 2: stages. Decide where to cut a model, find what crosses the cuts, and take out one stage's graph.

Fill in the three holes, then run

    autodist-fx course check 2
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node

from autodist_fx.course.lesson_1.answer import Hop, insert_send_recv


def choose_cuts(seconds: Sequence[float], stages: int) -> list[int]:
    """Return the layers at which stages 1, 2, ... begin, so that the slowest stage takes as little time as possible.

    seconds: what each layer takes. Each stage has one layer at least, and layers stay in order:
    choose_cuts([1, 1, 1, 3], 2) is [3], since 3 | 3 is better than 2 | 4.
    """
    # hole
    ends = [0, *accumulate(seconds)]  # ends[n]: the first n layers together
    # The best way to cut the first n layers into so many stages, one at first: n -> (seconds of the slowest, cuts).
    best: dict[int, tuple[float, list[int]]] = {n: (ends[n], []) for n in range(1, len(ends))}
    for stage in range(1, stages):
        best = {
            n: min((max(best[cut][0], ends[n] - ends[cut]), [*best[cut][1], cut]) for cut in range(stage, n))
            for n in range(stage + 1, len(ends))
        }
    return best[len(seconds)][1]
    # end


def find_hops(whole: GraphModule, stage_of: Mapping[str, int], values: Mapping[str, torch.Tensor]) -> list[Hop]:
    """Return a Hop for each tensor that a stage reads and an earlier one computes: one for each stage that reads it.

    stage_of: node's name -> its stage, for all but placeholders and get_attr: every stage has the model's inputs, and
    keeps the weights that it reads. values: node's name -> an example of its value, which has shape and dtype. Channels
    are 0, 1, 2, ... Whoever reads a tensor is in node.users, what a node reads in node.all_input_nodes.
    """
    # hole
    hops: dict[tuple[str, int], Hop] = {}
    for node in whole.graph.nodes:
        for read in node.all_input_nodes:
            if read.name not in stage_of or stage_of[read.name] == stage_of[node.name]:
                continue
            source, target, value = stage_of[read.name], stage_of[node.name], values[read.name]
            hop = Hop(read.name, source, target, len(hops), tuple(value.shape), value.dtype)
            hops.setdefault((read.name, target), hop)
    return list(hops.values())
    # end


def extract_stage(whole: GraphModule, stage_of: Mapping[str, int], stage: int) -> GraphModule:
    """Return a graph of this stage's nodes alone. Where they read a node of an earlier stage, there is a placeholder of
    that node's name.

    It has the model's placeholders, used or not; it returns what the model returns on the last stage, None on others.
    graph.node_copy(node, f) copies a node that reads f(n) where `node` reads n; GraphModule(whole, graph) makes a
    module of a graph, with those weights that the graph names.
    """
    # hole
    graph = Graph()
    made: dict[Node, Node] = {}

    def here(read: Node) -> Node:
        if read not in made:
            made[read] = graph.node_copy(read) if read.op == "get_attr" else graph.placeholder(read.name)
        return made[read]

    for node in whole.graph.nodes:
        if node.op == "placeholder" or stage_of.get(node.name) == stage:
            made[node] = graph.node_copy(node, here)
    if stage != stage_of["output"]:
        graph.output(None)
    return GraphModule(whole, graph)
    # end


def split(whole: GraphModule, first_nodes: Sequence[str], *inputs: torch.Tensor) -> list[GraphModule]:
    """Split a graph into stages, of which those behind the first begin at `first_nodes`; return each rank's graph."""
    stage_of: dict[str, int] = {}
    for node in whole.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            begins = node.name in first_nodes
            stage_of[node.name] = max(stage_of.values(), default=0) + begins
    values = example_values(whole, *inputs)
    hops = find_hops(whole, stage_of, values)
    stages = [extract_stage(whole, stage_of, stage) for stage in range(len(first_nodes) + 1)]
    for rank, stage in enumerate(stages):
        insert_send_recv(stage, rank, hops)
    return stages


def example_values(whole: GraphModule, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run a graph, node by node; return what each node gave, by its name."""
    found: dict[str, torch.Tensor] = {}

    class Noting(Interpreter):
        def run_node(self, n: Node) -> torch.Tensor:
            found[n.name] = super().run_node(n)
            return found[n.name]

    Noting(whole).run(*inputs)
    return found
