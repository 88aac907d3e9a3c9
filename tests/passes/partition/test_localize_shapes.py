"""localize_shapes: sizes that the model wrote for whole tensors become the rank's."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.fx.text import graph_text
from passes.op_graph.build import build_op_graph, parameter_names
from passes.ops.parallel_layers import partial_mean
from passes.partition.context import RankContext
from passes.partition.extract_stage import extract_stage
from passes.partition.localize_shapes import localize_shapes
from passes.partition.pipeline import emit_rank
from passes.partition.shard_parameters import shard_parameters
from passes.verify.verify import verify
from tests.support.graphs.small import FREE, Attention, assert_split_equals_whole, normalized, plan_for


def localized(whole: torch.fx.GraphModule, tp: int, rank: int, **request: Any) -> tuple[str, str]:
    """One rank's graph before and after the pass, once its parameters are its own; beside a run of all ranks."""
    plan = plan_for(whole, tp=tp, **request)
    ctx = RankContext(plan, rank)
    module = extract_stage(whole, ctx).graph_module
    shard_parameters(module, ctx, sources=parameter_names(whole))
    before = graph_text(module)
    after = graph_text(localize_shapes(module, ctx).graph_module)
    width = node_meta.tensor(next(n for n in whole.graph.nodes if n.op == "placeholder")).shape[-1]
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, width, dtype=torch.float64)})
    return before, after


class Heads(nn.Module):
    """Three heads of four, squared and mixed again."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 12), nn.Linear(12, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q = self.q(x).view(x.shape[0], x.shape[1], 3, 4).softmax(-1)
        return {"y": self.o(q.reshape(x.shape[0], x.shape[1], 12))}


def test_reshape_has_the_ranks_number_of_heads() -> None:
    before, after = localized(normalized(Heads(), x=("B", "S", 16)), tp=2, rank=0)
    assert_expected_inline(before, """\
x : f64[B, S, 16] = input
batch = sym_size.int(x, 0)
seq = sym_size.int(x, 1)
q : f64[B, S, 12] = q(x)  # ColumnParallelLinear[8, 16]
view : f64[B, S, 3, 4] = reshape(q, (batch, seq, 3, 4))
softmax : f64[B, S, 3, 4] = .softmax(view, -1)
reshape : f64[B, S, 12] = reshape(softmax, (batch, seq, 12))
o : f64[B, S, 16] = o(reshape)  # RowParallelLinear[16, 8]
return ({y: o}, ())""")
    assert_expected_inline(after, """\
x : f64[B, S, 16] = input
batch = sym_size.int(x, 0)
seq = sym_size.int(x, 1)
q : f64[B, S, 12] = q(x)  # ColumnParallelLinear[8, 16]
view : f64[B, S, 3, 4] = reshape(q, (batch, seq, 2, 4))
softmax : f64[B, S, 3, 4] = .softmax(view, -1)
reshape : f64[B, S, 12] = reshape(softmax, (batch, seq, 8))
o : f64[B, S, 16] = o(reshape)  # RowParallelLinear[16, 8]
return ({y: o}, ())""")


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 22), nn.Linear(11, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = self.both(x).chunk(2, -1)
        return {"y": self.down(torch.sigmoid(parts[0]) * parts[1])}


def test_chunk_sizes_are_the_ranks_share_of_each_chunk() -> None:
    before, after = localized(normalized(Gated(), x=("B", "S", 16)), tp=2, rank=1)
    assert_expected_inline(before, """\
x : f64[B, S, 16] = input
both : f64[B, S, 22] = both(x)  # ColumnParallelLinear[10, 16]
chunk = .chunk(both, 2, -1)
getitem : f64[B, S, 11] = getitem(chunk, 0)
sigmoid : f64[B, S, 11] = sigmoid(getitem)
getitem_1 : f64[B, S, 11] = getitem(chunk, 1)
mul : f64[B, S, 11] = mul(sigmoid, getitem_1)
down : f64[B, S, 16] = down(mul)  # RowParallelLinear[16, 5]
return ({y: down}, ())""")
    assert_expected_inline(after, """\
x : f64[B, S, 16] = input
both : f64[B, S, 22] = both(x)  # ColumnParallelLinear[10, 16]
chunk = split(both, [5, 5], 2)
getitem : f64[B, S, 11] = getitem(chunk, 0)
sigmoid : f64[B, S, 11] = sigmoid(getitem)
getitem_1 : f64[B, S, 11] = getitem(chunk, 1)
mul : f64[B, S, 11] = mul(sigmoid, getitem_1)
down : f64[B, S, 16] = down(mul)  # RowParallelLinear[16, 5]
return ({y: down}, ())""")


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(16, 22), nn.Linear(11, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        both = self.both(x)
        return {"y": self.down(torch.sigmoid(both[..., 11:]) * both[..., :11])}


def test_slices_lie_where_the_rank_holds_them() -> None:
    before, after = localized(normalized(Sliced(), x=("B", "S", 16)), tp=3, rank=2)
    assert_expected_inline(before, """\
