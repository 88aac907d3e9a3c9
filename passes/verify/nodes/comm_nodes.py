"""Checks comm nodes: what they take must be what they are for, and what they give is known from what was sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.ops import comm as comm_ops
from passes.ops.losses import widened
from passes.ops.parallel_layers import one_gradient
from passes.verify.core.held import PARTIAL, WHOLE, held
from passes.verify.core.messages import message
from passes.verify.core.meta_shapes import Tensor
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankState, Sent, Value, named


def _all_reduce(state: RankState, node: Node) -> None:
    value = state.value(node, node.args[0])
    if value.held != PARTIAL:
        fail(
            state.program, node,
            f"adds up {node.args[0].name} over the ranks, which is {value.held}: nothing is owed",
        )  # fmt: skip
    state.facts.collectives.append((node, value.ref))
    state.set(node, Value(value.ref, WHOLE))


def _all_gather(state: RankState, node: Node) -> None:
    value = state.value(node, node.args[0])
    dim, parts = argument(node, 2, "dim"), argument(node, 3, "parts")
    shape = state.graph.spec(value.ref).shape
    if not 0 <= dim < len(shape) or len(parts) != state.program.mesh.tp:
        fail(state.program, node, f"glues {len(parts)} parts along dim {dim} of {list(shape)}")
    own = held(dim, [(a, b) for a, b in parts[state.program.tp_rank]], shape[dim])
    if value.held != own or value.held.partial:
        fail(
            state.program, node,
            f"is told that {node.args[0].name} is {own} on this rank, and it is {value.held}",
        )  # fmt: skip
    covered = np.zeros(shape[dim], dtype=bool)
    for part in parts:
        for start, stop in part:
            covered[start:stop] = True
    if not covered.all():
        fail(state.program, node, f"element {int(np.argmin(covered))} of dim {dim} is in no rank's part")
    state.facts.collectives.append((node, value.ref))
    state.set(node, Value(value.ref, WHOLE))


def _log_sum_exp(state: RankState, node: Node) -> None:
    """Checks that ranks tell each other of the dim that is sharded. What comes is no tensor of the model: same_op.py
    checks that the loss of the same scores reads it, and groups.py that the ranks' parts are all of the dim."""
    value = state.value(node, node.args[0])
    dim, ranks = argument(node, 2, "dim"), argument(node, 3, "ranks")
    if value.held.dim != dim or ranks != state.program.mesh.tp:
        fail(
            state.program, node,
            f"sums over dim {dim} on {ranks} ranks, and {node.args[0].name} is {value.held} on "
            f"{state.program.mesh.tp}",
        )  # fmt: skip
    shape, dtype = state.local(value)
    state.facts.collectives.append((node, value.ref))
    state.known[node] = Tensor(((*shape[:dim], *shape[dim + 1 :]), widened(torch.empty((), dtype=dtype)).dtype))


def _send(state: RankState, node: Node) -> None:
    value = state.value(node, node.args[0])
    key = message(state.program, node)
    hop = state.tools.hop(key[2])
    if value.ref != TensorRef(hop.op, hop.index):
        fail(
            state.program, node,
            f"sends {named(value.ref)} on channel {key[2]}, where the plan sends "
            f"{named(TensorRef(hop.op, hop.index))}",
        )  # fmt: skip
    if hop.whole and value.held != WHOLE:
        fail(
            state.program, node,
            f"sends what is {value.held}, and the plan sends the whole of it: the receiver would take it for that",
            missing=Duty.COLLECTIVES,
        )  # fmt: skip
    if not hop.whole and value.held != state.planned(state.graph[hop.op])[hop.index]:
        fail(state.program, node, f"sends what is {value.held}, and the plan says otherwise", missing=Duty.COLLECTIVES)
    state.tools.sent[key] = Sent(value, state.local(value), node)


def _recv(state: RankState, node: Node) -> None:
    key = message(state.program, node)
    sent = state.tools.sent.get(key)
    if sent is None:
        fail(state.program, node, f"comes from rank {key[0]}, which is in no earlier stage")
    shape, symbols = argument(node, 0, "shape"), state.graph.spec(sent.value.ref).symbols
    if len(shape) != len(sent.local[0]):
        fail(state.program, node, f"waits for {len(shape)} dims, and {sent.local} comes")
    for dim, (size, comes) in enumerate(zip(shape, sent.local[0], strict=True)):
        symbol = symbols[dim] if symbols else ""
        if size is None and symbol.startswith("?"):
            continue  # the sender says it: messages.py has checked that
        if isinstance(size, Node) != bool(symbol):
            fail(
                state.program, node,
                f"dim {dim} of what comes is {symbol or comes}, and this waits for {size}: "
                + ("that follows the inputs" if symbol else "that is constant"),
            )  # fmt: skip
        waits = state.known[size] if isinstance(size, Node) else size
        if waits != comes:
            fail(
                state.program, node,
                f"waits for {waits} elements in dim {dim}, and rank {key[0]} sends {sent.local} ({sent.node.name})",
            )  # fmt: skip
    if argument(node, 1, "dtype") != sent.local[1]:
        fail(state.program, node, f"waits for {argument(node, 1, 'dtype')}, and {sent.local} comes")
    state.set(node, sent.value)


def _same(state: RankState, node: Node) -> None:
    """Passes the value on: forward nothing is done; gradients/contributions.py says whether anything is right
    backward."""
    value = state.value(node, node.args[0])
    if value.held != WHOLE:
        fail(state.program, node, f"takes what is {value.held}, and is for whole tensors")
    state.set(node, value)


EXCHANGES: dict[Any, Callable[[RankState, Node], None]] = {
    comm_ops.all_reduce: _all_reduce,
    comm_ops.all_gather: _all_gather,
    comm_ops.log_sum_exp: _log_sum_exp,
    comm_ops.send: _send,
    comm_ops.recv: _recv,
    comm_ops.copy_to_tp: _same,
    one_gradient: _same,
}
