"""verify: programs to be trained of experts dealt to ranks, that owe something backward and do not pay it, or twice."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.fx import Node

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.ops.comm import all_reduce, copy_to_tp
from passes.ops.data_dependent import join_own_rows
from passes.partition.pipeline import emit_rank
from passes.program.gradient_sums import GradSum
from passes.verify.verify import verify
from tests.support.graphs.broken_programs import Programs, add_after, bypass, calls
from tests.support.graphs.gradients import check_and_plan
from tests.support.moe import FOUR, dbrx_experts, skip_one_node, tiny_moe_model


@functools.cache
def _compiled(family: str) -> CompiledModel:
    model = tiny_moe_model(family, num_hidden_layers=1, **FOUR, **(dbrx_experts(4) if family == "dbrx" else {}))
    names = ("input_ids", "attention_mask", "labels")
    return adx.compile(model, tp=2, train=True, input_names=names, verify=False)


def _emitted(family: str) -> Programs:
    made = _compiled(family)
    return [emit_rank(made.graph, made.plan, rank, train=True) for rank in range(2)]


def _check(programs: Programs, family: str) -> None:
    made = _compiled(family)
    verify(programs, made.plan, made.op_graph, made.graph)


Break = Callable[[Programs], object]
CASES: list[object] = []


def broken(family: str, message: str) -> Callable[[Break], Break]:
    def register(change: Break) -> Break:
        CASES.append(pytest.param(family, change, message, id=f"{change.__name__}-{family}"))
        return change

    return register


def _copies(programs: Programs, source: str) -> list[Node]:
    """Returns the copies of the value that a node is called, on each rank."""
    found = [n for p in programs for n in calls(p, copy_to_tp) if n.args[0].name == source]
    assert len(found) == len(programs)
    return found


@broken("mixtral", r"reads the whole of view_3 and computes a part: .* nothing adds them up")
def tokens_of_experts_not_added_up(programs: Programs) -> None:
    """Each rank's experts have a term of the gradient of the hidden states."""
    for node in _copies(programs, "view_3"):
        bypass(node)


@broken("mixtral", r"copy_to_tp_3.*of copy_to_tp.*, each rank has a term of its gradient: .* added up over tp twice")
def tokens_of_experts_added_up_twice(programs: Programs) -> None:
    for node in _copies(programs, "view_3"):
        again = add_after(node, copy_to_tp, node.args, node.kwargs)
        node.args = (again,)
        again.append(node)


@broken("mixtral", r"reads the whole of to_10 and computes a part: .* nothing adds them up")
def weights_of_routes_not_added_up(programs: Programs) -> None:
    for node in _copies(programs, "truediv"):
        bypass(node)


@broken("mixtral", r"rank 1 .*reads the whole of view_3 and computes a part")
def tokens_not_added_up_on_one_rank(programs: Programs) -> None:
    bypass(_copies(programs, "view_3")[1])


@broken("mixtral", r"rank 1 .*adds up the gradient of .*, where rank 0 adds up that of")
def tokens_and_routes_in_another_order(programs: Programs) -> None:
    """Nothing is wrong on any one rank."""
    late, early = _copies(programs, "truediv")[1], _copies(programs, "view_3")[1]
    late.append(early)


@broken("mixtral", r"copy_to_tp.*takes what is a sum that is still owed over tp \(P\), and is for whole tensors")
def sum_of_experts_added_up_again_backward(programs: Programs) -> None:
    """The gradient of a sum is the whole one of each term: copied, it would be counted twice."""
    for program in programs:
        total = next(n for n in calls(program, all_reduce) if "index_add" in n.args[0].name)
        again = add_after(total.args[0], copy_to_tp, (total.args[0],), {"axis": "tp"})
        total.args = (again,)


@broken("deepseek_v2", r"reads the whole of .* and computes a part: .* nothing adds them up")
def rows_that_are_split_not_added_up(programs: Programs) -> None:
    for program in programs:
        rows = next(n for n in program.graph_module.graph.nodes if n.target is join_own_rows).args[0][0]
        while rows.target is not copy_to_tp:
            rows = next(a for a in rows.all_input_nodes if node_meta.val(a) is not None and a.op != "get_attr")
        bypass(rows)


def _with_sum(programs: Programs, source: str, ranks: tuple[int, ...], shape: tuple[int, ...]) -> None:
    holders = tuple((rank, source) for rank in ranks)
    new = GradSum(source, tuple((0, n) for n in shape), holders, tuple(dict.fromkeys(holders)))
    for program in programs:
        if program.rank in ranks:
            program.grad_sums = (*(program.grad_sums or ()), new)


_FIRST = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
_ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


@broken("mixtral", rf"names {_FIRST} on rank 1, which gets no gradient of it")
def sum_with_a_rank_that_has_not_the_expert(programs: Programs) -> None:
    _with_sum(programs, _FIRST, (0, 1), (44, 48))


@broken("mixtral", r"experts.0.w1.weight .* has what rank 0 has of it .* 2 times")
def gradient_of_an_expert_counted_twice(programs: Programs) -> None:
    _with_sum(programs, _FIRST, (0, 0), (44, 48))


@broken("mixtral", r"gate.weight .* has what stage 0 has of it .* 2 times")
def gradient_of_the_router_counted_twice(programs: Programs) -> None:
    """It is whole on both ranks: what the experts say of the routes was added up before."""
    _with_sum(programs, _ROUTER, (0, 1), (4, 48))


@broken("dbrx", r"added up on rank 1 .*which does not hold")
def sum_over_experts_of_another_rank(programs: Programs) -> None:
    """Each rank has its own experts' rows of the weight."""
    name = "transformer.blocks.0.ffn.experts.mlp.w1"
    _with_sum(programs, name, (0, 1), programs[0].param_shards[name].shape)


@pytest.mark.parametrize(("family", "change", "message"), CASES)
def test_broken_programs_are_refused(family: str, change: Break, message: str) -> None:
    skip_one_node(_compiled(family))
    programs = _emitted(family)
    _check(programs, family)
    change(programs)
    for program in programs:
        program.graph_module.graph.lint()
    with pytest.raises(VerificationError) as caught:
        _check(programs, family)
    assert re.search(message, str(caught.value)), str(caught.value)


class Scaled(nn.Module):
    """Four experts, each on rows of its own; the first two have one scale."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(4))
        self.scale, self.shared = nn.Parameter(torch.randn(8)), shared

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = x.view(-1, 8)
        total = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            own = torch.arange(i, i + 3, device=x.device)
            scale = self.scale if i < 2 or not self.shared else self.scale.detach()
            total = total.index_add(0, own, expert(rows[own]) * scale)
        return {"y": total.view(x.shape)}


@pytest.mark.parametrize("shared", [False, True])
def test_gradient_of_an_input_that_some_experts_read_is_right(shared: bool) -> None:
    """A scale of all is added up by all ranks; of two experts on one rank, the other rank would not take part."""
    _, plan = check_and_plan(Scaled(shared), 8, 2)
    assert any(p.placement.is_owned for p in plan.params) is not shared
