"""static_view_sizes: writes out every size of reshapes and expands, as a literal where constant, else as a size's node.

before  view = q.view((batch, seq, -1, 64))
after   reshape = torch.reshape(q, (batch, seq, 8, 64))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.nodes import op_name
from passes.fx.run_passes import PassResult
from passes.fx.shape_propagation import NormalizeContext

RESHAPES = ("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as")
EXPANDS = ("expand", "expand_as", "broadcast_to")


def static_view_sizes(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place. A view of which two sizes or more cannot be said stays as it is."""
    graph, second, matches = graph_module.graph, ctx.second, 0
    order = {n: i for i, n in enumerate(graph.nodes)}
    lengths: dict[tuple[int, int], Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.sym_size.int:
            source, dim = node.args
            lengths[node_meta.tensor(source).shape[dim], second[source].shape[dim]] = node
        elif node in second and type(node_meta.val(node)) is int and node_meta.val(node) != second[node]:
            lengths.setdefault((node_meta.val(node), second[node]), node)
        if node.op not in ("call_method", "call_function") or not node_meta.is_tensor(node):
            continue
        name = op_name(node)
        if name not in RESHAPES and name not in EXPANDS:
            continue
        a, b = node_meta.tensor(node).shape, second[node].shape
        shape: list[Any] = []
        for x, y in zip(a, b, strict=True):
            length = lengths.get((x, y))
            shape.append(x if x == y else length if length is not None and order.get(length, -1) < order[node] else -1)
        if shape.count(-1) > 1 or (name in EXPANDS and -1 in shape):
            continue
        node.op = "call_function"
        node.target = torch.reshape if name in RESHAPES else torch.broadcast_to
        node.args, node.kwargs = (node.args[0], tuple(shape)), {}
        matches += 1
    return PassResult(graph_module, matches)
