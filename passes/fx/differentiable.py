"""Finds the nodes of a graph through which a gradient reaches a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.arguments import fetch
from passes.fx.nodes import op_name

# Their results have no gradient, whatever they are made from.
_CONSTANT = (
    "detach", "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
    "log_sum_exp",
)  # fmt: skip


def differentiable(module: torch.fx.GraphModule, is_needed: Callable[[Node], bool] | None = None) -> set[Node]:
    """Returns the nodes of floating-point values that depend on a parameter with requires_grad, and those parameters'
    nodes.

    `is_needed` says it of nodes that the graph itself cannot tell of: what is received from another rank.
    """
    found: set[Node] = set()
    for node in module.graph.nodes:
        if node.op in ("placeholder", "output") or not _is_floating(node_meta.val(node)):
            continue
        if is_needed is not None and is_needed(node):
            found.add(node)
        elif node.op == "get_attr":
            if wants_gradient(fetch(module, str(node.target))):
                found.add(node)
        elif op_name(node) not in _CONSTANT and (
            any(a in found for a in node.all_input_nodes) or any(True for _ in own_parameters(module, node))
        ):
            found.add(node)
    return found


def own_parameters(module: torch.fx.GraphModule, node: Node) -> list[str]:
    """Returns the paths of the parameters with requires_grad that a call_module node reads; [] for other nodes."""
    if node.op != "call_module":
        return []
    target = str(node.target)
    own = module.get_submodule(target).named_parameters(remove_duplicate=False)
    return [f"{target}.{name}" for name, parameter in own if wants_gradient(parameter)]


def wants_gradient(value: Any) -> bool:
    """Returns whether a value is a parameter with requires_grad."""
    return isinstance(value, torch.nn.Parameter) and value.requires_grad


def _is_floating(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_floating(v) for v in value)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
