"""eliminate_common_subexpressions: merges equal computations, such as masks and tables that every layer derives again.

before  cos = freqs.cos(); q = q * cos; cos_1 = freqs.cos(); k = k * cos_1
after   cos = freqs.cos(); q = q * cos; k = k * cos
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from passes.fx.nodes import is_pure
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext


def eliminate_common_subexpressions(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place. Layers, and what is not pure, are left alone."""
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op in ("placeholder", "output", "call_module") or not is_pure(node):
            continue
        key = (node.op, node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            matches += 1
    return edit.result(matches)


def _hashable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_hashable(v) for v in value))
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _hashable(value.start), _hashable(value.stop), _hashable(value.step))
    # 1, 1.0 and True are equal in Python and different to torch
    return value if isinstance(value, Node) else (type(value).__name__, value)
