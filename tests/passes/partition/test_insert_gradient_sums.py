"""insert_gradient_sums: copy_to_tp where ranks read a whole value in parts; sums of the gradients of parameters."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

from autodist_fx.simulation.thread_communicator import ThreadWorld
from cost_model.mesh import Mesh
from passes.fx.text import graph_text
from passes.ops import comm as comm_ops
from passes.ops.parallel_layers import one_gradient, one_term
from passes.program.rank_program import RankProgram
from tests.support.graphs.gradients import check_and_plan
from tests.support.graphs.small import Attention, Mlp, Stack


def owed(programs: list[RankProgram]) -> list[tuple[str, object, tuple[int, ...]]]:
    return list(dict.fromkeys((s.source, s.box, s.ranks) for p in programs for s in p.grad_sums or ()))


def check(body: nn.Module, width: int, tp: int, pp: int = 1) -> list[RankProgram]:
    """The programs; verified, and right to 1e-12."""
    return check_and_plan(body, width, tp, pp)[0]


def test_column_parallel_linear_reads_its_input_through_copy_to_tp() -> None:
    programs = check(Stack([Mlp(), Mlp()]), 8, tp=2)
    assert_expected_inline(graph_text(programs[0].graph_module), """\
x : f64[B, S, 8] = input
body_layers_0_up : f64[B, S, 12] = body.layers.0.up(x)  # ColumnParallelLinear[6, 8]
relu : f64[B, S, 12] = relu(body_layers_0_up)
body_layers_0_down : f64[B, S, 8] = body.layers.0.down(relu)  # RowParallelLinear[8, 6]
all_reduce : f64[B, S, 8] = all_reduce(body_layers_0_down, axis='tp')
add : f64[B, S, 8] = add(x, all_reduce)
copy_to_tp : f64[B, S, 8] = copy_to_tp(add, axis='tp')
body_layers_1_up : f64[B, S, 12] = body.layers.1.up(copy_to_tp)  # ColumnParallelLinear[6, 8]
relu_1 : f64[B, S, 12] = relu(body_layers_1_up)
body_layers_1_down : f64[B, S, 8] = body.layers.1.down(relu_1)  # RowParallelLinear[8, 6]
all_reduce_1 : f64[B, S, 8] = all_reduce(body_layers_1_down, axis='tp')
add_1 : f64[B, S, 8] = add(add, all_reduce_1)
sin : f64[B, S, 8] = sin(add_1)
sum_1 : f64[] = .sum(sin)
return {loss: sum_1}""")
    assert owed(programs) == []


class ScaledHeads(Attention):
    """Queries are scaled alike in each head; the same scale is used on the whole of x, too."""

    def __init__(self, everywhere: bool) -> None:
        super().__init__(d=12, heads=4, groups=2, size=3)
        self.scale, self.everywhere = nn.Parameter(torch.randn(3)), everywhere

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        q, k, v = self.qkv_heads(x)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        a = nn.functional.scaled_dot_product_attention(q * self.scale, k, v)
        y = self.o(a.transpose(1, 2).reshape(x.shape[0], x.shape[1], 12))
        return {"y": x + y * self.scale.sum() if self.everywhere else x + y}


def test_gradient_of_a_norm_over_a_ranks_heads_is_one_sum() -> None:
    programs = check(ScaledHeads(everywhere=False), 12, tp=2)
    assert owed(programs) == [("body.scale", ((0, 3),), (0, 1))]


def test_parameter_used_whole_and_on_heads_is_read_through_copy_to_tp() -> None:
    programs = check(ScaledHeads(everywhere=True), 12, tp=2)
    assert owed(programs) == []
    copies = [n for n in programs[0].graph_module.graph.nodes if n.target is comm_ops.copy_to_tp]
    assert [n.args[0].target for n in copies if n.args[0].op == "get_attr"] == ["body.scale"]


def test_gradient_of_a_shared_kv_head_is_summed_over_the_ranks_that_hold_it() -> None:
    programs = check(Attention(d=12, heads=6, groups=3, size=3), 12, tp=4)
    assert owed(programs) == [
        ("body.k.weight", ((6, 9), (0, 12)), (2, 3)), ("body.k.bias", ((6, 9),), (2, 3)),
        ("body.v.weight", ((6, 9), (0, 12)), (2, 3)), ("body.v.bias", ((6, 9),), (2, 3)),
    ]  # fmt: skip


def test_single_kv_head_in_fused_qkv_is_replicated_and_its_gradient_is_summed() -> None:
    programs = check(Attention(d=12, heads=4, groups=1, size=3, fused="thirds"), 12, tp=2)
    assert owed(programs) == [
        ("body.qkv.weight", ((12, 18), (0, 12)), (0, 1)), ("body.qkv.bias", ((12, 18),), (0, 1)),
    ]  # fmt: skip


class PositionedKey(Attention):
    """Something that all ranks have whole is added to the one KV head."""

    def __init__(self) -> None:
        super().__init__(d=12, heads=4, groups=1, size=3, fused="thirds")
        self.position = nn.Linear(12, 3)

    def qkv_heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = super().qkv_heads(x)
        return q, k + torch.tanh(self.position(x))[:, None], v


def test_one_gradient_stands_where_terms_meet_a_whole_gradient() -> None:
    """The key and what is added to it have one gradient, added up behind their sum: the first rank's key has it."""
    programs = check(PositionedKey(), 12, tp=2)
    for program in programs:
        (one,) = [n for n in program.graph_module.graph.nodes if n.target is one_gradient]
        (total,) = one.users
        assert one.kwargs == {"tp_rank": program.rank} and total.name == "add"
        assert [n.target for n in total.users] == [comm_ops.copy_to_tp]


