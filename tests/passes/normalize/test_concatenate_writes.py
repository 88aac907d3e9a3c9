"""concatenate_writes: pieces written into a new tensor become one concatenation, and what is no such thing stays."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.fx.text import graph_text
from passes.normalize.pipeline import normalize
from passes.op_graph.build import build_op_graph
from passes.partition.pipeline import emit_rank
from passes.verify.verify import verify
from tests.support.graphs.gradients import check_and_plan
from tests.support.graphs.small import assert_split_equals_whole, examples, plan_for, traced


class SharedKeys(nn.Module):
    """x [B, S, 12] -> y [B, S, 12]: attention whose keys are a part of each head's own, and one that all heads share
    (DeepSeek's latent attention, as transformers 5 writes it)."""

    def __init__(self, heads: int = 4, written: bool = True) -> None:
        super().__init__()
        self.heads, self.written = heads, written
        self.q, self.k, self.shared = nn.Linear(12, heads * 5), nn.Linear(12, heads * 3), nn.Linear(12, 2)
        self.o = nn.Linear(heads * 3, 12)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq, _ = x.shape
        q = self.q(x).view(batch, seq, self.heads, 5).transpose(1, 2)
        own = self.k(x).view(batch, seq, self.heads, 3).transpose(1, 2)
        shared = self.shared(x).view(batch, 1, seq, 2).expand(-1, self.heads, -1, -1)
        if self.written:
            keys = own.new_empty(batch, self.heads, seq, 5)
            keys[..., :3].copy_(own)
            keys[..., 3:].copy_(shared)
        else:
            keys = torch.cat([own, shared], -1)
        y = nn.functional.scaled_dot_product_attention(q, keys, own)
        return {"y": self.o(y.transpose(1, 2).reshape(batch, seq, -1))}


def annotated(module: nn.Module) -> torch.fx.GraphModule:
    """Traces a module, and says of its values that they are tensors, as a front end does: then a write into a part of
    one is a write into the whole."""
    graph_module = traced(module)
    for node in graph_module.graph.nodes:
        if node.op != "output":
            node_meta.set_traced_as_tensor(node, True)
    return graph_module


def whole_graph(module: nn.Module) -> torch.fx.GraphModule:
    return normalize(annotated(module), examples({"x": ("B", "S", 12)}))


def test_heads_are_cut_where_keys_are_put_together() -> None:
    """Attention falls apart along its heads, and of the part that all share each rank makes as many as it has heads."""
    whole = whole_graph(SharedKeys())
    plan = plan_for(whole, 2)
    placed = {op.kind: str(op.outputs[0]) for op in plan.ops if op.kind in ("expand", "cat", "sdpa")}
    assert placed == {"expand": "S(1)", "cat": "S(1)", "sdpa": "S(1)"}
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 12, dtype=torch.float64)})


def test_heads_that_ranks_share_unevenly() -> None:
    whole = whole_graph(SharedKeys(heads=5))
    assert_split_equals_whole(
        whole, plan_for(whole, 3), {"x": torch.randn(2, 5, 12, dtype=torch.float64)}
    )


def test_the_shared_part_has_the_whole_gradient() -> None:
    """Each rank has a term of it, from the heads that it has."""
    _, plan = check_and_plan(SharedKeys(written=False), 12, 2)
    assert str(plan.op("expand").outputs[0]) == "S(1)"


def test_a_rank_that_repeats_what_is_shared_for_too_many_heads_is_refused() -> None:
    whole = whole_graph(SharedKeys())
    plan = plan_for(whole, 2)
    programs = [emit_rank(whole, plan, rank) for rank in range(2)]
    broken = next(n for n in programs[1].graph_module.graph.nodes if n.name == "expand")
    broken.args = (broken.args[0], tuple(4 if size == 2 else size for size in broken.args[1]))
    with pytest.raises(VerificationError, match=r"expand .*localize_shapes"):
        verify(programs, plan, build_op_graph(whole), whole)


class Written(nn.Module):
    """x [B, S, 12] -> y [B, S, 12], written in pieces in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = x.new_empty(x.shape) if self.way != "over values" else x + 1
        high = x[..., :4] * 3
        if self.way == "other dim":
            y[..., 4:].copy_(high.sum(-1, keepdim=True))
            y[:, :1].copy_(x[:, :1])
        start = 3 if self.way == "overlap" else 4
        y[..., start:].copy_(x[..., start:])
        y[:, :, :4].copy_(high.float() if self.way == "cast" else high[:, :1] if self.way == "broadcast" else high)
        return {"y": y}


def rewritten(module: nn.Module) -> str:
    """The normalised graph, after making sure that it computes the same bits at sizes other than the examples'."""
    before, after = traced(module), whole_graph(module)
    for batch, seq in ((2, 5), (1, 1), (3, 23)):
        x = torch.randn(batch, seq, 12, dtype=torch.float64)
        assert torch.equal(after(x=x)["y"], before(x=x)["y"])
    return graph_text(after)


def test_pieces_in_any_order_become_one_concatenation() -> None:
    assert_expected_inline(rewritten(Written("in order")), """\
x : f64[B, S, 12] = input
getitem : f64[B, S, 4] = getitem(x, (..., :4))
mul : f64[B, S, 4] = mul(getitem, 3)
getitem_2 : f64[B, S, 8] = getitem(x, (..., 4:))
cat : f64[B, S, 12] = cat([mul, getitem_2], 2)
return {y: cat}""")


@pytest.mark.parametrize("way", ["overlap", "cast", "broadcast", "over values", "other dim"])
def test_other_writes_stay(way: str) -> None:
    assert "with_item" in rewritten(Written(way))
