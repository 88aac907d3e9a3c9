"""insert_send_recv: hops become recv and send, in the order of their channels, with shapes read off the own inputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from cost_model.errors import VerificationError
from cost_model.partition_plan import PartitionPlan
from passes.fx.text import graph_text
from passes.op_graph.build import build_op_graph, parameter_names
from passes.ops.comm import send
from passes.partition.context import RankContext
from passes.partition.extract_stage import extract_stage
from passes.partition.insert_collectives import insert_collectives
from passes.partition.insert_send_recv import insert_send_recv
from passes.partition.localize_shapes import localize_shapes
from passes.partition.pipeline import emit_rank
from passes.partition.shard_parameters import shard_parameters
from passes.verify.verify import verify
from tests.support.graphs.small import Ids, Mlp, Stack, assert_split_equals_whole, normalized, plan_for


def prepared(whole: torch.fx.GraphModule, plan: PartitionPlan, rank: int) -> tuple[torch.fx.GraphModule, RankContext]:
    ctx = RankContext(plan, rank)
    module = extract_stage(whole, ctx).graph_module
    shard_parameters(module, ctx, sources=parameter_names(whole))
    localize_shapes(module, ctx)
    insert_collectives(module, ctx)
    return module, ctx


def test_a_border_of_one_tensor() -> None:
    whole = normalized(Stack([Mlp(), Mlp()]), x=("B", "S", 8))
    plan = plan_for(whole, pp=2)
    texts = []
    for rank in range(2):
        module, ctx = prepared(whole, plan, rank)
        before = graph_text(module)
        texts += [before, graph_text(insert_send_recv(module, ctx).graph_module)]
    assert_expected_inline(texts[0], """\
x : f64[B, S, 8] = input
layers_0_up : f64[B, S, 12] = layers.0.up(x)  # Linear[12, 8]
relu : f64[B, S, 12] = relu(layers_0_up)
layers_0_down : f64[B, S, 8] = layers.0.down(relu)  # Linear[8, 12]
add : f64[B, S, 8] = add(x, layers_0_down)
return ({}, (add,))""")
    assert_expected_inline(texts[1], """\
x : f64[B, S, 8] = input
layers_0_up : f64[B, S, 12] = layers.0.up(x)  # Linear[12, 8]
relu : f64[B, S, 12] = relu(layers_0_up)
layers_0_down : f64[B, S, 8] = layers.0.down(relu)  # Linear[8, 12]
add : f64[B, S, 8] = add(x, layers_0_down)
send : f64[B, S, 8] = send(add, to=1, channel=0)
return {}""")
    assert_expected_inline(texts[2], """\
x : f64[B, S, 8] = input
incoming_add : f64[B, S, 8] = input
layers_1_up : f64[B, S, 12] = layers.1.up(incoming_add)  # Linear[12, 8]
relu_1 : f64[B, S, 12] = relu(layers_1_up)
layers_1_down : f64[B, S, 8] = layers.1.down(relu_1)  # Linear[8, 12]
add_1 : f64[B, S, 8] = add(incoming_add, layers_1_down)
return ({y: add_1}, ())""")
    assert_expected_inline(texts[3], """\
x : f64[B, S, 8] = input
sym_size_int = sym_size.int(x, 0)
sym_size_int_1 = sym_size.int(x, 1)
getattr_1 = getattr(x, 'device')
incoming_add : f64[B, S, 8] = recv((sym_size_int, sym_size_int_1, 8), torch.float64, getattr_1, source=0, channel=0)
layers_1_up : f64[B, S, 12] = layers.1.up(incoming_add)  # Linear[12, 8]
relu_1 : f64[B, S, 12] = relu(layers_1_up)
layers_1_down : f64[B, S, 8] = layers.1.down(relu_1)  # Linear[8, 12]
add_1 : f64[B, S, 8] = add(incoming_add, layers_1_down)
return {y: add_1}""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})


class Lookup(nn.Module):
    """The border lies on a shape that no input has: [B * S, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.a(self.embed(ids.view(-1)))
        return {"y": self.b(torch.tanh(x)).view(ids.shape[0], ids.shape[1], 8)}


def test_lengths_are_those_of_the_own_inputs() -> None:
    whole = normalized(Lookup(), ids=Ids("B", "S"))
    plan = plan_for(whole, pp=2)
    module, ctx = prepared(whole, plan, 1)
    assert_expected_inline(graph_text(insert_send_recv(module, ctx).graph_module), """\
