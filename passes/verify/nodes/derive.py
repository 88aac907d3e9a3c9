"""One step of the proof: what an op's rule allows, and whether its own arguments fit the shapes that follow."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import Op
from cost_model.rules.rule import OpRule
from passes.fx import node_meta
from passes.fx.arguments import argument, tensor_arguments
from passes.verify.core.held import WHOLE, Derivation, Held
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankState, named


def derived(state: RankState, node: Node, op: Op, types: tuple[Held, ...], expected: tuple[Held, ...]) -> Derivation:
    """Returns how the outputs lie, by the op's rule; the plan must say the same."""
    rule, ins, outs = state.tools.rule(op)
    judged = state.tools.judge(rule, ins, outs, types)
    for derivation in judged.derivations:
        if derivation.outputs == expected:
            return derivation
        if all(map(state.may_count_as, derivation.outputs, expected)):
            return Derivation(expected)
    if op.kind == "expand" and types[0] == WHOLE and _is_made(rule, expected[0]):
        return Derivation(expected)
    lie = ", ".join(f"{named(r)} is {t}" for r, t in zip(op.inputs, types, strict=False))
    if not judged.derivations:
        fail(state.program, node, f"{op.kind} cannot be run here: {lie}; {judged.reason}", missing=Duty.COLLECTIVES)
    out = ", ".join(map(str, judged.derivations[0].outputs))
    fail(
        state.program, node,
        f"its output is {out}, and the plan says {', '.join(map(str, expected))}; of its inputs {lie}",
        missing=Duty.COLLECTIVES,
    )  # fmt: skip


def _is_made(rule: OpRule, lies: Held) -> bool:
    """Returns whether a dim is cut that an op makes by repeating one element: then any part of it is so many of these,
    and check_shape counts them."""
    return any(not f.inputs and any(link.dim == lies.dim for link in f.outputs) for f in rule.factors)


def check_shape(state: RankState, node: Node, expected: Any) -> None:
    """Runs `node` on meta tensors of this rank's shapes; `expected` is what must come out."""
    if node.target in (torch.reshape, torch.broadcast_to):
        _check_lengths(state, node)
    try:
        found = state.tools.runner.run(state.program, node, state.known)
    except Exception as error:
        shapes = ", ".join(f"{a.name} {state.known[a]}" for a in tensor_arguments(node))
        fail(state.program, node, f"cannot be run on this rank's shapes ({shapes}): {error}", untouched=Duty.SIZES)
    if found != expected:
        fail(state.program, node, f"gives {found} on this rank, and its share is {expected}", untouched=Duty.SIZES)


def _check_lengths(state: RankState, node: Node) -> None:
    """Checks that a size which follows the inputs is not written as a number."""
    shape, symbols = argument(node, 1, "shape", argument(node, 1, "size")), node_meta.symbols(node)
    for size, symbol in zip(shape, symbols, strict=False):
        if symbol and type(size) is int and size >= 0:
            fail(
                state.program, node, f"its size {size} follows the inputs ({symbol}), and is a number here",
                untouched=Duty.SIZES,
            )  # fmt: skip
