"""Reads off a node what it calls, and whether the call may be repeated."""

from __future__ import annotations

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.arguments import submodule

_WRITES = frozenset({"update", "write_buffers"})
# Methods that overwrite a tensor with numbers that they draw.
RANDOM_FILLS = frozenset({
    "uniform_", "normal_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_",
})  # fmt: skip
_RANDOM = RANDOM_FILLS | {
    "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout",
    "gumbel_softmax", "bernoulli", "bernoulli_", "rand", "randn", "randint", "randperm", "rand_like", "randn_like",
    "randint_like", "multinomial", "normal", "poisson", "uniform",
}  # fmt: skip


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
    name = op_name(node)
    if node.op == "call_module":
        module = submodule(node.graph.owning_module, str(node.target))
        return not (isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0)
    return node.op not in ("placeholder", "output") and name not in _WRITES | _RANDOM


def writes(node: Node) -> bool:
    """Returns whether a node changes a cache or a buffer."""
    return node.op.startswith("call") and op_name(node) in _WRITES
