"""Checks experts dealt whole to ranks: every term of a sum is added by one rank, the one that has what it is made of.

A rank's sum may leave out what the plan has on another rank, and nothing else: its next term, or what takes the sum,
has to read the model's sum before it but for such terms. So, over all ranks, each term is added once.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from cost_model.graph.op_graph import Op, TensorRef
from passes.ops.data_dependent import join_own_rows
from passes.verify.core.held import PARTIAL, WHOLE, Held, elements
from passes.verify.core.meta_shapes import Tensor
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankState, Value, named
from passes.verify.nodes.derive import check_shape

_ADDS = ("index_add",)  # their result is their first input and something added to it


def check_owner(state: RankState, node: Node, op: Op) -> None:
    """Checks that an op of another rank's expert has no node here."""
    owner = state.plan.op(op.name).owner
    if owner not in (None, state.program.tp_rank):
        fail(state.program, node, f"is computed here, and belongs to tp rank {owner} alone")


# -- sums --------------------------------------------------------------------------------------------------------------


def passed_over(state: RankState, found: TensorRef, wanted: TensorRef) -> bool:
    """Returns whether all ops that make `wanted` out of `found` are other ranks' terms."""
    while wanted != found:
        op = state.graph.ops[wanted.op]
        if not _is_elsewhere(state, op.name):
            return False
        wanted = op.inputs[0]
    return True


def with_terms_elsewhere(state: RankState, ref: TensorRef) -> TensorRef:
    """Returns the sum that a sum still owed stands for when the terms that other ranks add next are counted in."""
    while True:
        users = state.graph.users.get(ref, ())
        if len(users) != 1 or users[0][1] != 0 or not _is_elsewhere(state, users[0][0]):
            return ref
        ref = TensorRef(users[0][0])


def _is_elsewhere(state: RankState, op: str) -> bool:
    plan = state.plan.op(op) if state.plan.has_op(op) else None
    return plan is not None and plan.is_term and plan.kind in _ADDS and plan.owner != state.program.tp_rank


def is_term(state: RankState, op: Op) -> bool:
    """Returns whether an op adds an expert's term to a sum."""
    return op.kind in _ADDS and state.plan.op(op.name).is_term


def term(state: RankState, node: Node, op: Op, types: tuple[Held, ...]) -> None:
    """Checks x + term: x is a sum owed by all; what is added to it is here, whole, and so is nothing of it on
    another rank."""
    here = all(map(state.has_whole, types[1:]))
    if types[0] != PARTIAL or not here or state.planned(op) != (PARTIAL,):
        lie = ", ".join(f"{named(r)} is {t}" for r, t in zip(op.inputs, types, strict=True))
        fail(state.program, node, f"adds one rank's term to a sum that all owe: {lie}")


def joined(state: RankState, node: Node, op: Op) -> None:
    """Checks join_own_rows: the pieces that are this rank's, at their place; all others are other ranks'."""
    pieces, _, counts, first = node.args
    plan, rank = state.plan.op(op.name), state.program.tp_rank
    own = [i for i, placement in enumerate(plan.inputs) if placement.is_owned and placement.dim == rank]
    given = [state.value(node, piece) for piece in pieces]
    if [v.ref for v in given] != [op.inputs[i] for i in own] or any(v.held.owner != rank for v in given):
        fail(state.program, node, f"joins {[named(v.ref) for v in given]}, and has pieces {own} of its own")
    dealt = all(placement.is_owned for placement in plan.inputs[:-1])
    if not dealt or own != list(range(first, first + len(own))) or state.planned(op) != (PARTIAL,):
        fail(state.program, node, f"puts pieces {own} at the place of number {first}")
    lengths = state.value(node, counts)
    if lengths != Value(op.inputs[-1], WHOLE):
        fail(state.program, node, f"counts rows by {named(lengths.ref)}, which is {lengths.held}")
    value = Value(TensorRef(op.name), PARTIAL)
    check_shape(state, node, state.local(value))
    state.set(node, value)


def is_joined(node: Node) -> bool:
    """Returns whether a node is join_own_rows."""
    return node.op == "call_function" and node.target is join_own_rows


# -- weights -----------------------------------------------------------------------------------------------------------


def picks_own(state: RankState, op: Op, types: tuple[Held, ...]) -> bool:
    """Returns whether x[3] takes an element of a weight whose elements are dealt out: one rank has element 3, and
    takes it."""
    picks: tuple[tuple[int, int], ...] = op.attrs.get("picks", ()) if op.kind == "slice" else ()
    return len(picks) == 1 and types[0].is_sharded and types[0].dim == picks[0][0]


def part_elsewhere(state: RankState, op: Op, part: Value) -> Tensor | None:
    """Returns the shape here of a part of a split that is another rank's: no elements."""
    if op.kind != "split" or part.held.owner in (-1, state.program.tp_rank):
        return None
    whole, dim = state.graph.spec(part.ref), op.attrs["dim"]
    return Tensor(((*whole.shape[:dim], 0, *whole.shape[dim + 1 :]), getattr(torch, whole.dtype)))


def check_pick(state: RankState, node: Node, op: Op, lies: Held, picks: tuple[tuple[int, int], ...]) -> None:
    """Checks the number of the element that x[3] takes, among those that the rank has."""
    (dim, index), (own_dim, at) = op.attrs["picks"][0], picks[0]
    own = elements(lies, state.graph.spec(op.inputs[0]).shape[dim])
    if own_dim != dim or at >= len(own) or own[at] != index:
        fail(
            state.program, node, f"takes element {at} of its share of dim {dim}, and the model {index}",
            untouched=Duty.SIZES,
        )  # fmt: skip
    if state.planned(op) != (Held(owner=state.program.tp_rank),):
        fail(
            state.program, node, f"takes what is its own alone, and the plan says {state.planned(op)[0]}",
            untouched=Duty.SIZES,
        )  # fmt: skip
