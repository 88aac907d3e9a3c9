"""localize_cache: a stage's cache has its own layers only, counted from 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from cost_model.errors import PlanError
from cost_model.partition_plan import PartitionPlan
from passes.fx.text import graph_text
from passes.partition.context import RankContext
from passes.partition.extract_stage import extract_stage
from passes.partition.localize_cache import localize_cache
from passes.partition.pipeline import emit_rank
from tests.support.graphs.small import normalized, plan_for, run_split


class ToyCache:
    """Keys and values by layer; answers like transformers' Cache."""

    def __init__(self, layers: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None) -> None:
        self.layers = layers or {}

    def update(self, k: torch.Tensor, v: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx in self.layers:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.layers[layer_idx], (k, v)))
        self.layers[layer_idx] = k, v
        return k, v

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx][0].shape[2] if layer_idx in self.layers else 0


def example_cache(lengths: dict[str, int]) -> ToyCache:
    """As `lengths` say; layer 1 holds one token more than layer 0, as if it were of another kind."""
    shape = lengths["B"], 1, lengths["P"], 8
    longer = lengths["B"], 1, lengths["P"] + 1, 8
    return ToyCache({
        layer: (torch.empty(s, device="meta", dtype=torch.float64),) * 2 for layer, s in enumerate((shape, longer))
    })  # fmt: skip


class TwoLayers(nn.Module):
    """A layer: attend to all keys so far. The mask's length comes from the cache, asked in the first layer's words."""

    def __init__(self, asked: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.asked = asked

    def forward(self, x: torch.Tensor, cache: Any) -> dict[str, torch.Tensor]:
        length = cache.get_seq_length(self.asked)
        for layer, linear in enumerate((self.a, self.b)):
            kv = cache.update(linear(x), x, layer)
            x = nn.functional.scaled_dot_product_attention(x, kv[0], kv[1]) * (length + 1)
        return {"y": x}


def compiled(asked: int, pp: int) -> tuple[torch.fx.GraphModule, PartitionPlan]:
    whole = normalized(TwoLayers(asked), x=("B", 1, "S", 8), cache=example_cache)
    return whole, plan_for(whole, pp=pp, cuts=("b",) if pp == 2 else ())


def test_cache_layers_are_renumbered_and_length_queries_go_to_a_layer_of_the_same_kind() -> None:
    whole, plan = compiled(asked=0, pp=2)
    ctx = RankContext(plan, 1)
    stage = extract_stage(whole, ctx).graph_module
    before = graph_text(stage)
    after = localize_cache(stage, ctx, layer_kinds=("full", "full")).graph_module
    assert_expected_inline(before, """\
x : f64[B, 1, S, 8] = input
cache = input
incoming_mul : f64[B, 1, S, 8] = input
get_seq_length = .get_seq_length(cache, 0)
add = add(get_seq_length, 1)
b : f64[B, 1, S, 8] = b(incoming_mul)  # Linear[8, 8]
update_1 = .update(cache, b, incoming_mul, 1)
getitem_2 : f64[B, 1, ?53|75, 8] = getitem(update_1, 0)
getitem_3 : f64[B, 1, ?53|75, 8] = getitem(update_1, 1)
scaled_dot_product_attention_1 : f64[B, 1, S, 8] = scaled_dot_product_attention(incoming_mul, getitem_2, getitem_3)
mul_1 : f64[B, 1, S, 8] = mul(scaled_dot_product_attention_1, add)
return ({y: mul_1}, ())""")
    assert_expected_inline(graph_text(after), """\
x : f64[B, 1, S, 8] = input
cache = input
incoming_mul : f64[B, 1, S, 8] = input
get_seq_length = .get_seq_length(cache, 0)
add = add(get_seq_length, 1)
b : f64[B, 1, S, 8] = b(incoming_mul)  # Linear[8, 8]
update_1 = .update(cache, b, incoming_mul, 0)
getitem_2 : f64[B, 1, ?53|75, 8] = getitem(update_1, 0)
getitem_3 : f64[B, 1, ?53|75, 8] = getitem(update_1, 1)
scaled_dot_product_attention_1 : f64[B, 1, S, 8] = scaled_dot_product_attention(incoming_mul, getitem_2, getitem_3)
mul_1 : f64[B, 1, S, 8] = mul(scaled_dot_product_attention_1, add)
return ({y: mul_1}, ())""")
    assert ctx.cache_layers == (1,)


def test_the_first_stage_keeps_its_numbers() -> None:
    whole, plan = compiled(asked=0, pp=2)
    ctx = RankContext(plan, 0)
    stage = extract_stage(whole, ctx).graph_module
    before = graph_text(stage)
    assert graph_text(localize_cache(stage, ctx, layer_kinds=("full", "full")).graph_module) == before
    assert ctx.cache_layers == (0,)


def test_a_length_query_without_a_layer_of_its_kind_raises_plan_error() -> None:
    whole, plan = compiled(asked=0, pp=2)
    ctx = RankContext(plan, 1)
    with pytest.raises(PlanError, match=r"stage 1 asks .* layer 0 \(cross\) and has no layer of that kind"):
        localize_cache(extract_stage(whole, ctx).graph_module, ctx, layer_kinds=("cross", "sliding:4"))


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("asked", [0, 1])
@torch.no_grad()
def test_steps_through_a_split_cache_equal_those_through_a_whole_one(asked: int, pp: int) -> None:
    whole, plan = compiled(asked, pp)
    one, split = ToyCache(), [ToyCache() for _ in range(pp)]
    for tokens in (3, 1, 2):
        x = torch.randn(2, 1, tokens, 8, dtype=torch.float64)
        expected = whole(x, one)["y"]
        found = run_split(
            whole, plan, {"x": x, "cache": split}, lambda rank: emit_rank(whole, plan, rank, layer_kinds=("full",) * 2)
        )
        torch.testing.assert_close(found["y"], expected, rtol=1e-12, atol=1e-12)
    assert [sorted(cache.layers) for cache in split] == ([[0, 1]] if pp == 1 else [[0], [0]])
