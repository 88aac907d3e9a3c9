"""shard_parameters: every parameter becomes the rank's share of it; nothing is shared with the model."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from cost_model.partition_plan import PartitionPlan
from passes.fx.text import graph_text
from passes.op_graph.build import parameter_names
from passes.partition.context import RankContext
from passes.partition.extract_stage import extract_stage
from passes.partition.shard_parameters import shard_parameters
from passes.program.param_shard import ParamShard
from tests.support.graphs.small import Attention, Ids, Mlp, Stack, assert_split_equals_whole, normalized, plan_for


def sharded(
    whole: torch.fx.GraphModule, plan: PartitionPlan, rank: int
) -> tuple[torch.fx.GraphModule, dict[str, ParamShard]]:
    ctx = RankContext(plan, rank)
    stage = extract_stage(whole, ctx).graph_module
    shard_parameters(stage, ctx, sources=parameter_names(whole))
    return stage, ctx.param_shards


def shares(shards: dict[str, ParamShard]) -> str:
    return "\n".join(f"{n}: {s.source}{list(s.shape)} dim {s.dim} {list(s.intervals)}" for n, s in shards.items())


class Wide(Mlp):
    def __init__(self) -> None:
        super().__init__(4, 33)


def test_column_and_row() -> None:
    """33 columns on 2 ranks are 17 and 16; rank 1 has no bias of the row-parallel layer, whose sum adds it once."""
    whole = normalized(Wide(), x=("B", "S", 4))
    plan = plan_for(whole, tp=2)
    (first, of_first), (second, of_second) = (sharded(whole, plan, rank) for rank in range(2))
    assert_expected_inline(graph_text(whole), """\
x : f64[B, S, 4] = input
up : f64[B, S, 33] = up(x)  # Linear[33, 4]
relu : f64[B, S, 33] = relu(up)
down : f64[B, S, 4] = down(relu)  # Linear[4, 33]
add : f64[B, S, 4] = add(x, down)
return {y: add}""")
    assert_expected_inline(graph_text(first), """\
x : f64[B, S, 4] = input
up : f64[B, S, 33] = up(x)  # ColumnParallelLinear[17, 4]
relu : f64[B, S, 33] = relu(up)
down : f64[B, S, 4] = down(relu)  # RowParallelLinear[4, 17]
add : f64[B, S, 4] = add(x, down)
return ({y: add}, ())""")
    assert_expected_inline(graph_text(second), """\
x : f64[B, S, 4] = input
up : f64[B, S, 33] = up(x)  # ColumnParallelLinear[16, 4]
relu : f64[B, S, 33] = relu(up)
down : f64[B, S, 4] = down(relu)  # RowParallelLinear[4, 16]
add : f64[B, S, 4] = add(x, down)
return ({y: add}, ())""")
    assert_expected_inline(shares(of_first), """\
up.weight: up.weight[33, 4] dim 0 [(0, 17)]
up.bias: up.bias[33] dim 0 [(0, 17)]
down.weight: down.weight[4, 33] dim 1 [(0, 17)]
down.bias: down.bias[4] dim None []""")
    assert_expected_inline(shares(of_second), """\
up.weight: up.weight[33, 4] dim 0 [(17, 33)]
up.bias: up.bias[33] dim 0 [(17, 33)]
down.weight: down.weight[4, 33] dim 1 [(17, 33)]""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 3, 4, dtype=torch.float64)})


class TiedVocabulary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(90, 4), nn.LayerNorm(4), nn.Linear(4, 90, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.head(self.norm(self.embed(ids)))}


def test_a_tied_table_is_one_tensor_for_both_uses() -> None:
    whole = normalized(TiedVocabulary(), ids=Ids("B", "S"))
    plan = plan_for(whole, tp=2)
    rank, shards = sharded(whole, plan, 1)
    assert_expected_inline(graph_text(rank), """\
ids : i64[B, S] = input
embed : f64[B, S, 4] = embed(ids)  # VocabParallelEmbedding[45, 4]
norm : f64[B, S, 4] = norm(embed)  # LayerNorm[4]
head : f64[B, S, 90] = head(norm)  # ColumnParallelLinear[45, 4]
return ({y: head}, ())""")
    assert_expected_inline(shares(shards), """\
embed.weight: embed.weight[90, 4] dim 0 [(45, 90)]
norm.weight: norm.weight[4] dim None []
norm.bias: norm.bias[4] dim None []
head.weight: embed.weight[90, 4] dim 0 [(45, 90)]""")
    assert rank.embed.weight is rank.head.weight
    assert rank.embed.weight is not whole.embed.weight
    assert_split_equals_whole(whole, plan, {"ids": torch.randint(0, 90, (2, 5))})


class Plain(nn.Module):
    """Weights that a function uses, not a module."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.up_bias = nn.Parameter(torch.randn(40, 6)), nn.Parameter(torch.randn(40))
        self.down, self.down_bias = nn.Parameter(torch.randn(6, 40)), nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": F.linear(torch.relu(F.linear(x, self.up, self.up_bias)), self.down, self.down_bias)}


def test_weights_of_functions() -> None:
    whole = normalized(Plain(), x=("B", "S", 6))
    plan = plan_for(whole, tp=2)
    rank, shards = sharded(whole, plan, 1)
    assert_expected_inline(graph_text(whole), """\
