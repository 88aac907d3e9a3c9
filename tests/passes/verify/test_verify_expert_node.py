"""verify: a layer of experts that is one node, to be trained: experts on the wrong rank, biases added twice or not at
all, another gate, and gradients of tokens and router that nobody adds up."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch.fx import Node

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.errors import VerificationError
from passes.fx import node_meta
from passes.ops.comm import copy_to_tp
from passes.ops.experts import experts
from passes.partition.pipeline import emit_rank
from passes.program.gradient_sums import GradSum
from passes.verify.verify import verify
from tests.support.graphs.broken_programs import Programs, add_after, bypass, calls, with_argument, with_slice
from tests.support.routed_lm import routed_lm

DEALT, INSIDE = "experts", "inner"
STACKS = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
HELD = 11  # position of the experts that a rank has, among the node's arguments


@functools.cache
def compiled(role: str) -> CompiledModel:
    return adx.compile(
        routed_lm(), tp=2, train=True, input_names=("input_ids", "labels"), pin={"experts": role}, verify=False
    )


def check(programs: Programs, role: str) -> None:
    made = compiled(role)
    verify(programs, made.plan, made.op_graph, made.graph)


def node_of(programs: Programs, rank: int) -> Node:
    return calls(programs[rank], experts)[0]


Break = Callable[[Programs], object]
CASES: list[object] = []


def broken(role: str, message: str) -> Callable[[Break], Break]:
    def register(change: Break) -> Break:
        CASES.append(pytest.param(role, change, message, id=change.__name__))
        return change

    return register


def copy_behind(programs: Programs, argument: int) -> list[Node]:
    """Returns the copy_to_tp that an argument of the node comes through, on each rank."""
    found = []
    for rank in range(len(programs)):
        node = node_of(programs, rank).args[argument]
        while node.target is not copy_to_tp:
            node = node.args[0]
        found.append(node)
    return found


# -- forward -----------------------------------------------------------------------------------------------------------


@broken(DEALT, r"rank 1 .*runs experts .*0:2.*, and holds the weights of .*2:4")
def experts_of_another_rank(programs: Programs) -> None:
    with_argument(node_of(programs, 1), HELD, ((0, 2),))


@broken(DEALT, r"experts\.gate_up_proj \[4, 24, 20\]: element 2 of dim 0 is on no rank")
def experts_with_their_weights_on_another_rank(programs: Programs) -> None:
    """Each rank does what it holds, and both hold the same."""
    for name in STACKS:
        with_slice(programs[1], f"experts.{name}", ((0, 2),))
    with_argument(node_of(programs, 1), HELD, ((0, 2),))


@broken(DEALT, r"experts\.down_proj ")
def one_tensor_of_another_expert(programs: Programs) -> None:
    with_slice(programs[1], "experts.down_proj", ((1, 2), (3, 4)))


@broken(DEALT, r"experts cannot be run here: .*gate_up_proj is S\(0\)")
def no_bias_of_dealt_experts(programs: Programs) -> None:
    with_argument(node_of(programs, 0), 6, None)


@broken(INSIDE, r"its bias is added on ranks \[\] instead of one")
def bias_added_by_nobody(programs: Programs) -> None:
    with_argument(node_of(programs, 0), 6, None)


@broken(INSIDE, r"its bias is added on ranks \[0, 1\] instead of one")
def bias_added_on_each_rank(programs: Programs) -> None:
    theirs, path = node_of(programs, 1), "experts.down_proj_bias"
    programs[1].param_shards[path] = programs[0].param_shards[path]  # type: ignore[index]
    bias = torch.empty_like(programs[0].graph_module.experts.down_proj_bias)
    programs[1].graph_module.experts.down_proj_bias = torch.nn.Parameter(bias)
    with theirs.graph.inserting_before(theirs):
        new = theirs.graph.get_attr(path)
    node_meta.copy(node_of(programs, 0).args[6], new)
    with_argument(theirs, 6, new)


@broken(INSIDE, r"gate_up_proj is not dealt as the plan says")
def halves_where_gate_and_up_take_turns(programs: Programs) -> None:
    """The rank has as many of each; the product with down adds up what does not belong together."""
    for name in ("gate_up_proj", "gate_up_proj_bias"):
        with_slice(programs[0], f"experts.{name}", ((0, 5), (10, 15)))
        with_slice(programs[1], f"experts.{name}", ((5, 10), (15, 20)))


@broken(INSIDE, r"has .*'gate'.* where the model has")
def another_gate(programs: Programs) -> None:
    gate = node_of(programs, 0).args[7]
    with_argument(node_of(programs, 0), 7, (("clamp", "up", -0.9, 0.8), *gate[1:]))


# -- backward ----------------------------------------------------------------------------------------------------------


@broken(DEALT, r"reads the whole of .* and computes a part: each rank has a term .* nothing adds them up")
def gradient_of_tokens_not_added_up(programs: Programs) -> None:
    for node in copy_behind(programs, 0):
        bypass(node)


@broken(DEALT, r"reads the whole of .* and computes a part: each rank has a term .* nothing adds them up")
def gradient_of_the_router_not_added_up(programs: Programs) -> None:
    """Each rank's experts have a term of the gradient of the routing weights."""
    for node in copy_behind(programs, 2):
        bypass(node)


@broken(INSIDE, r"rank 1 .*reads the whole of .* and computes a part")
def gradient_of_the_router_not_added_up_by_one_rank(programs: Programs) -> None:
    bypass(copy_behind(programs, 2)[1])


@broken(INSIDE, r"of copy_to_tp.*, each rank has a term of its gradient: .* added up over tp twice")
def gradient_of_the_router_added_up_twice(programs: Programs) -> None:
    for node in copy_behind(programs, 2):
        again = add_after(node, copy_to_tp, node.args, node.kwargs)
        node.args = (again,)
        again.append(node)


@broken(DEALT, r"router\.weight .* has what stage 0 has of it .* 2 times")
def gradient_of_the_router_summed_once_more(programs: Programs) -> None:
    """It is whole on both ranks: what the experts say of the routes was added up before."""
    holders = ((0, "router.weight"), (1, "router.weight"))
    for program in programs:
        program.grad_sums = (GradSum("router.weight", ((0, 4), (0, 24)), holders, holders),)


@broken(DEALT, r"experts\.down_proj .*rank")
def gradient_of_an_expert_summed_with_another_rank(programs: Programs) -> None:
    holders = ((0, "experts.down_proj"), (1, "experts.down_proj"))
    for program in programs:
        program.grad_sums = (GradSum("experts.down_proj", ((0, 2), (0, 10), (0, 24)), holders, holders),)


@pytest.mark.parametrize(("role", "change", "message"), CASES)
def test_broken_programs_are_refused(role: str, change: Break, message: str) -> None:
    made = compiled(role)
    programs = [emit_rank(made.graph, made.plan, rank, train=True) for rank in range(2)]
    check(programs, role)
    change(programs)
    for program in programs:
        program.graph_module.graph.lint()
    with pytest.raises(VerificationError) as caught:
        check(programs, role)
    assert re.search(message, str(caught.value)), str(caught.value)
