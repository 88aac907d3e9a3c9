"""Checks nodes that our passes inserted: slices of whole tensors, selected heads, chains that fuse_ops made one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx
from torch.fx import Node
from torch.nn import functional as F

from cost_model.graph.op_graph import SOURCES, Op, OpGraph, TensorRef
from passes.fx.arguments import argument
from passes.ops.parallel_layers import one_term
from passes.verify.core.held import PARTIAL, WHOLE, held, held_sequence
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankState, Value, named
from passes.verify.nodes.derive import check_shape
from passes.verify.nodes.kv_heads import picked
from passes.verify.nodes.literals import check_eps


def helper(state: RankState, node: Node) -> None:
    """Checks a node that stands for no op of the model, a slice of a whole tensor, selected heads, or a fused chain,
    and sets its value. Raises VerificationError for all others."""
    if node.op == "call_function" and node.target is torch.narrow:
        value = state.value(node, node.args[0])
        _, dim, start, length = node.args
        size = state.local(value)[0][dim] if value.held == WHOLE else -1
        if value.held != WHOLE or not (type(start) is type(length) is int and 0 <= start <= start + length <= size):
            fail(state.program, node, f"cuts {start}:+{length} out of {named(value.ref)}: {value.held}")
        done = Value(value.ref, held(dim, ((start, start + length),), size))
    elif node.op == "call_function" and node.target is torch.cat:
        pieces = [state.value(node, n) for n in node.args[0]]
        dim = argument(node, 1, "dim", 0)
        if len({p.ref for p in pieces}) != 1 or any(p.held.partial or p.held.dim not in (-1, dim) for p in pieces):
            fail(state.program, node, "glues what are no pieces of one tensor")
        size = state.graph.spec(pieces[0].ref).shape[dim]
        runs = [run for p in pieces for run in (p.held.runs if p.held.is_sharded else ((0, size),))]
        done = Value(pieces[0].ref, held(dim, runs, size))
    elif node.op == "call_function" and node.target is torch.index_select:
        value = state.value(node, node.args[0])
        dim = argument(node, 1, "dim")
        if value.held.partial or value.held.dim not in (-1, dim):
            fail(state.program, node, f"picks elements of dim {dim} from what is {value.held}", untouched=Duty.SIZES)
        size = state.graph.spec(value.ref).shape[dim]
        done = Value(value.ref, held_sequence(dim, picked(state, node, value.held, size, dim), size))
    elif node.op == "call_function" and node.target is one_term:
        done = _one_term(state, node)
    elif node.op == "call_function" and node.target is F.rms_norm:
        done = _fused_norm(state, node)
    else:
        fail(state.program, node, "stands for no op of the model that this stage computes")
    check_shape(state, node, state.local(done))
    state.set(node, done)


def _one_term(state: RankState, node: Node) -> Value:
    """Checks one_term. All ranks must do so with this tensor: that they do follows from no rank's having a sum owed
    for it otherwise."""
    value = state.value(node, node.args[0])
    op = state.graph.ops.get(value.ref.op)
    owed = op is not None and op.kind not in SOURCES and PARTIAL in state.planned(op)
    if value.held != WHOLE or owed or node.args[1] != state.program.tp_rank:
        fail(
            state.program, node,
            f"makes rank {node.args[1]}'s term of {named(value.ref)}, which is {value.held}"
            + (", and owed by its op already" if owed else ""),
        )  # fmt: skip
    return Value(value.ref, PARTIAL)


def _fused_norm(state: RankState, node: Node) -> Value:
    x = state.value(node, node.args[0])
    weight = state.value(node, node.args[2]) if node.args[2] is not None else None
    found = _norm_of(state.graph, x.ref, None if weight is None else weight.ref)
    last = len(state.graph.spec(x.ref).shape) - 1
    whole_last = not x.held.partial and x.held.dim != last and (weight is None or weight.held == WHOLE)
    if found is None or not whole_last:
        fail(
            state.program, node,
            f"no norm of the model is this one of {named(x.ref)}" if found is None else
            f"normalises {named(x.ref)}, which is {x.held}" + (f", by {weight.held}" if weight is not None else ""),
        )  # fmt: skip
    op, add = found
    check_eps(state, node, add)
    if state.planned(op) != (x.held,):
        fail(
            state.program, node, f"its output is {x.held}, and the plan says {state.planned(op)[0]}",
            missing=Duty.COLLECTIVES,
        )  # fmt: skip
    return Value(TensorRef(op.name), x.held)


def _norm_of(graph: OpGraph, x: TensorRef, weight: TensorRef | None) -> tuple[Op, Op] | None:
    """Returns the last op of x * rsqrt(mean(x**2, -1) + eps), or of its product with `weight`; and the op that adds
    eps."""
    last = len(graph.spec(x).shape) - 1
    for square in _users(graph, x, "pow", "square"):
        for mean in _users(graph, TensorRef(square.name), "reduce"):
            if mean.attrs["op"] != "mean" or not mean.attrs["keepdim"] or mean.attrs["dims"] not in ((-1,), (last,)):
                continue
            for add in _users(graph, TensorRef(mean.name), "add"):
                for rsqrt in _users(graph, TensorRef(add.name), "rsqrt") if len(add.inputs) == 1 else ():
                    for scaled in _users(graph, TensorRef(rsqrt.name), "mul"):
                        if set(scaled.inputs) != {x, TensorRef(rsqrt.name)}:
                            continue
                        if weight is None:
                            return scaled, add
                        for product in _users(graph, TensorRef(scaled.name), "mul"):
                            if set(product.inputs) == {weight, TensorRef(scaled.name)}:
                                return product, add
    return None


def _users(graph: OpGraph, ref: TensorRef, *kinds: str) -> Iterator[Op]:
    for name in dict.fromkeys(name for name, _ in graph.users.get(ref, ())):
        if graph[name].kind in kinds:
            yield graph[name]
