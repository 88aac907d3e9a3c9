"""share_masks: makes the mask of all layers' attention a sum's term once, where each would do it again.

    before  y0 = sdpa(q0, k0, v0, attn_mask=seen); ...; y11 = sdpa(q11, k11, v11, attn_mask=seen)     # seen: bool
    after   term = mask_term(seen, q0); y0 = sdpa(q0, k0, v0, attn_mask=term); ...

torch turns a bool mask into zeros and -inf at each call: for 2048 tokens 16 MiB a layer.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.fx.nodes import op_name


def mask_term(seen: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Return what attention adds to its scores: 0 where `seen`, a bool mask, is true, -inf elsewhere; of q's dtype."""
    return torch.zeros_like(seen, dtype=q.dtype).masked_fill_(seen.logical_not(), -torch.inf)


def share_masks(graph: Graph) -> None:
    """Rewrite `graph` in place: bool masks that several attentions of one dtype read."""
    readers: dict[tuple[Node, torch.dtype], list[Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or op_name(node) != "scaled_dot_product_attention":
            continue
        mask, q = argument(node, 3, "attn_mask"), node.args[0] if node.args else None
        if not isinstance(mask, Node) or not isinstance(q, Node):
            continue
        of_mask, of_q = node_meta.val(mask), node_meta.val(q)
        if isinstance(of_mask, torch.Tensor) and of_mask.dtype == torch.bool and isinstance(of_q, torch.Tensor):
            readers.setdefault((mask, of_q.dtype), []).append(node)
    for (mask, _), attentions in readers.items():
        if len(attentions) < 2:
            continue
        with graph.inserting_before(attentions[0]):
            given = mask, attentions[0].args[0]
            term = graph.create_node("call_function", mask_term, given, name=f"term_{mask.name}")
        for attention in attentions:
            attention.replace_input_with(mask, term)
