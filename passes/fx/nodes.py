"""Reads off a node what it calls, and whether the call may be repeated."""

from __future__ import annotations

from torch.fx import Node

from passes.fx import node_meta
from passes.fx.arguments import submodule
from passes.fx.random_ops import draws

_WRITES = frozenset({"update", "write_buffers"})


def op_name(node: Node) -> str:
    """Returns the plain name of what a node calls: "add" for operator.add, torch.add and Tensor.add alike."""
    if node.op in ("call_method",):
        return str(node.target)
    if node.op == "call_function":
        name = getattr(node.target, "__name__", str(node.target))
        return name.strip("_") if name in ("and_", "or_", "not_") else name
    if node.op == "call_module":
        return type(submodule(node.graph.owning_module, str(node.target))).__name__
    return node.op


def is_pure(node: Node) -> bool:
    """Returns False for a node that writes a cache or a buffer, or draws random numbers: it is never merged, nor
    computed twice."""
    if node_meta.is_guard(node):
        return False
    if node.op in ("placeholder", "output"):
        return False
    module = submodule(node.graph.owning_module, str(node.target)) if node.op == "call_module" else None
    name = op_name(node)
    return name not in _WRITES and not draws(node, name, module)


def writes(node: Node) -> bool:
    """Returns whether a node changes a cache or a buffer."""
    return node.op.startswith("call") and op_name(node) in _WRITES
