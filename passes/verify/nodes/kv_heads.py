"""Checks KV heads that several query heads read: repeated by an op, picked one by one, or repeated inside attention.

Copies of a head are equal, so that the same numbers may stand for different elements of the whole. Here it is checked
that each is a copy of the right one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import Op
from cost_model.rules.rule import IntArray
from passes.fx.arguments import argument, fetch
from passes.fx.nodes import op_name
from passes.verify.core.held import Derivation, Held, elements, held_sequence
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankState, Value, named
from passes.verify.nodes.derive import derived


def picked(state: RankState, node: Node, lies: Held, size: int, dim: int) -> IntArray:
    """Returns the elements of the whole tensor that an index_select takes from this rank's share of it."""
    index = argument(node, 2, "index")
    constant = fetch(state.module, str(index.target)) if isinstance(index, Node) and index.op == "get_attr" else None
    own = elements(lies, size)
    if not isinstance(constant, torch.Tensor) or constant.is_meta or argument(node, 1, "dim") != dim:
        fail(state.program, node, f"must take constant elements of dim {dim}", untouched=Duty.SIZES)
    places = constant.cpu().numpy()
    if len(places) and (places.min() < 0 or places.max() >= len(own)):
        fail(state.program, node, f"takes elements {places.tolist()} of {len(own)}", untouched=Duty.SIZES)
    return own[places]


def repeated(state: RankState, node: Node, op: Op, lies: Held, expected: Held) -> Derivation:
    """Checks repeat_interleave of what the rank holds. Its copies are equal, so that the same numbers may stand for
    other elements of the whole: the plan says for which, and it is checked that each is the right one's copy."""
    _, (shape,), (out,) = state.tools.rule(op)
    dim = int(op.attrs["dim"])
    if lies.partial or (lies.is_sharded and lies.dim != dim):
        return derived(state, node, op, (lies,), (expected,))
    if expected.partial or (expected.is_sharded and expected.dim != dim):
        fail(
            state.program, node, f"its input is {lies}, and the plan says that its output is {expected}",
            untouched=Duty.SIZES,
        )  # fmt: skip
    if op_name(node) == "index_select":
        copies = picked(state, node, lies, shape[dim], dim)
    else:
        copies = np.repeat(elements(lies, shape[dim]), argument(node, 1, "repeats"))
    claimed = elements(expected, out[dim])
    if not np.array_equal(copies, claimed // (out[dim] // shape[dim])):
        fail(
            state.program, node,
            f"gives copies of elements {copies.tolist()}, where {expected} are copies of "
            f"{(claimed // (out[dim] // shape[dim])).tolist()}",
            untouched=Duty.SIZES,
        )  # fmt: skip
    return Derivation((expected,))


def repeated_in_attention(state: RankState, node: Node, op: Op, slot: int, value: Value, query: Value) -> Held:
    """Checks keys or values that attention itself repeats (fuse_ops): as if they had been repeated before."""
    wanted = op.inputs[slot]
    repeat = state.graph[wanted.op]
    size = state.graph.spec(value.ref).shape[-3] if len(state.graph.spec(value.ref).shape) > 2 else 0
    shape = state.graph.spec(wanted).shape
    head = len(shape) - 3
    if repeat.kind != "repeat_interleave" or repeat.inputs[0] != value.ref or repeat.attrs["dim"] != head:
        fail(
            state.program, node,
            f"input {slot} is {named(value.ref)} where the model's op reads {named(wanted)}",
            inputs=True,
        )  # fmt: skip
    if not argument(node, 7, "enable_gqa", False):
        fail(
            state.program, node,
            f"takes heads of {named(value.ref)} that are not repeated, and does not repeat them",
            inputs=True,
        )  # fmt: skip
    if query.held.partial or value.held.partial or {query.held.dim, value.held.dim} - {-1, head}:
        fail(
            state.program, node, f"its queries are {query.held}, its input {slot} {value.held}",
            missing=Duty.COLLECTIVES,
        )  # fmt: skip
    heads = elements(query.held, shape[head])
    own = elements(value.held, size)
    reads = heads // (shape[head] // size)
    each, rest = divmod(len(heads), len(own)) if len(own) else (0, len(heads))
    if rest or not np.array_equal(np.repeat(own, each), reads):
        fail(
            state.program, node,
            f"its query heads {heads.tolist()} read heads {reads.tolist()} of input {slot}, which holds "
            f"{own.tolist()} here, each for {each} query heads",
            untouched=Duty.SIZES,
        )  # fmt: skip
    return held_sequence(head, heads, shape[head])
