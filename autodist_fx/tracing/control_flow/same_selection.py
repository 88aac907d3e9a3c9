"""Finds the elements that a mask selected already, where a model writes the mask twice.

    logits[mask.to(logits.device) != 0]     both select as many elements, which two calls are not known to: how many
    labels[mask.to(labels.device) != 0]     there are is known when the graph runs
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.fx import Node

from autodist_fx.tracing.versions.tracer_base import SymbolicProxy, SymbolicTracer
from passes.fx.random_ops import draws
from passes.ops.data_dependent import selected

_NEARBY = 48  # nodes back that a mask is looked for among
_CHANGING = (
    "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
)  # fmt: skip


def selected_before(tracer: SymbolicTracer, mask: Node) -> SymbolicProxy | None:
    """Return what a mask that is written alike selected shortly before; None where none did, or where a tensor was
    changed since, perhaps one that the mask is made of."""
    for node in itertools.islice(reversed(tracer.graph.nodes), _NEARBY):
        name = _name(node)
        if name in _CHANGING or (name.endswith("_") and not name.startswith("_")):
            return None
        if node.target is selected and _are_alike(tracer, node.args[0], mask):
            found = SymbolicProxy(node, tracer)
            found.install_metadata(tracer.examples_of[node])
            return found
    return None


def _are_alike(tracer: SymbolicTracer, a: Any, b: Any) -> bool:
    """Return whether two expressions are the same, of the same values; none is that draws random numbers."""
    if isinstance(a, Node) and isinstance(b, Node):
        a, b = _where_it_was(tracer, a), _where_it_was(tracer, b)
        if a is b:
            return True
        of_a, of_b = (a.args, a.kwargs), (b.args, b.kwargs)
        is_called = a.op in ("call_function", "call_method") and not draws(a, _name(a), None)
        return is_called and (a.op, a.target) == (b.op, b.target) and _are_alike(tracer, of_a, of_b)
    if type(a) is not type(b):
        return False
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_are_alike(tracer, x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_are_alike(tracer, a[key], b[key]) for key in a)
    if isinstance(a, slice):
        return _are_alike(tracer, (a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return bool(a == b)


def _name(node: Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _where_it_was(tracer: SymbolicTracer, node: Node) -> Node:
    """Return the tensor that x.to(device) moves: its elements are the same."""
    while node.target == "to" and node.op == "call_method":
        source = node.args[0]
        before, after = tracer.examples_of.get(source), tracer.examples_of.get(node)
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
            break
        node = source
    return node
