"""match_repeat_kv: matches KV heads that are repeated for their query heads, and makes one op of it.

before  reshape(broadcast_to(x[:, :, None], (b, g, r, t, d)), (b, g * r, t, d))
after   repeat_interleave(x, r, 1)
"""

from __future__ import annotations

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.nodes import op_name
from passes.fx.run_passes import PassResult
from passes.fx.shape_propagation import NormalizeContext


def match_repeat_kv(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place; nodes that nothing uses any more are left to eliminate_dead_code."""
    matches = 0
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.reshape:
            continue
        expand = node.args[0]
        if expand.op != "call_function" or expand.target is not torch.broadcast_to:
            continue
        unsqueeze = expand.args[0]
        base = unsqueeze.args[0] if unsqueeze.args and isinstance(unsqueeze.args[0], Node) else None
        if base is None or op_name(unsqueeze) not in ("getitem", "unsqueeze"):
            continue
        x, wide, out = (node_meta.val(n) for n in (base, expand, node))
        if not isinstance(x, torch.Tensor):
            continue
        one = node_meta.tensor(unsqueeze).shape
        for dim in range(x.dim()):
            repeats = wide.shape[dim + 1] if wide.dim() == x.dim() + 1 else 0
            if (
                repeats > 0
                and one == (*x.shape[: dim + 1], 1, *x.shape[dim + 1 :])
                and wide.shape == (*x.shape[: dim + 1], repeats, *x.shape[dim + 1 :])
                and out.shape == (*x.shape[:dim], x.shape[dim] * repeats, *x.shape[dim + 1 :])
                and node_meta.symbols(node)[dim] == ""
                and x.shape[dim] * repeats > x.shape[dim]
            ):
                node.target, node.args = torch.repeat_interleave, (base, repeats, dim)
                matches += 1
                break
    return PassResult(graph_module, matches)
