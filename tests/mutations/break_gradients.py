"""Mutations of what a backward pass owes: copies whose gradients are added up, sums of parameters' gradients, what
is sent back."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from torch.fx import Node

from passes.fx import node_meta
from passes.fx.differentiable import differentiable
from passes.ops.comm import all_gather, all_reduce, copy_to_tp, recv, send
from passes.ops.parallel_layers import one_gradient
from passes.program.gradient_sums import GradSum
from passes.program.rank_program import RankProgram
from tests.mutations.mutation import mutation, on_ranks, pick, pick_node, said
from tests.support.graphs.broken_programs import Programs, add_after, bypass, with_keyword


def _is(*targets: Any) -> Any:
    return lambda n: n.op == "call_function" and n.target in targets


@mutation
def copy_to_tp_missing(programs: Programs, rng: random.Random) -> str:
    """As before: forward nothing changes."""
    places = on_ranks(programs, *pick_node(programs, rng, _is(copy_to_tp)), rng)
    for _program, node in places:
        bypass(node)
    return said(places)


@mutation
def copy_to_tp_doubled(programs: Programs, rng: random.Random) -> str:
    places = on_ranks(programs, *pick_node(programs, rng, _is(copy_to_tp)), rng)
    for _program, node in places:
        again = add_after(node, copy_to_tp, (node,), dict(node.kwargs))
        node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)
    return said(places)


@mutation
def copy_to_tp_that_one_reader_passes_by(programs: Programs, rng: random.Random) -> str:
    program, node = pick_node(programs, rng, lambda n: n.target is copy_to_tp and len(n.users) > 1)
    reader = pick(rng, list(node.users)).name
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        for user in list(n.users):
            if user.name == reader:
                user.replace_input_with(n, n.args[0])
    return f"{said(places)}: {reader}"


@mutation
def copy_to_tp_where_none_is_owed(programs: Programs, rng: random.Random) -> str:
    """Copies a value whose gradient is whole, or a term already: before a norm, a residual."""
    if programs[0].mesh.tp == 1 or programs[0].grad_sums is None:
        pick(rng, [])
    program = pick(rng, programs)
    needs = differentiable(program.graph_module, lambda n: n.target is recv)
    nodes = [
        n for n in needs
        if n.op in ("call_module", "call_function") and n.target not in (copy_to_tp, recv) and n.users
    ]  # fmt: skip
    node = pick(rng, sorted(nodes, key=lambda n: n.name))
    places = on_ranks(programs, program, node, rng)
    for _program, n in places:
        if not hasattr(node_meta.val(n), "shape"):
            pick(rng, [])
        new = add_after(n, copy_to_tp, (n,), {"axis": "tp"})
        n.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    return said(places)


@mutation
def one_gradient_missing(programs: Programs, rng: random.Random) -> str:
    """Forward nothing changes; each rank of the group then counts the whole gradient as its own term."""
    places = on_ranks(programs, *pick_node(programs, rng, _is(one_gradient)), rng)
    for _program, node in places:
        bypass(node)
    return said(places)


@mutation
def one_gradient_for_another_rank(programs: Programs, rng: random.Random) -> str:
    """Nobody has the gradient, or several do."""
    program, node = pick_node(programs, rng, _is(one_gradient))
    places = on_ranks(programs, program, node, rng)
    shift = rng.randrange(1, program.mesh.tp)
    for one, n in places:
        with_keyword(n, tp_rank=(one.tp_rank + shift) % program.mesh.tp)
    return said(places)


@mutation
def one_gradient_where_each_rank_has_all_of_it(programs: Programs, rng: random.Random) -> str:
    """Behind a sum over ranks: all but the first lose it."""
    if programs[0].grad_sums is None:
        pick(rng, [])
    places = on_ranks(programs, *pick_node(programs, rng, _is(all_reduce, all_gather)), rng)
    for program, n in places:
        new = add_after(n, one_gradient, (n,), {"tp_rank": program.tp_rank})
        n.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
    return said(places)


@mutation
def gradient_not_sent_back(programs: Programs, rng: random.Random) -> str:
    """By one side, or by both."""
    program, node = pick_node(programs, rng, lambda n: n.target in (send, recv) and bool(n.kwargs.get("gradient")))
    both, channel = rng.random() < 0.5, node.kwargs["channel"]
    nodes: list[Node] = [node]
    if both:
        nodes = [
            n for p in programs for n in p.graph_module.graph.nodes
            if n.target in (send, recv) and n.kwargs["channel"] == channel
        ]  # fmt: skip
    for n in nodes:
        with_keyword(n, gradient=False)
    return f"channel {channel}, {'both sides' if both else f'rank {program.rank}'}"


# -- sums of parameters' gradients -------------------------------------------------------------------------------------


def _sum(programs: Programs, rng: random.Random) -> GradSum:
    return pick(rng, list(dict.fromkeys(s for p in programs for s in p.grad_sums or ())))  # type: ignore[no-any-return]


def _replace(programs: list[RankProgram], old: GradSum, new: tuple[GradSum, ...]) -> None:
    for p in programs:
        found: list[GradSum] = []
        for s in p.grad_sums or ():
            found += [n for n in new if p.rank in n.ranks] if s == old else [s]
        p.grad_sums = tuple(found)


@mutation
def gradient_sum_missing(programs: Programs, rng: random.Random) -> str:
    old = _sum(programs, rng)
    ranks = programs if rng.random() < 0.85 else [programs[pick(rng, list(old.ranks))]]
    _replace(ranks, old, ())
    return f"{old.source} on {len(ranks)} ranks"


@mutation
def gradient_summed_twice(programs: Programs, rng: random.Random) -> str:
    """One of its terms is added once more."""
    old = _sum(programs, rng)
    again = pick(rng, list(old.terms))
    _replace(programs, old, (dataclasses.replace(old, terms=(*old.terms, again)),))
    return f"{old.source}, rank {again[0]} again"


@mutation
def gradient_sum_without_one_of_its_terms(programs: Programs, rng: random.Random) -> str:
    old = _sum(programs, rng)
    lost = pick(rng, old.terms)
    _replace(programs, old, (dataclasses.replace(old, terms=tuple(t for t in old.terms if t != lost)),))
    return f"{old.source}, without rank {lost[0]}"


@mutation
def gradient_sum_of_fewer_elements(programs: Programs, rng: random.Random) -> str:
    old = _sum(programs, rng)
    dim = pick(rng, [d for d, (a, b) in enumerate(old.box) if b - a > 1])
    a, b = old.box[dim]
    _replace(programs, old, (dataclasses.replace(old, box=(*old.box[:dim], (a + 1, b), *old.box[dim + 1 :])),))
    return f"{old.source}, dim {dim}"