class Chosen(nn.Module):
    """Two products, each of other tokens: what they read is added up before it is picked from, once."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.a, self.b = nn.Linear(8, 8), Mlp(), Mlp()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = torch.tanh(self.start(x))
        h = h + h.flip(1)
        return {"y": torch.cat([self.a.down(torch.relu(self.a.up(h[:, :-1]))), self.b.down(self.b.up(h[:, 1:]))], 1)}


def test_gradients_of_an_input_that_several_index_selects_read_are_summed_once() -> None:
    programs = check(Chosen(), 8, tp=2)
    copies = [n for n in programs[0].graph_module.graph.nodes if n.target is comm_ops.copy_to_tp]
    assert len(copies) == 1 and [n.name for n in copies[0].users] == ["getitem", "getitem_1"]


# -- how gradients go back ---------------------------------------------------------------------------------------------

PARTS = (((0, 3),), ((2, 5),), ((5, 6),))  # rank 1 also has element 2, which the whole takes from rank 0


@pytest.mark.parametrize("dim", [0, 1])
def test_backward_is_the_transpose_of_forward(dim: int) -> None:
    """<there(x), g> = <x, back(g)>, over all ranks together: with that, chains of them are right, too."""
    generator = torch.Generator().manual_seed(dim)
    shape = [6, 6]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    whole, seed = random(*shape), random(*shape)
    xs, seeds = [random(*shape) for _ in range(3)], [random(*shape) for _ in range(3)]

    def back(rank: int, communicator: comm_ops.Communicator) -> dict[str, torch.Tensor]:
        with comm_ops.using(communicator), torch.enable_grad():
            own = torch.cat([whole.narrow(dim, a, b - a) for a, b in PARTS[rank]], dim).requires_grad_()
            x = xs[rank].clone().requires_grad_()
            alike = whole.clone().requires_grad_()
            return {
                "all_gather": torch.autograd.grad(comm_ops.all_gather(own, "tp", dim, PARTS), own, seed)[0],
                "all_reduce": torch.autograd.grad(comm_ops.all_reduce(x, "tp"), x, seed)[0],
                "copy_to_tp": torch.autograd.grad(comm_ops.copy_to_tp(alike, "tp"), alike, seeds[rank])[0],
                "one_term": torch.autograd.grad(one_term(alike, rank), alike, seed)[0],
                "one_gradient": torch.autograd.grad(one_gradient(alike, rank), alike, seed)[0],
            }

    found = ThreadWorld(Mesh(tp=3)).run(back)
    pieces = torch.zeros(shape, dtype=torch.float64)
    for rank, of_rank in enumerate(found):
        at = 0
        for a, b in PARTS[rank]:
            pieces.narrow(dim, a, b - a).add_(of_rank["all_gather"].narrow(dim, at, b - a))
            at += b - a
    assert torch.equal(pieces, seed)  # the terms of each element add up to its gradient
    assert all(torch.equal(f["all_reduce"], seed) and torch.equal(f["one_term"], seed) for f in found)
    assert all(torch.equal(f["copy_to_tp"], seeds[0] + seeds[1] + seeds[2]) for f in found)
    assert torch.equal(sum(f["one_gradient"] for f in found), seed)