x : f64[B, S, 16] = input
both : f64[B, S, 22] = both(x)  # ColumnParallelLinear[6, 16]
getitem : f64[B, S, 11] = getitem(both, (..., 11:))
sigmoid : f64[B, S, 11] = sigmoid(getitem)
getitem_1 : f64[B, S, 11] = getitem(both, (..., :11))
mul : f64[B, S, 11] = mul(sigmoid, getitem_1)
down : f64[B, S, 16] = down(mul)  # RowParallelLinear[16, 3]
return ({y: down}, ())""")
    assert_expected_inline(after, """\
x : f64[B, S, 16] = input
both : f64[B, S, 22] = both(x)  # ColumnParallelLinear[6, 16]
getitem : f64[B, S, 11] = getitem(both, (:, :, 3:6))
sigmoid : f64[B, S, 11] = sigmoid(getitem)
getitem_1 : f64[B, S, 11] = getitem(both, (:, :, 0:3))
mul : f64[B, S, 11] = mul(sigmoid, getitem_1)
down : f64[B, S, 16] = down(mul)  # RowParallelLinear[16, 3]
return ({y: down}, ())""")


class Normed(nn.Module):
    """A norm over what is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 90), nn.Linear(90, 64)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.up(x)
        return {"y": self.down(h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())}


def test_a_mean_divides_by_all_ranks_elements() -> None:
    before, after = localized(normalized(Normed(), x=("B", "S", 64)), tp=2, rank=0)
    assert_expected_inline(before, """\
x : f64[B, S, 64] = input
up : f64[B, S, 90] = up(x)  # ColumnParallelLinear[45, 64]
pow_1 : f64[B, S, 90] = .pow(up, 2)
mean : f64[B, S, 1] = .mean(pow_1, -1, keepdim=True)
add : f64[B, S, 1] = add(mean, 1e-06)
rsqrt : f64[B, S, 1] = .rsqrt(add)
mul : f64[B, S, 90] = mul(up, rsqrt)
down : f64[B, S, 64] = down(mul)  # RowParallelLinear[64, 45]
return ({y: down}, ())""")
    assert_expected_inline(after, """\
x : f64[B, S, 64] = input
up : f64[B, S, 90] = up(x)  # ColumnParallelLinear[45, 64]
pow_1 : f64[B, S, 90] = .pow(up, 2)
mean : f64[B, S, 1] = partial_mean(pow_1, (-1,), True, 2, 90)
add : f64[B, S, 1] = add(mean, 1e-06)
rsqrt : f64[B, S, 1] = .rsqrt(add)
mul : f64[B, S, 90] = mul(up, rsqrt)
down : f64[B, S, 64] = down(mul)  # RowParallelLinear[64, 45]
return ({y: down}, ())""")


class Reduced(nn.Module):
    """A reduction of what is sharded, read beside it."""

    def __init__(self, reduced: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.up, self.reduced = nn.Linear(8, 11), reduced

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.up(x)
        return {"y": h.tanh() * self.reduced(h)}


REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean of all": lambda h: h.mean(),
    "mean of all, typed": lambda h: torch.mean(h.float(), dtype=torch.float64),
    "mean of no dims, which are all": lambda h: h.mean(dim=()),
    "mean of lengths and features": lambda h: h.mean((1, 2), keepdim=True),
    "mean of every dim by name": lambda h: h.mean(dim=(0, -1, 1), keepdim=True),
    "mean as in numpy": lambda h: h.mean(axis=-1, keepdims=True),
    "sum of all": lambda h: torch.sum(h),
    "sum of no dims, which are all": lambda h: h.sum(dim=()),
    "sum as in numpy": lambda h: h.sum(axis=(0, 2)).unsqueeze(-1),
    "largest of all": lambda h: h.amax(),
}


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_dims_of_what_is_sharded_are_reduced(reduction: str, tp: int) -> None:
    whole = normalized(Reduced(REDUCTIONS[reduction]), x=("B", "S", 8))
    plan = plan_for(whole, tp=tp, hardware=FREE)
    assert plan.op("up").role == "column"
    for batch, length in ((2, 5), (3, 1)):
        assert_split_equals_whole(whole, plan, {"x": torch.randn(batch, length, 8, dtype=torch.float64)})


