"""insert_collectives: one collective a tensor, right behind its producer; pieces of whole tensors are cut out."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from expecttest import assert_expected_inline
from torch import nn

from cost_model.graph.placement import REPLICATE
from cost_model.partition_plan import PartitionPlan
from passes.fx.changes import graph_changes
from passes.fx.text import graph_diff, graph_text
from passes.op_graph.build import parameter_names
from passes.partition.context import RankContext
from passes.partition.extract_stage import extract_stage
from passes.partition.insert_collectives import insert_collectives
from passes.partition.localize_shapes import localize_shapes
from passes.partition.shard_parameters import shard_parameters
from tests.support.graphs.small import Mlp, assert_split_equals_whole, normalized, plan_for


def inserted_graphs(
    whole: torch.fx.GraphModule, plan: PartitionPlan, rank: int
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    """One rank's graph before and after the pass."""
    ctx = RankContext(plan, rank)
    module = extract_stage(whole, ctx).graph_module
    shard_parameters(module, ctx, sources=parameter_names(whole))
    localize_shapes(module, ctx)
    before = copy.deepcopy(module)
    return before, insert_collectives(module, ctx).graph_module


def inserted(whole: torch.fx.GraphModule, plan: PartitionPlan, rank: int) -> tuple[str, str]:
    """The same as text."""
    before, after = inserted_graphs(whole, plan, rank)
    return graph_text(before), graph_text(after)


def test_partial_gets_an_all_reduce_behind_its_producer() -> None:
    whole = normalized(Mlp(), x=("B", "S", 8))
    plan = plan_for(whole, tp=2)
    before, after = inserted_graphs(whole, plan, 0)
    assert_expected_inline(graph_diff(before, after), """\
--- MlpRank0
+++ MlpRank0
@@ -2,5 +2,6 @@
 up : f64[B, S, 12] = up(x)  # ColumnParallelLinear[6, 8]
 relu : f64[B, S, 12] = relu(up)
 down : f64[B, S, 8] = down(relu)  # RowParallelLinear[8, 6]
-add : f64[B, S, 8] = add(x, down)
+all_reduce : f64[B, S, 8] = all_reduce(down, axis='tp')
+add : f64[B, S, 8] = add(x, all_reduce)
 return ({y: add}, ())""")
    assert_expected_inline(str(graph_changes(before, after)), """\
inserted  all_reduce: 1
rewired   add: 1""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})


class Head(nn.Module):
    """Logits, and two uses of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 11)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.head(x)
        return {"y": y, "p": y.softmax(-1), "q": y.log_softmax(-1)}


def test_consumers_share_one_all_gather_of_uneven_parts() -> None:
    whole = normalized(Head(), x=("B", "S", 8))
    plan = plan_for(whole, tp=2)
    before, after = inserted_graphs(whole, plan, 1)
    assert_expected_inline(graph_diff(before, after), """\
--- HeadRank1
+++ HeadRank1
@@ -1,5 +1,6 @@
 x : f64[B, S, 8] = input
 head : f64[B, S, 11] = head(x)  # ColumnParallelLinear[5, 8]
-softmax : f64[B, S, 11] = .softmax(head, -1)
-log_softmax : f64[B, S, 11] = .log_softmax(head, -1)
-return ({y: head, p: softmax, q: log_softmax}, ())
+all_gather : f64[B, S, 11] = all_gather(head, axis='tp', dim=2, parts=(((0, 6),), ((6, 11),)))
+softmax : f64[B, S, 11] = .softmax(all_gather, -1)
+log_softmax : f64[B, S, 11] = .log_softmax(all_gather, -1)
+return ({y: all_gather, p: softmax, q: log_softmax}, ())""")
    assert_expected_inline(str(graph_changes(before, after)), """\
inserted  all_gather: 1
rewired   log_softmax: 1, return: 1, softmax: 1""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})


def left_whole(plan: PartitionPlan, name: str) -> PartitionPlan:
    """The plan with one linear replicated, its consumers wanting what they wanted: no search would choose it."""
    op = plan.op(name)
    n = len(op.inputs)
    whole = replace(
        op, inputs=(REPLICATE,) * n, outputs=(REPLICATE,), gather=(False,), factor="", role="replicate",
        input_layouts=(-1,) * n, output_layouts=(-1,),
    )  # fmt: skip
    params = tuple(
        replace(p, placement=REPLICATE, layout=-1) if p.name.rpartition(".")[0] == name else p for p in plan.params
    )
    return replace(plan, ops=tuple(whole if o.name == name else o for o in plan.ops), params=params)


def test_replicate_to_shard_is_a_local_slice() -> None:
    whole = normalized(Mlp(8, 13), x=("B", "S", 8))
    plan = left_whole(plan_for(whole, tp=2), "up")
    before, after = inserted(whole, plan, 1)
    assert_expected_inline(before, """\
x : f64[B, S, 8] = input
up : f64[B, S, 13] = up(x)  # Linear[13, 8]
relu : f64[B, S, 13] = relu(up)
down : f64[B, S, 8] = down(relu)  # RowParallelLinear[8, 6]
add : f64[B, S, 8] = add(x, down)
return ({y: add}, ())""")
    assert_expected_inline(after, """\
x : f64[B, S, 8] = input
up : f64[B, S, 13] = up(x)  # Linear[13, 8]
narrow : f64[B, S, 13] = narrow(up, 2, 7, 6)
relu : f64[B, S, 13] = relu(narrow)
down : f64[B, S, 8] = down(relu)  # RowParallelLinear[8, 6]
all_reduce : f64[B, S, 8] = all_reduce(down, axis='tp')
add : f64[B, S, 8] = add(x, all_reduce)
return ({y: add}, ())""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})


class Thirds(nn.Module):
    """A fused product of which a rank holds several pieces. With `all`, the whole is wanted, too."""

    def __init__(self, all: bool) -> None:
        super().__init__()
        self.all = all
        self.qkv = nn.Linear(8, 12)
        self.o = nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        qkv = self.qkv(x)
        parts = qkv.split(4, -1)
        y = self.o(parts[0] * parts[1] + parts[2])
        return {"y": y, "all": qkv} if self.all else {"y": y}


def test_parts_that_are_several_intervals() -> None:
    whole = normalized(Thirds(all=True), x=("B", "S", 8))
    plan = plan_for(whole, tp=2)
    _, after = inserted(whole, plan, 0)
    gather = next(line.partition("parts=")[2] for line in after.splitlines() if "all_gather" in line)
    assert_expected_inline(gather, """(((0, 2), (4, 6), (8, 10)), ((2, 4), (6, 8), (10, 12))))""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})


def test_no_copies_or_sums_on_one_rank() -> None:
    whole = normalized(Mlp(), x=("B", "S", 8))
    before, after = inserted(whole, plan_for(whole), 0)
    assert before == after


def test_pieces_of_several_intervals_are_joined() -> None:
    whole = normalized(Thirds(all=False), x=("B", "S", 8))
    plan = left_whole(plan_for(whole, tp=2), "qkv")
    _, after = inserted(whole, plan, 1)
    assert_expected_inline("\n".join(line for line in after.splitlines() if "narrow" in line or "cat" in line), """\
narrow_2 : f64[B, S, 12] = narrow(qkv, 2, 2, 2)
narrow_1 : f64[B, S, 12] = narrow(qkv, 2, 6, 2)
narrow : f64[B, S, 12] = narrow(qkv, 2, 10, 2)
cat : f64[B, S, 12] = cat([narrow_2, narrow_1, narrow], 2)
split = split(cat, [2, 2, 2], 2)""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})
