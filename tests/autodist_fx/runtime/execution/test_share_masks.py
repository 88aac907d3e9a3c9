"""share_masks: attention is what it was, and bool masks become terms once."""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from autodist_fx.runtime.execution.bound_graph import BoundGraph
from autodist_fx.runtime.execution.share_masks import mask_term
from passes.fx import node_meta


class Attentions(torch.nn.Module):
    def forward(self, q, k, v, seen, bias):
        first, second = sdpa(q, k, v, attn_mask=seen), sdpa(k, q, v, seen, scale=0.5)
        return first, second, sdpa(q, k, v, attn_mask=bias), sdpa(v, k, q, attn_mask=bias)


def test_equal_also_for_queries_that_see_nothing():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 4, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    seen = torch.rand(2, 1, 4, 4, generator=generator) > 0.4
    seen[1, 0, 2] = False
    inputs = {"q": q, "k": k, "v": v, "seen": seen, "bias": torch.randn(2, 1, 4, 4, dtype=torch.float64)}
    graph = torch.fx.symbolic_trace(Attentions())
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            node_meta.set_val(node, inputs[node.target].to("meta"))
    bound = BoundGraph(graph)
    for found, true in zip(bound(inputs), graph(**inputs), strict=True):
        assert torch.equal(found, true)
    terms = [node for node in bound.module.graph.nodes if node.target is mask_term]
    assert len(terms) == 1 and len(terms[0].users) == 2
