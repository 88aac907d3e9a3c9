"""Mutations of a layer of experts that is one node: which experts a rank runs, what is inside of each, whose bias is
added, and what is added up backward."""

from __future__ import annotations

import random
from typing import Any

from torch.fx import Node

from passes.ops.comm import copy_to_tp
from passes.ops.experts import GATE_OPS, PARTS, experts, is_gate
from passes.program.rank_program import RankProgram
from tests.mutations.mutation import NotHere, mutation, on_ranks, pick, pick_node, said
from tests.support.graphs.broken_programs import Programs, bypass, with_argument, with_slice

_DOWN_BIAS, _GATE, _PARTS, _COUNT, _HELD = 6, 7, 8, 10, 11  # positions among the node's arguments


def _is_node(node: Node) -> bool:
    return node.target is experts


def _dealt(programs: Programs, rng: random.Random) -> tuple[RankProgram, Node, Any]:
    """Returns a rank that has some of the experts, its node, and other experts, as many."""
    program, node = pick_node(programs, rng, lambda n: _is_node(n) and len(n.args) > _HELD and bool(n.args[_HELD]))
    number, own = sum(b - a for a, b in node.args[_HELD]), tuple(node.args[_HELD])
    starts = [s for s in range(node.args[_COUNT] - number + 1) if ((s, s + number),) != own]
    start = pick(rng, starts)
    return program, node, ((start, start + number),)


@mutation
def other_experts_run(programs: Programs, rng: random.Random) -> str:
    """With the weights that the rank has."""
    program, node, others = _dealt(programs, rng)
    with_argument(node, _HELD, others)
    return f"{node.name} on rank {program.rank}: {others}"


@mutation
def other_experts_held_and_run(programs: Programs, rng: random.Random) -> str:
    """Some are then run twice, others by nobody."""
    program, node, others = _dealt(programs, rng)
    with_argument(node, _HELD, others)
    for tensor in node.args[3:_GATE]:
        if tensor is not None:
            with_slice(program, str(tensor.target), others)
    return f"{node.name} on rank {program.rank}: {others}"


@mutation
def gate_of_experts_changed(programs: Programs, rng: random.Random) -> str:
    """Another step, or gate and up as another model's lie."""
    program, node = pick_node(programs, rng, lambda n: _is_node(n) and bool(n.args[_GATE]))
    gate, parts = list(node.args[_GATE]), node.args[_PARTS]
    if rng.random() < 0.3:
        parts = pick(rng, [p for p in PARTS if p != parts and is_gate(tuple(gate), p)])
    else:
        at = rng.randrange(len(gate))
        names = [n for n in GATE_OPS if n != gate[at][0] and is_gate(((n, *gate[at][1:]),), "halves")]
        if any(isinstance(a, str) and a.startswith("%") for a in gate[at]):
            names = [n for n in ("tanh", "exp", "neg", "add", "mul") if n != gate[at][0]]
        changed = (pick(rng, names), *gate[at][1:])
        gate[at] = changed
        if not is_gate(tuple(gate), parts):
            raise NotHere
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        with_argument(n, _GATE, tuple(gate))
        with_argument(n, _PARTS, parts)
    return f"{said(places)}: {gate} {parts}"


@mutation
def bias_of_experts_left_out(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: _is_node(n) and n.args[_DOWN_BIAS] is not None)
    with_argument(node, _DOWN_BIAS, None)
    return f"{node.name} on rank {program.rank}"


@mutation
def gradient_of_tokens_or_router_lost(programs: Programs, rng: random.Random) -> str:
    """A sum is left out: what the ranks' experts say of the rows that come in, or of their weights, is not added up."""

    def copy(node: Node, argument: int) -> Node | None:
        found = node.args[argument]
        while found.target is not copy_to_tp:
            if not found.args or not isinstance(found.args[0], Node):
                return None
            found = found.args[0]
        return found

    argument = rng.choice([0, 2])
    program, node = pick_node(programs, rng, lambda n: _is_node(n) and copy(n, argument) is not None)
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        behind = copy(n, argument)
        if behind is not None:
            bypass(behind)
    return f"{said(places)}: of input {argument}"
