"""Finds the ops of a normalised graph that draw random numbers: ranks that each draw their own compute different
things."""

from __future__ import annotations

import torch.fx
from torch.fx import Node

from passes.fx.arguments import argument
from passes.fx.nodes import is_pure, op_name, writes


def random_nodes(graph_module: torch.fx.GraphModule) -> list[Node]:
    """Returns the nodes that draw random numbers, in the graph's order. Dropout that does nothing (in eval mode, or
    with p = 0) draws none."""
    return [node for node in graph_module.graph.nodes if _draws(node)]


def _draws(node: Node) -> bool:
    name = op_name(node)
    if name == "scaled_dot_product_attention":
        return argument(node, 4, "dropout_p", 0.0) != 0.0
    return node.op.startswith("call") and not writes(node) and not is_pure(node)
