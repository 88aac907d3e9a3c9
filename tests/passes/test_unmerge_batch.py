"""unmerge_batch: attention over heads that are folded into the batch, and what must stay as it is."""

from __future__ import annotations

import copy
import math

import torch
from expecttest import assert_expected_inline
from small_graphs import examples, traced
from torch import nn
from transformers import BloomConfig

import autodist_fx as adx
from passes.graph_text import graph_text
from passes.normalize import normalize


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


def test_what_mixes_rows_stays_as_it_is() -> None:
    assert "flip" in (text := rewritten(AcrossRows())) and "f64[B*3, S, 4]" in text


def test_two_all_reduces_a_layer_and_no_gather() -> None:
    config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    plan = adx.compile(config, tp=2).plan
    assert sum(op.kind != "embedding" and gathered for op in plan.ops for gathered in op.gather) == 2 * 2 + 1
    assert {op.role for op in plan.ops if op.weight.endswith("dense.weight")} == {"row"}
