"""Finds routers, the ops whose values decide which elements are read or where rows go; every rank computes them whole.

A sum over ranks is rounded otherwise than one process rounds it. Where its largest entries then choose an expert, two
nearly equal scores may change places, and with them a whole expert's output. Besides, a router's product is small:
sharding it saves little memory and costs a collective of its own, since a choice needs all the scores.
"""

from __future__ import annotations

from cost_model.costs.compute import MATMULS
from cost_model.graph.op_graph import SOURCES, OpGraph, TensorRef

_CHOICES = ("topk", "sort", "argsort", "argmax", "argmin", "one_hot", "selected", "split_rows", "bincount", "histc",
            "nonzero_static")  # fmt: skip
# Kinds of op that a weight may be read through on its way into a product.
_THROUGH = ("to", "permute", "view", "identity", "slice")


def deciding_ops(graph: OpGraph) -> set[str]:
    """Returns the names of all ops from the products that make scores down to the choice (top-k, argmax, ...), and of
    the parameters that only they read."""
    pending = [
        op.inputs[1 if op.kind == "split_rows" else 0].op
        for op in graph
        if op.inputs and (op.kind.removeprefix("opaque.") in _CHOICES or op.attrs.get("op") in _CHOICES)
    ]
    found: set[str] = set()
    while pending:
        op = graph[pending.pop()]
        if op.name in found or op.kind in SOURCES:
            continue
        found.add(op.name)
        if op.kind not in MATMULS:
            pending += [ref.op for ref in op.inputs]
        else:
            for ref in op.inputs[1:]:
                _follow_to_weight(graph, ref.op, found)
    return found


def _follow_to_weight(graph: OpGraph, name: str, found: set[str]) -> None:
    """Adds to `found` a product's weight and the views it is read through, as long as only ops in `found` read them."""
    while True:
        op = graph[name]
        refs = (TensorRef(name, j) for j in range(len(op.outputs)))
        users = {user for ref in refs for user, _ in graph.users.get(ref, ())}
        if op.kind == "param" and users <= found:
            found.add(name)
        if op.kind not in _THROUGH or not users <= found:
            return
        found.add(name)
        name = op.inputs[0].op