@pytest.mark.parametrize("change", [
    pytest.param({3: 1, 4: 23}, id="another dim"), pytest.param({4: 6}, id="this rank's elements"),
    pytest.param({1: (0, 1)}, id="other dims"), pytest.param({"dtype": torch.float32}, id="another dtype"),
])  # fmt: skip
def test_a_mean_that_divides_by_something_else_is_refused(change: dict[int | str, object]) -> None:
    whole = normalized(Reduced(lambda h: h.mean(dtype=torch.float64)), x=("B", "S", 8))
    plan = plan_for(whole, tp=2, hardware=FREE)
    programs = [emit_rank(whole, plan, rank) for rank in range(2)]
    for program in programs:
        (mean,) = [n for n in program.graph_module.graph.nodes if n.target is partial_mean]
        mean.args = tuple(change.get(i, arg) for i, arg in enumerate(mean.args))
        mean.kwargs = {name: change.get(name, value) for name, value in mean.kwargs.items()}
    with pytest.raises(VerificationError, match=r"rank 0 .*mean.*passes/partition/localize_shapes.py"):
        verify(programs, plan, build_op_graph(whole), whole)


class Repeats(nn.Module):
    """Query heads read KV heads by repetition, and nothing else ties them."""

    def __init__(self, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups = heads, groups
        self.q, self.k, self.o = nn.Linear(16, heads * 4), nn.Linear(16, groups * 4), nn.Linear(heads * 4, 16)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        batch, seq = x.shape[0], x.shape[1]
        q = self.q(x).view(batch, seq, self.heads, 4)
        k = self.k(x).view(batch, seq, self.groups, 4).repeat_interleave(self.heads // self.groups, 2)
        return {"y": self.o((q * k).reshape(batch, seq, self.heads * 4))}


def test_repeat_interleave_repeats_the_ranks_kv_heads() -> None:
    _, after = localized(normalized(Repeats(6, 3), x=("B", "S", 16)), tp=2, rank=0)
    assert_expected_inline(after, """\
x : f64[B, S, 16] = input
batch = sym_size.int(x, 0)
seq = sym_size.int(x, 1)
q : f64[B, S, 24] = q(x)  # ColumnParallelLinear[16, 16]
view : f64[B, S, 6, 4] = reshape(q, (batch, seq, 4, 4))
k : f64[B, S, 12] = k(x)  # ColumnParallelLinear[8, 16]
view_1 : f64[B, S, 3, 4] = reshape(k, (batch, seq, 2, 4))
repeat_interleave : f64[B, S, 6, 4] = .repeat_interleave(view_1, 2, 2)
mul : f64[B, S, 6, 4] = mul(view, repeat_interleave)
reshape : f64[B, S, 24] = reshape(mul, (batch, seq, 16))
o : f64[B, S, 16] = o(reshape)  # RowParallelLinear[16, 16]
return ({y: o}, ())""")


def test_repeat_is_dropped_where_each_query_head_has_a_kv_head() -> None:
    """6 query heads of 2 KV heads on 4 ranks: rank 1 holds query heads 2 and 3, of KV heads 0 and 1."""
    _, after = localized(normalized(Repeats(6, 2), x=("B", "S", 16)), tp=4, rank=1)
    assert "view_1, 1, 2)" in after and "index_select" not in after


def test_repeat_becomes_index_select_where_groups_are_cut() -> None:
    """10 query heads of 2 KV heads on 4 ranks: rank 1 holds query heads 3, 4 and 5, of KV heads 0, 0 and 1."""
    _, after = localized(normalized(Repeats(10, 2), x=("B", "S", 16)), tp=4, rank=1)
    assert_expected_inline(after, """\
x : f64[B, S, 16] = input
batch = sym_size.int(x, 0)
seq = sym_size.int(x, 1)
q : f64[B, S, 40] = q(x)  # ColumnParallelLinear[12, 16]
view : f64[B, S, 10, 4] = reshape(q, (batch, seq, 3, 4))
k : f64[B, S, 8] = k(x)  # ColumnParallelLinear[8, 16]
view_1 : f64[B, S, 2, 4] = reshape(k, (batch, seq, 2, 4))
_heads_of_repeat_interleave : i64[3] = _heads_of_repeat_interleave
repeat_interleave : f64[B, S, 10, 4] = index_select(view_1, 2, _heads_of_repeat_interleave)
mul : f64[B, S, 10, 4] = mul(view, repeat_interleave)
reshape : f64[B, S, 40] = reshape(mul, (batch, seq, 12))
o : f64[B, S, 16] = o(reshape)  # RowParallelLinear[16, 12]
return ({y: o}, ())""")


class Products(Attention):
    """Attention in two products, which nothing keeps from being cut inside of a head."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = self.qkv_heads(x)
        k, v = (t.repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
        a = torch.matmul((q @ k.transpose(2, 3)).softmax(-1), v)
        return {"y": self.o(a.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * self.size))}


def test_a_repetition_cut_along_another_dim_stays() -> None:
    """One KV head: its elements are dealt out, while the dim that is repeated stays whole."""
    whole = normalized(Products(24, 6, 1, 8), x=("B", "S", 24))
    plan = plan_for(whole, tp=4, hardware=FREE)
    cut = [op.outputs[0].dim for op in plan.ops if op.kind == "repeat_interleave"]
    assert 3 in cut, "or this test shows nothing"
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 24, dtype=torch.float64)})


class Grouped(Attention):
    """Grouped attention in one op."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = self.qkv_heads(x)
        a = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return {"y": self.o(a.transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * self.size))}


def test_grouped_attention_picks_kv_heads_where_groups_are_cut() -> None:
    _, whole_groups = localized(normalized(Grouped(16, 6, 2, 4), x=("B", "S", 16)), tp=2, rank=1)
    assert "index_select" not in whole_groups
    _, even_cut = localized(normalized(Grouped(16, 6, 2, 4), x=("B", "S", 16)), tp=4, rank=1)
    assert "index_select" not in even_cut  # two query heads, each of a KV head of its own
    _, cut_groups = localized(normalized(Grouped(16, 10, 2, 4), x=("B", "S", 16)), tp=4, rank=1)
    picked = [line for line in cut_groups.splitlines() if "_heads_of" in line or "scaled_dot" in line]
    assert_expected_inline("\n".join(line.replace("scaled_dot_product_attention", "sdpa") for line in picked), """\
_heads_of_sdpa : i64[3] = _heads_of_sdpa
index_select : f64[B, 2, S, 4] = index_select(transpose_1, 1, _heads_of_sdpa)
index_select_1 : f64[B, 2, S, 4] = index_select(transpose_2, 1, _heads_of_sdpa)
sdpa : f64[B, 10, S, 4] = sdpa(transpose, index_select, index_select_1, enable_gqa=True)
transpose_3 : f64[B, S, 10, 4] = .transpose(sdpa, 1, 2)""")


@pytest.mark.parametrize("make", [lambda h, g: Grouped(16, h, g, 4), Repeats], ids=["enable_gqa", "repeat_interleave"])
@pytest.mark.parametrize("heads, groups, tp", [(6, 2, 4), (10, 2, 3), (10, 2, 4), (15, 3, 4), (15, 3, 5), (12, 3, 4)])
def test_picked_kv_heads_give_what_the_whole_gives(
    make: Callable[[int, int], nn.Module], heads: int, groups: int, tp: int
) -> None:
    """Also where a rank holds more KV heads than one part of its query heads reads."""
    whole = normalized(make(heads, groups), x=("B", "S", 16))
    plan = plan_for(whole, tp=tp)
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 16, dtype=torch.float64)})


