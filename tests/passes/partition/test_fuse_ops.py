"""fuse_ops: chains that torch has one op for, where nothing else reads their middle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.nn import functional as F

from cost_model.costs.hardware import CPU_GLOO
from cost_model.graph.op_graph import SOURCES, FusedChain
from cost_model.search.tensor_parallel import TensorParallelSearch
from passes.fx.text import graph_text
from passes.op_graph.build import build_op_graph
from passes.partition.context import RankContext
from passes.partition.fuse_ops import fuse_ops, removed_by_fusing
from tests.support.graphs.small import normalized, plan_for


def fused(module: nn.Module, **inputs: Any) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    before = normalized(module, **inputs)
    return before, fuse_ops(copy.deepcopy(before), RankContext(plan_for(before), 0)).graph_module


def assert_same(before: torch.fx.GraphModule, after: torch.fx.GraphModule, *inputs: torch.Tensor) -> None:
    with torch.no_grad():
        for name, value in before(*inputs).items():
            torch.testing.assert_close(after(*inputs)[name], value, rtol=1e-12, atol=1e-12)


class RmsNorm(nn.Module):
    def __init__(self, read_middle: bool = False, cast: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.read_middle, self.cast = read_middle, cast

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = x.to(torch.float32) if self.cast else x
        variance = h.pow(2).mean(-1, keepdim=True)
        y = self.weight * (h * torch.rsqrt(variance + 1e-5)).to(x.dtype)
        return {"y": y, "variance": variance} if self.read_middle else {"y": y}


def test_an_rms_norm() -> None:
    before, after = fused(RmsNorm(), x=("B", "S", 8))
    assert_expected_inline(graph_text(before), """\
x : f64[B, S, 8] = input
pow_1 : f64[B, S, 8] = .pow(x, 2)
mean : f64[B, S, 1] = .mean(pow_1, -1, keepdim=True)
weight : f64[8] = weight
add : f64[B, S, 1] = add(mean, 1e-05)
rsqrt : f64[B, S, 1] = rsqrt(add)
mul : f64[B, S, 8] = mul(x, rsqrt)
mul_1 : f64[B, S, 8] = mul(weight, mul)
return {y: mul_1}""")
    assert_expected_inline(graph_text(after), """\
x : f64[B, S, 8] = input
weight : f64[8] = weight
fused_mul_1 : f64[B, S, 8] = rms_norm(x, (8,), weight, 1e-05)
return {y: fused_mul_1}""")
    assert_same(before, after, torch.randn(2, 5, 8, dtype=torch.float64))


def test_a_chain_whose_middle_is_read_is_left_alone() -> None:
    before, after = fused(RmsNorm(read_middle=True), x=("B", "S", 8))
    assert graph_text(after) == graph_text(before)


def test_an_rms_norm_in_another_dtype_keeps_its_casts() -> None:
    """The fused op works in float32 inside: between two casts it may stand, but it may not swallow them."""
    before, after = fused(RmsNorm(cast=True), x=("B", "S", 8))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(after(x)["y"], before(x)["y"], rtol=1e-6, atol=1e-6)


class Grouped(nn.Module):
    def __init__(self, each_v: int = 3) -> None:
        super().__init__()
        self.each_v = each_v

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(self.each_v, 1)
        return {"y": F.scaled_dot_product_attention(q, k, v)}


def test_grouped_attention() -> None:
    before, after = fused(Grouped(), q=("B", 6, "S", 4), k=("B", 2, "S", 4), v=("B", 2, "S", 4))
    assert_expected_inline(graph_text(before), """\
q : f64[B, 6, S, 4] = input
k : f64[B, 2, S, 4] = input
v : f64[B, 2, S, 4] = input
repeat_interleave : f64[B, 6, S, 4] = .repeat_interleave(k, 3, 1)
repeat_interleave_1 : f64[B, 6, S, 4] = .repeat_interleave(v, 3, 1)
scaled_dot_product_attention : f64[B, 6, S, 4] = scaled_dot_product_attention(q, repeat_interleave, repeat_interleave_1)
return {y: scaled_dot_product_attention}""")
    assert_expected_inline(graph_text(after), """\
q : f64[B, 6, S, 4] = input
k : f64[B, 2, S, 4] = input
v : f64[B, 2, S, 4] = input
scaled_dot_product_attention : f64[B, 6, S, 4] = scaled_dot_product_attention(q, k, v, enable_gqa=True)
return {y: scaled_dot_product_attention}""")
    q, k, v = (torch.randn(2, n, 5, 4, dtype=torch.float64) for n in (6, 2, 2))
    assert_same(before, after, q, k, v)


def test_keys_and_values_repeated_differently_are_left_alone() -> None:
    before, after = fused(Grouped(each_v=6), q=("B", 6, "S", 4), k=("B", 2, "S", 4), v=("B", 1, "S", 4))
    assert graph_text(after) == graph_text(before)


def test_what_fusing_will_remove_is_known_before_and_costs_nothing() -> None:
    for module, inputs in (
        (RmsNorm(), {"x": ("B", "S", 8)}),
        (RmsNorm(read_middle=True), {"x": ("B", "S", 8)}),
        (RmsNorm(cast=True), {"x": ("B", "S", 8)}),
        (Grouped(), {"q": ("B", 6, "S", 4), "k": ("B", 2, "S", 4), "v": ("B", 2, "S", 4)}),
        (Grouped(each_v=6), {"q": ("B", 6, "S", 4), "k": ("B", 2, "S", 4), "v": ("B", 1, "S", 4)}),
    ):
        before, after = fused(module, **inputs)
        chains = removed_by_fusing(before)
        removed = {name for chain in chains for name in chain.ops}
        names = {node.name for node in after.graph.nodes}
        gone = {node.name for node in before.graph.nodes} - names
        made = {name.removeprefix("fused_") for name in names if name.startswith("fused_")}  # in the place of the last
        assert removed == gone - made
        search = TensorParallelSearch(
            build_op_graph(before, chains=chains), 2, CPU_GLOO, {"B": 2, "S": 8, "B*S": 16}
        )
        for op in search.graph:
            for strategy in search.domain(op):
                assert (search.compute_seconds(op, strategy) == 0) == (op.name in removed or op.kind in SOURCES)


class NormOfParts(nn.Module):
    """x [B, S, 8] -> y [B, S, 8], with a norm over what a product leaves in parts (OLMo-2's, of all heads)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 12, bias=False), RmsNorm(), nn.Linear(12, 8, bias=False)
        self.norm.weight = nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.down(self.norm(self.up(x))["y"])}


def test_a_norm_that_is_cut_is_not_fused_and_costs_what_all_its_ops_cost() -> None:
    whole = normalized(NormOfParts(), x=("B", "S", 8))
    chains = removed_by_fusing(whole)
    cut = {"pow_1": "S(2)", "mean": "P", "add": "R", "rsqrt": "R", "mul": "S(2)"}

    def seconds(name: str, placement: str, chains: tuple[FusedChain, ...]) -> float:
        search = TensorParallelSearch(build_op_graph(whole, chains=chains), 2, CPU_GLOO, {"B": 9, "S": 8})
        op = search.graph[name]
        return next(search.compute_seconds(op, s) for s in search.domain(op) if str(s.outputs[0]) == placement)

    each = [seconds(name, placement, ()) for name, placement in cut.items()]
    assert seconds("mul", "S(2)", chains) == pytest.approx(sum(each))
    assert all(seconds(name, placement, chains) == 0 for name, placement in cut.items() if name != "mul")
    assert seconds("mul", "R", chains) == 0
