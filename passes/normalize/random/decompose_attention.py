"""decompose_attention: writes attention with dropout as products and a softmax, of whose mask each rank draws a part.

    before  %y = scaled_dot_product_attention(%q, %k, %v, attn_mask=%mask, dropout_p=0.1)
    after   %s = matmul(%q, transpose(%k, -2, -1)) * 0.125;  %m = masked_fill(%s, logical_not(%mask), -inf)
            %y = matmul(dropout(safe_softmax(%m, -1), 0.1, True), %v)

torch draws that mask inside of its kernels, from a generator. What is written here is torch's own definition of the op
in scaled_dot_product_attention's docstring; a row that sees nothing gives zeros (safe_softmax), as there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.nn import functional as F

from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext, shaped_node
from passes.ops.attention import safe_softmax


def decompose_attention(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place. Every node must have its `val`. Matches are the attentions with dropout."""
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    for node in list(graph.nodes):
        if op_name(node) == "scaled_dot_product_attention" and _has_dropout(node):
            with graph.inserting_before(node):
                node.replace_all_uses_with(_decomposed(node, ctx))
            graph.erase_node(node)
            matches += 1
    return edit.result(matches)


def _has_dropout(node: Node) -> bool:
    p = argument(node, 4, "dropout_p", 0.0)
    return isinstance(p, (int, float)) and p > 0


def _decomposed(node: Node, ctx: NormalizeContext) -> Node:
    def call(target: Callable[..., Any], *args: Any) -> Node:
        return shaped_node(ctx, node, "call_function", target, args)

    def size(x: Node, dim: int) -> Node:
        return shaped_node(ctx, node, "call_method", "size", (x, dim))

    q, k, v, mask = (argument(node, at, name) for at, name in enumerate(("query", "key", "value", "attn_mask")))
    width = node_meta.tensor(q).shape[-1]
    scale = argument(node, 6, "scale")
    if argument(node, 7, "enable_gqa", False):
        k, v = (_repeated(call, q, x) for x in (k, v))
    scores = call(operator.mul, call(torch.matmul, q, call(torch.transpose, k, -2, -1)), scale or 1 / math.sqrt(width))
    if argument(node, 5, "is_causal", False):
        ones = shaped_node(
            ctx, node, "call_function", torch.ones, ((size(q, -2), size(k, -2)),),
            {"dtype": torch.bool, "device": call(getattr, q, "device")},
        )  # fmt: skip
        mask = call(torch.tril, ones)
    if mask is not None and node_meta.tensor(mask).dtype == torch.bool:
        scores = call(torch.masked_fill, scores, call(torch.logical_not, mask), -math.inf)
    elif mask is not None:
        scores = call(operator.add, scores, mask)
    weights = call(F.dropout, call(safe_softmax, scores, -1), float(argument(node, 4, "dropout_p")), True)
    return call(torch.matmul, weights, v)


def _repeated(call: Callable[..., Node], q: Node, x: Node) -> Node:
    """Returns keys or values with each head as often as query heads read it."""
    heads = node_meta.tensor(q).dim() - 3
    times = node_meta.tensor(q).shape[heads] // node_meta.tensor(x).shape[heads]
    return x if times == 1 else call(torch.repeat_interleave, x, times, heads)