@pytest.mark.drawn(20)
@pytest.mark.parametrize("fused", ["", "thirds", "groups"])
@pytest.mark.parametrize("heads, groups", [(4, 4), (6, 3), (6, 2), (5, 1), (7, 7)])
@pytest.mark.parametrize("tp", [2, 3, 4])
def test_any_attention_on_any_ranks(tp: int, heads: int, groups: int, fused: str) -> None:
    """All that this pass rewrites, together: views, splits, slices and repetitions of uneven heads."""
    whole = normalized(Attention(16, heads, groups, 4, fused), x=("B", "S", 16))
    assert_split_equals_whole(whole, plan_for(whole, tp=tp), {"x": torch.randn(2, 5, 16, dtype=torch.float64)})


class Scored(nn.Module):
    """A head over eleven classes, and the sum of its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 11)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        labels = (x[..., 0] > 0).long().flatten()
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels, reduction="sum")}


def shown(text: str) -> str:
    """The graph from the head on, without the loss's settings."""
    return re.sub(r"(weight|ignore_index)=.*\)", "...)", text.partition("head :")[2])


def test_a_loss_over_cut_classes_is_a_ranks_term_of_it() -> None:
    whole = normalized(Scored(), x=("B", "S", 16))
    before, after = localized(whole, tp=2, rank=1, hardware=FREE, pin=(("head", "column"),))
    assert_expected_inline(shown(before), """\
 f64[B, S, 11] = head(x)  # ColumnParallelLinear[5, 16]
flatten_1 : f64[B*S, 11] = reshape(head, (-1, 11))
cross_entropy : f64[] = cross_entropy(flatten_1, flatten, ...)
return ({loss: cross_entropy}, ())""")
    assert_expected_inline(shown(after), """\
 f64[B, S, 11] = head(x)  # ColumnParallelLinear[5, 16]
flatten_1 : f64[B*S, 11] = reshape(head, (-1, 5))
log_sum_exp : f64[B*S] = log_sum_exp(flatten_1, axis='tp', dim=1, ranks=2)
cross_entropy : f64[] = cross_entropy_part(flatten_1, flatten, log_sum_exp, (11, ((6, 11),)), ...)
return ({loss: cross_entropy}, ())""")
