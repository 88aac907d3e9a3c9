"""unmerge_batch: attention over heads that are folded into the batch, and what must stay as it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from transformers import BloomConfig

import autodist_fx as adx
from passes.fx.text import graph_text
from passes.normalize.pipeline import normalize
from tests.support.graphs.small import assert_split_equals_whole, examples, normalized, plan_for, traced


def rewritten(module: nn.Module) -> str:
    """The normalised graph, after making sure that it computes the same at sizes other than the examples'."""
    before = traced(module)
    after = normalize(copy.deepcopy(before), examples({"x": ("B", "S", 12)}))
    for batch, seq in ((2, 5), (1, 1), (3, 23)):
        x = torch.randn(batch, seq, 12, dtype=torch.float64)
        torch.testing.assert_close(after(x=x)["y"], before(x=x)["y"], rtol=1e-12, atol=1e-12)
    return graph_text(after)


class BatchFirst(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq, _ = x.size()
        q = x.view(batch, seq, 3, 4).transpose(1, 2).reshape(batch * 3, seq, 4)
        k = q.transpose(1, 2)
        bias = torch.zeros((batch * 3, seq, seq), dtype=x.dtype, device=x.device)
        scores = bias.baddbmm(q, k, beta=0.5, alpha=1 / math.sqrt(4)).softmax(dim=2)
        y = torch.bmm(scores, q).view(batch, 3, seq, 4)
        return {"y": y.transpose(1, 2).reshape(batch, seq, 12)}


def test_heads_get_their_own_dim() -> None:
    assert_expected_inline(rewritten(BatchFirst()), """\
x : f64[B, S, 12] = input
batch = sym_size.int(x, 0)
seq = sym_size.int(x, 1)
getattr_3 = getattr(x, 'device')
view : f64[B, S, 3, 4] = reshape(x, (batch, seq, 3, 4))
transpose : f64[B, 3, S, 4] = .transpose(view, 1, 2)
transpose_1 : f64[B, 3, 4, S] = .transpose(transpose, 2, 3)
zeros : f64[B, 3, S, S] = zeros((batch, 3, seq, seq), dtype=torch.float64, device=getattr_3)
matmul : f64[B, 3, S, S] = matmul(transpose, transpose_1)
mul_3 : f64[B, 3, S, S] = mul(matmul, 0.5)
mul_4 : f64[B, 3, S, S] = mul(zeros, 0.5)
add : f64[B, 3, S, S] = add(mul_4, mul_3)
softmax : f64[B, 3, S, S] = .softmax(add, dim=3)
bmm : f64[B, 3, S, 4] = matmul(softmax, transpose)
transpose_2 : f64[B, S, 3, 4] = .transpose(bmm, 1, 2)
reshape_1 : f64[B, S, 12] = reshape(transpose_2, (batch, seq, 12))
return {y: reshape_1}""")


class TimeFirst(nn.Module):
    """[S, B * heads, d], as in fairseq's attention."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq, _ = x.size()
        q = x.transpose(0, 1).contiguous().view(seq, batch * 3, 4).transpose(0, 1)
        y = torch.bmm(torch.bmm(q, q.transpose(1, 2)).softmax(-1), q)
        return {"y": y.transpose(0, 1).contiguous().view(seq, batch, 12).transpose(0, 1)}


def test_the_folded_dim_may_be_any() -> None:
    text = rewritten(TimeFirst())
    assert "B*3" not in text
    assert "f64[B, 3, S, S]" in text


class AcrossRows(nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq, _ = x.size()
        q = x.view(batch, seq, 3, 4).transpose(1, 2).reshape(batch * 3, seq, 4)
        return {"y": (q + q.flip(0)).view(batch, 3, seq, 4)}


def test_ops_that_mix_rows_keep_the_folded_batch() -> None:
    assert "flip" in (text := rewritten(AcrossRows())) and "f64[B*3, S, 4]" in text


class AllExperts(nn.Module):
    """Every token to every expert, in one product, as Llama-4 has it; `between` runs on all copies of the tokens."""

    def __init__(self, between: str = "") -> None:
        super().__init__()
        self.router, self.up = nn.Linear(12, 4), nn.Parameter(torch.randn(4, 12, 7))
        self.down, self.between = nn.Parameter(torch.randn(4, 7, 12)), between

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = x.reshape(-1, 12)
        scores = torch.sigmoid(self.router(rows))
        given = rows.repeat(4, 1) * scores.transpose(0, 1).reshape(-1, 1)
        if self.between == "norm of all":
            given = given - given.mean(0)
        elif self.between == "rows turned":
            given = given.roll(1, 0)
        hidden = torch.relu(torch.bmm(given.view(4, -1, 12), self.up))
        out = torch.bmm(hidden, self.down).view(-1, 12)
        return {"y": out.reshape(4, -1, 12).sum(0).view(x.shape)}


def test_experts_get_their_own_dim() -> None:
    assert_expected_inline(rewritten(AllExperts()), """\
x : f64[B, S, 12] = input
batch = sym_size.int(x, 0)
seq = sym_size.int(x, 1)
reshape : f64[B*S, 12] = reshape(x, (-1, 12))
router : f64[B*S, 4] = router(reshape)  # Linear[4, 12]
sigmoid : f64[B*S, 4] = sigmoid(router)
unsqueeze : f64[1, B*S, 12] = .unsqueeze(reshape, 0)
repeat : f64[4, B*S, 12] = broadcast_to(unsqueeze, (4, -1, -1))
transpose : f64[4, B*S] = .transpose(sigmoid, 0, 1)
reshape_1 : f64[4, B*S, 1] = reshape(transpose, (4, -1, 1))
mul : f64[4, B*S, 12] = mul(repeat, reshape_1)
up : f64[4, 12, 7] = up
bmm : f64[4, B*S, 7] = bmm(mul, up)
relu : f64[4, B*S, 7] = relu(bmm)
down : f64[4, 7, 12] = down
bmm_1 : f64[4, B*S, 12] = bmm(relu, down)
sum_1 : f64[B*S, 12] = .sum(bmm_1, 0)
view_2 : f64[B, S, 12] = reshape(sum_1, (batch, seq, 12))
return {y: view_2}""")


def test_experts_are_dealt() -> None:
    """Each rank's own, from its share of the weights to one all_reduce."""
    whole = normalized(AllExperts(), x=("B", "S", 12))
    plan = plan_for(whole, 2)
    assert {p.name: str(p.placement) for p in plan.params if p.name in ("up", "down")} == {"up": "S(0)", "down": "S(0)"}
    assert [op.kind for op in plan.ops if any(op.gather)] == ["reduce"]
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 12, dtype=torch.float64)})


@pytest.mark.parametrize("between", ["norm of all", "rows turned"])
def test_ops_that_mix_experts_keep_the_folded_tokens(between: str) -> None:
    assert "f64[B*S*4, 12] = .repeat(" in rewritten(AllExperts(between))


def test_two_all_reduces_a_layer_and_no_gather() -> None:
    config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    plan = adx.compile(config, tp=2).plan
    assert sum(op.kind != "embedding" and gathered for op in plan.ops for gathered in op.gather) == 2 * 2 + 1
    assert {op.role for op in plan.ops if op.weight.endswith("dense.weight")} == {"row"}
