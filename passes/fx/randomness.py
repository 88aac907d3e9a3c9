"""Finds the ops of a graph that draw random numbers. Those that draw them from torch's generators would draw others on
each rank; normalize makes seeded ones of them (passes/normalize/random), whose numbers follow from an input."""

from __future__ import annotations

import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.nodes import is_pure, writes
from passes.ops.random import seeded_dropout, seeded_uniform


def unseeded_nodes(graph_module: torch.fx.GraphModule) -> list[Node]:
    """Returns the nodes that draw from torch's generators, in the graph's order. Dropout that does nothing (in eval
    mode, or with p = 0) draws none."""
    return [node for node in graph_module.graph.nodes if _draws(node)]


def seeded_nodes(graph_module: torch.fx.GraphModule) -> list[Node]:
    """Returns the nodes whose random numbers follow from the input `random_state`, in the graph's order."""
    return [node for node in graph_module.graph.nodes if node.target in (seeded_dropout, seeded_uniform)]


def _draws(node: Node) -> bool:
    return node.op.startswith("call") and not (writes(node) or node_meta.is_guard(node) or is_pure(node))