x : f64[B, S, 6] = input
up : f64[40, 6] = up
up_bias : f64[40] = up_bias
linear : f64[B, S, 40] = linear(x, up, up_bias)
relu : f64[B, S, 40] = relu(linear)
down : f64[6, 40] = down
down_bias : f64[6] = down_bias
linear_1 : f64[B, S, 6] = linear(relu, down, down_bias)
return {y: linear_1}""")
    assert_expected_inline(graph_text(rank), """\
x : f64[B, S, 6] = input
up : f64[40, 6] = up
up_bias : f64[40] = up_bias
linear : f64[B, S, 40] = linear(x, up, up_bias)
relu : f64[B, S, 40] = relu(linear)
down : f64[6, 40] = down
linear_1 : f64[B, S, 6] = linear(relu, down, None)
return ({y: linear_1}, ())""")
    assert_expected_inline(shares(shards), """\
up: up[40, 6] dim 0 [(20, 40)]
up_bias: up_bias[40] dim 0 [(20, 40)]
down: down[6, 40] dim 1 [(20, 40)]""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 6, dtype=torch.float64)})


class PlainTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(51, 6))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": F.linear(F.layer_norm(F.embedding(ids, self.table), (6,)), self.table)}


def test_a_lookup_by_a_function_becomes_a_module_that_knows_its_rows() -> None:
    whole = normalized(PlainTied(), ids=Ids("B", "S"))
    plan = plan_for(whole, tp=2)
    rank, shards = sharded(whole, plan, 1)
    assert_expected_inline(graph_text(rank), """\
ids : i64[B, S] = input
table : f64[51, 6] = table
embedding : f64[B, S, 6] = embedding_table(ids)  # VocabParallelEmbedding[25, 6]
layer_norm : f64[B, S, 6] = layer_norm(embedding, (6,), weight=None, bias=None, eps=1e-05)
linear : f64[B, S, 51] = linear(layer_norm, table)
return ({y: linear}, ())""")
    assert_expected_inline(shares(shards), """\
table: table[51, 6] dim 0 [(26, 51)]
embedding_table.weight: table[51, 6] dim 0 [(26, 51)]""")
    assert_split_equals_whole(whole, plan, {"ids": torch.randint(0, 51, (2, 5))})


def test_norms_and_buffers_are_copied_whole() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 40), nn.Linear(40, 4)
            self.register_buffer("scale", torch.rand(4) + 1)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.down(torch.relu(self.up(self.norm(x) * self.scale)))}

    whole = normalized(Normed(), x=("B", "S", 4))
    plan = plan_for(whole, tp=2)
    rank, shards = sharded(whole, plan, 0)
    assert_expected_inline(graph_text(rank), """\
x : f64[B, S, 4] = input
norm : f64[B, S, 4] = norm(x)  # LayerNorm[4]
scale : f64[4] = scale
mul : f64[B, S, 4] = mul(norm, scale)
up : f64[B, S, 40] = up(mul)  # ColumnParallelLinear[20, 4]
relu : f64[B, S, 40] = relu(up)
down : f64[B, S, 4] = down(relu)  # RowParallelLinear[4, 20]
return ({y: down}, ())""")
    assert_expected_inline(shares(shards), """\
norm.weight: norm.weight[4] dim None []
norm.bias: norm.bias[4] dim None []
scale: scale[4] dim None []
up.weight: up.weight[40, 4] dim 0 [(0, 20)]
up.bias: up.bias[40] dim 0 [(0, 20)]
down.weight: down.weight[4, 40] dim 1 [(0, 20)]
down.bias: down.bias[4] dim None []""")
    assert shards["scale"].is_buffer and not shards["norm.weight"].is_buffer
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 3, 4, dtype=torch.float64)})


def test_every_element_has_an_owner_and_nothing_is_shared_with_the_model() -> None:
    model = Stack([Attention(12, 7, 7, 5), Mlp(12, 53)], 12, vocab=61, tied=True)
    whole = normalized(model, x=Ids("B", "S"))
    mine = {id(p) for p in whole.parameters()}
    for tp in (2, 3, 4):
        plan = plan_for(whole, tp=tp)
        owned: dict[str, list[set[int]]] = {}
        for rank in range(tp):
            module, shards = sharded(whole, plan, rank)
            assert not mine & {id(p) for p in module.parameters()}
            assert all(p.is_meta for p in module.parameters())
            for name, shard in shards.items():
                assert tuple(module.get_parameter(name).shape) == shard.local_shape
                if shard.dim is not None:
                    held = {i for start, stop in shard.intervals for i in range(start, stop)}
                    owned.setdefault(f"{shard.source} {shard.shape[shard.dim]}", []).append(held)
        assert owned
        for name, parts in owned.items():
            assert set().union(*parts) == set(range(int(name.split()[-1]))), name