ids : i64[B, S] = input
seq = sym_size.int(ids, 1)
batch = sym_size.int(ids, 0)
mul = mul(batch, seq)
getattr_1 = getattr(ids, 'device')
incoming_b : f64[B*S, 8] = recv((mul, 8), torch.float64, getattr_1, source=0, channel=0)
view_1 : f64[B, S, 8] = reshape(incoming_b, (batch, seq, 8))
return {y: view_1}""")
    assert_split_equals_whole(whole, plan, {"ids": torch.randint(0, 9, (2, 5))})


def test_each_tp_rank_talks_to_its_like_and_pieces_are_received_as_pieces() -> None:
    """tp=2 x pp=2: rank 3 receives from rank 1, the owed sum or the whole as the plan says."""
    whole = normalized(Stack([Mlp(8, 13), Mlp(8, 13)]), x=("B", "S", 8))
    plan = plan_for(whole, tp=2, pp=2)
    module, ctx = prepared(whole, plan, 1)
    sent = [line for line in graph_text(insert_send_recv(module, ctx).graph_module).splitlines() if "send(" in line]
    module, ctx = prepared(whole, plan, 3)
    received = [line for line in graph_text(insert_send_recv(module, ctx).graph_module).splitlines() if "recv(" in line]
    assert_expected_inline("\n".join(sent + received), """\
send : f64[B, S, 8] = send(add, to=3, channel=0)
incoming_add : f64[B, S, 8] = recv((sym_size_int, sym_size_int_1, 8), torch.float64, getattr_1, source=1, channel=0)""")
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert_split_equals_whole(whole, plan, {"x": x})
    # the same, cut where the hidden dim is sharded: 7 of 13 elements on rank 0, 6 on rank 1
    inside = replace(
        plan,
        ops=tuple(
            replace(op, home=1, stages=(1,)) if op.name in ("layers_0_down", "add") else op for op in plan.ops
        ),
        params=tuple(replace(p, stages=(1,)) if p.name.startswith("layers.0.down") else p for p in plan.params),
        hops=(replace(plan.hops[0], op="relu", index=0, whole=False),),
    )
    module, ctx = prepared(whole, inside, 3)
    text = graph_text(insert_send_recv(module, ctx).graph_module)
    received = [line.partition(", torch")[0] for line in text.splitlines()]
    assert "incoming_part_relu : f64[B, S, 13] = recv((sym_size_int, sym_size_int_1, 6)" in received
    assert_split_equals_whole(whole, inside, {"x": x})


class Longer(nn.Module):
    """Three tokens more than the input has: a length that no input has, on the border and in a view behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.b(torch.tanh(nn.functional.pad(self.a(x), (0, 0, 3, 0))))
        length = x.shape[1]
        x = self.c(torch.tanh(x))
        return {"y": x.new_ones((length, 1)) * x.view(x.shape[0], length, 8)}


def test_a_length_that_the_receiver_cannot_know_is_sent_ahead() -> None:
    whole = normalized(Longer(), x=("B", "S", 8))
    plan = plan_for(whole, pp=2)
    module, ctx = prepared(whole, plan, 0)
    assert "send(c, to=1, channel=0, sized=True)" in graph_text(insert_send_recv(module, ctx).graph_module)
    module, ctx = prepared(whole, plan, 1)
    assert_expected_inline(graph_text(insert_send_recv(module, ctx).graph_module), """\
x : f64[B, S, 8] = input
sym_size_int_1 = sym_size.int(x, 0)
getattr_1 = getattr(x, 'device')
incoming_c : f64[B, ?26|34, 8] = recv((sym_size_int_1, None, 8), torch.float64, getattr_1, source=0, channel=0)
sym_size_int = sym_size.int(incoming_c, 1)
new_ones : f64[?26|34, 1] = .new_ones(incoming_c, (sym_size_int, 1))
mul : f64[B, ?26|34, 8] = mul(new_ones, incoming_c)
return {y: mul}""")
    assert_split_equals_whole(whole, plan, {"x": torch.randn(2, 5, 8, dtype=torch.float64)})
    assert_split_equals_whole(whole, plan_for(whole, tp=2, pp=2), {"x": torch.randn(1, 4, 8, dtype=torch.float64)})
    programs = [emit_rank(whole, plan, rank) for rank in range(2)]
    verify(programs, plan, build_op_graph(whole), whole)
    sent = next(n for n in programs[0].graph_module.graph.nodes if n.target is send)
    sent.kwargs = {k: v for k, v in sent.kwargs.items() if k != "sized"}
    with pytest.raises(VerificationError, match="rank 0 sends no shape ahead"):
        verify(programs, plan, build_op_graph(whole), whole)


def test_no_sends_or_recvs_on_one_stage() -> None:
    whole = normalized(Mlp(), x=("B", "S", 8))
    module, ctx = prepared(whole, plan_for(whole), 0)
    text = graph_text(insert_send_recv(module, ctx).graph_module)
    assert "send" not in text and "recv" not in text and text.endswith("return {y: add}")
