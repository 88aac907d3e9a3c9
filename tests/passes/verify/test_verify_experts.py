"""verify: programs of experts dealt to ranks that are broken on purpose are refused, with the rank and the reason."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.errors import VerificationError
from cost_model.graph.placement import Placement, owned
from passes.fx.arguments import place
from passes.ops.data_dependent import join_own_rows
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.verify import verify
from tests.support.moe import FOUR, skip_one_node, tiny_moe_model

Programs = list[RankProgram]


@functools.cache
def _compiled(family: str) -> CompiledModel:
    model = tiny_moe_model(family, num_hidden_layers=1, **FOUR)
    return adx.compile(model, tp=2, use_cache=True, verify=False)


def _emitted(family: str) -> Programs:
    made = _compiled(family)
    kinds = made.main.traced.layer_kinds
    return [emit_rank(made.graph, made.plan, rank, layer_kinds=kinds) for rank in range(2)]


def _check(programs: Programs, family: str) -> None:
    made = _compiled(family)
    verify(programs, made.plan, made.op_graph, made.graph)


def _terms(program: RankProgram) -> list[Node]:
    return [n for n in program.graph_module.graph.nodes if str(n.target) == "index_add"]


def term_lost(programs: Programs) -> None:
    """An expert whose result nobody adds."""
    node = _terms(programs[1])[0]
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def last_term_lost(programs: Programs) -> None:
    node = _terms(programs[0])[-1]
    node.replace_all_uses_with(node.args[0])
    node.graph.erase_node(node)


def term_added_twice(programs: Programs) -> None:
    node = _terms(programs[0])[0]
    with node.graph.inserting_after(node):
        again = node.graph.node_copy(node)
    node.replace_all_uses_with(again)
    again.args = (node, *again.args[1:])


def term_of_another_expert(programs: Programs) -> None:
    """One expert's tokens, another's result."""
    first, second = _terms(programs[0])
    second.args = (*second.args[:3], first.args[3])


def expert_owned_twice(programs: Programs) -> None:
    """Rank 1 holds a weight of rank 0's experts, too."""
    name, shard = next((n, s) for n, s in programs[0].param_shards.items() if ".experts.0." in n)
    parameter = torch.nn.Parameter(torch.empty(shard.local_shape, dtype=torch.float64, device="meta"))
    place(programs[1].graph_module, name, parameter)
    programs[1].param_shards[name] = shard  # type: ignore[index]


def expert_owned_by_nobody(programs: Programs) -> None:
    """Rank 0 has an expert's node, and no weight for it."""
    name = next(n for n in programs[0].param_shards if ".experts.0." in n)
    del programs[0].param_shards[name]  # type: ignore[attr-defined]
    module, _, parameter = name.rpartition(".")
    delattr(programs[0].graph_module.get_submodule(module), parameter)


def expert_cut_inside(programs: Programs) -> None:
    name, shard = next((n, s) for n, s in programs[0].param_shards.items() if ".experts.0." in n)
    half = dataclasses.replace(shard, dim=0, intervals=((0, shard.shape[0] // 2),))
    programs[0].param_shards[name] = half  # type: ignore[index]
    place(programs[0].graph_module, name, torch.nn.Parameter(torch.empty(half.local_shape, device="meta").double()))


def joined_at_a_wrong_place(programs: Programs) -> None:
    node = next(n for n in programs[1].graph_module.graph.nodes if n.target is join_own_rows)
    node.args = (*node.args[:3], 0)


def a_piece_not_joined(programs: Programs) -> None:
    node = next(n for n in programs[1].graph_module.graph.nodes if n.target is join_own_rows)
    node.args = (node.args[0][:1], *node.args[1:])


def another_experts_part(programs: Programs) -> None:
    """Rank 1's second expert is given the weights of its first."""
    nodes = [n for n in programs[1].graph_module.graph.nodes if n.args[1:] and n.args[1] == (1,)]
    for node in nodes:
        node.args = (node.args[0], (0,))
    assert nodes


CASES = [
    ("mixtral", term_lost, r"rank 1 .*index_add__3.*input 0 is zeros where the model's op reads index_add__2"),
    ("mixtral", last_term_lost, r"rank 0 .*input 0 is index_add_ where the model's op reads index_add__3"),
    ("mixtral", term_added_twice, r"index_add.*(stands for no op|input 0 is|belongs to tp rank 1 alone)"),
    ("mixtral", term_of_another_expert, r"index_add.*input 2 is"),
    ("mixtral", expert_owned_twice, r"belongs whole to tp rank 0 of stage 0 alone"),
    ("mixtral", expert_owned_by_nobody, r"no rank of stage 0 holds .*experts\.0\."),
    ("mixtral", expert_cut_inside, r"belongs whole to tp rank 0|share of"),
    ("deepseek_v2", joined_at_a_wrong_place, r"puts pieces \[2, 3\] at the place of number 0"),
    ("deepseek_v2", a_piece_not_joined, r"joins .*, and has pieces \[2, 3\] of its own"),
    ("granitemoe", another_experts_part, r"takes element 0 of its share of dim 0, and the model 3"),
]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "granitemoe"])
def test_right_programs_pass(family: str) -> None:
    _check(_emitted(family), family)


@pytest.mark.parametrize(("family", "change", "message"), CASES, ids=lambda v: getattr(v, "__name__", None))
def test_broken_programs_are_refused(family: str, change: Callable[[Programs], None], message: str) -> None:
    skip_one_node(_compiled(family))
    programs = _emitted(family)
    change(programs)
    with pytest.raises(VerificationError, match=message):
        _check(programs, family)


def test_a_plan_that_gives_an_expert_to_another_rank_fits_no_program() -> None:
    """Its node is on rank 0, and the plan says rank 1."""
    made, programs = _compiled("mixtral"), _emitted("mixtral")
    skip_one_node(made)

    def moved(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
        return tuple(owned(1 - p.dim) if p.is_owned else p for p in placements)

    ops = tuple(
        dataclasses.replace(op, inputs=moved(op.inputs), outputs=moved(op.outputs)) for op in made.plan.ops
    )
    with pytest.raises(VerificationError, match="is computed here, and belongs to tp rank 1 alone"):
        verify(programs, dataclasses.replace(made.plan, ops=ops), made.op_graph, made.graph)
