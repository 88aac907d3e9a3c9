"""extract_stage: each stage's nodes, what it receives and what it owes."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from cost_model.partition_plan import PartitionPlan
from passes.fx.text import graph_text
from passes.partition.context import RankContext
from passes.partition.extract_stage import extract_stage
from tests.support.graphs.small import Mlp, Stack, assert_split_equals_whole, normalized, plan_for


def stages(whole: torch.fx.GraphModule, plan: PartitionPlan) -> list[torch.fx.GraphModule]:
    return [extract_stage(whole, RankContext(plan, stage * plan.mesh.tp)).graph_module for stage in range(plan.mesh.pp)]


def test_hidden_states_are_an_output_of_stage_0_and_an_input_of_stage_1() -> None:
    whole = normalized(Stack([Mlp(), Mlp()]), x=("B", "S", 8))
    plan = plan_for(whole, pp=2)
    before = graph_text(whole)
    first, second = stages(whole, plan)
    assert_expected_inline(before, """\
x : f64[B, S, 8] = input
layers_0_up : f64[B, S, 12] = layers.0.up(x)  # Linear[12, 8]
relu : f64[B, S, 12] = relu(layers_0_up)
layers_0_down : f64[B, S, 8] = layers.0.down(relu)  # Linear[8, 12]
add : f64[B, S, 8] = add(x, layers_0_down)
layers_1_up : f64[B, S, 12] = layers.1.up(add)  # Linear[12, 8]
relu_1 : f64[B, S, 12] = relu(layers_1_up)
layers_1_down : f64[B, S, 8] = layers.1.down(relu_1)  # Linear[8, 12]
add_1 : f64[B, S, 8] = add(add, layers_1_down)
return {y: add_1}""")
    assert_expected_inline(graph_text(first), """\
x : f64[B, S, 8] = input
layers_0_up : f64[B, S, 12] = layers.0.up(x)  # Linear[12, 8]
relu : f64[B, S, 12] = relu(layers_0_up)
layers_0_down : f64[B, S, 8] = layers.0.down(relu)  # Linear[8, 12]
add : f64[B, S, 8] = add(x, layers_0_down)
return ({}, (add,))""")
    assert_expected_inline(graph_text(second), """\
x : f64[B, S, 8] = input
incoming_add : f64[B, S, 8] = input
layers_1_up : f64[B, S, 12] = layers.1.up(incoming_add)  # Linear[12, 8]
relu_1 : f64[B, S, 12] = relu(layers_1_up)
layers_1_down : f64[B, S, 8] = layers.1.down(relu_1)  # Linear[8, 12]
add_1 : f64[B, S, 8] = add(incoming_add, layers_1_down)
return ({y: add_1}, ())""")
    assert graph_text(whole) == before, "the model's graph is left alone"
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    outputs, (owed,) = first(x)
    assert outputs == {}
    assert torch.equal(second(x, owed)[0]["y"], whole(x)["y"])
    assert_split_equals_whole(whole, plan, {"x": x})


class Masked(nn.Module):
    """Two layers that use one mask; the mask is cheap, and a view of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> dict[str, torch.Tensor]:
        mask = keep.view(keep.shape[0], -1, 1).exp()
        x = self.a(x) * mask
        return {"y": self.b(x) * mask, "first": x}


def test_masks_are_recomputed_and_outputs_stay_on_their_stage() -> None:
    whole = normalized(Masked(), x=("B", "S", 8), keep=("B", "S"))
    plan = plan_for(whole, pp=2)
    first, second = stages(whole, plan)
    assert_expected_inline(graph_text(whole), """\
x : f64[B, S, 8] = input
keep : f64[B, S] = input
batch = sym_size.int(x, 0)
view : f64[B, S, 1] = reshape(keep, (batch, -1, 1))
exp : f64[B, S, 1] = .exp(view)
a : f64[B, S, 8] = a(x)  # Linear[8, 8]
mul : f64[B, S, 8] = mul(a, exp)
b : f64[B, S, 8] = b(mul)  # Linear[8, 8]
mul_1 : f64[B, S, 8] = mul(b, exp)
return {y: mul_1, first: mul}""")
    assert_expected_inline(graph_text(first), """\
x : f64[B, S, 8] = input
keep : f64[B, S] = input
batch = sym_size.int(x, 0)
view : f64[B, S, 1] = reshape(keep, (batch, -1, 1))
exp : f64[B, S, 1] = .exp(view)
a : f64[B, S, 8] = a(x)  # Linear[8, 8]
mul : f64[B, S, 8] = mul(a, exp)
b : f64[B, S, 8] = b(mul)  # Linear[8, 8]
return ({first: mul}, (b,))""")
    assert_expected_inline(graph_text(second), """\
x : f64[B, S, 8] = input
keep : f64[B, S] = input
incoming_b : f64[B, S, 8] = input
batch = sym_size.int(x, 0)
view : f64[B, S, 1] = reshape(keep, (batch, -1, 1))
exp : f64[B, S, 1] = .exp(view)
mul_1 : f64[B, S, 8] = mul(incoming_b, exp)
return ({y: mul_1}, ())""")
    x, keep = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    assert_split_equals_whole(whole, plan, {"x": x, "keep": keep})


class Skips(nn.Module):
    """The first layer's output is used in the first and in the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        first = x = self.layers[0](x)
        for layer in self.layers[1:3]:
            x = torch.relu(layer(x))
        return {"y": self.layers[3](x) + first}


@pytest.mark.parametrize("pp", [2, 3])
def test_a_tensor_read_two_stages_on_is_sent_there_directly(pp: int) -> None:
    whole = normalized(Skips(), x=("B", "S", 8))
    plan = plan_for(whole, pp=pp)
    targets = {(hop.source, hop.target) for hop in plan.hops if hop.op == plan.hops[0].op}
    assert (0, pp - 1) in targets
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})


def test_two_outputs_of_one_op_are_two_hops() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            halves = self.a(x).chunk(2, -1)
            return {"y": self.c(torch.relu(self.b(halves[0])) * halves[1])}

    whole = normalized(Halves(), x=("B", "S", 8))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for tp, pp in ((1, 2), (2, 2), (3, 2)):
        assert_split_equals_whole(whole, plan_for(whole, tp, pp), {"x": x})
