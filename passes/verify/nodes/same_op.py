"""Checks that an emitted node is the op that the model has there, seen through what passes write in an op's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import Op
from passes.fx.arguments import argument, submodule
from passes.fx.nodes import op_name
from passes.ops.comm import log_sum_exp
from passes.ops.losses import cross_entropy_part
from passes.ops.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, partial_mean
from passes.verify.core.held import PARTIAL, WHOLE, Derivation, Held, elements, held
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankState
from passes.verify.nodes.experts import check_pick, picks_own


def check_same_op(state: RankState, node: Node, op: Op, types: tuple[Held, ...]) -> None:
    """Checks a node's kind and attributes against the op that it stands for. Raises VerificationError."""
    kind, attrs = _classified(state, node, op)
    if kind != op.kind:
        fail(state.program, node, f"does {kind} where the model does {op.kind}", untouched=Duty.SIZES)
    if picks_own(state, op, types) and len(attrs.get("picks", ())) == 1:
        check_pick(state, node, op, types[0], attrs["picks"])
        if attrs["dims"] != op.attrs["dims"]:
            fail(
                state.program, node, f"takes {attrs['dims']} where the model takes {op.attrs['dims']}",
                untouched=Duty.SIZES,
            )  # fmt: skip
    elif op.kind == "slice" and types[0].is_sharded:
        _check_slice(state, node, op, types[0], attrs["dims"])
    elif op.kind == "repeat_interleave" and op_name(node) != "index_select":
        if attrs["dim"] != op.attrs["dim"]:
            fail(
                state.program, node, f"repeats dim {attrs['dim']}, the model dim {op.attrs['dim']}",
                untouched=Duty.SIZES,
            )  # fmt: skip
    elif op.kind in ("conv", "group_norm"):
        _check_groups(state, node, op, types[0], attrs)
    elif op.kind not in ("cache_update", "cache_read", "slice", "repeat_interleave") and attrs != op.attrs:
        fail(state.program, node, f"has {dict(attrs)} where the model has {dict(op.attrs)}", untouched=Duty.SIZES)
    elif op.kind == "slice" and attrs != op.attrs:
        fail(
            state.program, node, f"takes {attrs['dims']} where the model takes {op.attrs['dims']}",
            untouched=Duty.SIZES,
        )  # fmt: skip


def _classified(state: RankState, node: Node, op: Op) -> tuple[str, Any]:
    """Returns kind and attributes, seen through what passes write in a node's place."""
    if node.op == "call_module":
        module = submodule(state.module, str(node.target))
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            return "linear", {"transposed": module.transposed}
        if isinstance(module, VocabParallelEmbedding):
            return "embedding", {}
    if node.op == "call_function" and node.target is partial_mean and op.kind == "reduce":
        return "reduce", {"op": "mean", "dims": tuple(node.args[1]), "keepdim": node.args[2]}
    if op.kind == "repeat_interleave" and node.target is torch.index_select:
        return op.kind, op.attrs  # which elements it takes is looked at in _repeated
    return state.classify(node)


def _check_slice(state: RankState, node: Node, op: Op, lies: Held, given: Any) -> None:
    """Checks where the slice starts along the sharded dim, among the elements that the rank holds."""
    _, (shape,), (out,) = state.tools.rule(op)
    own = elements(lies, shape[lies.dim])
    wanted = []
    for number, (in_dim, out_dim, start, step) in enumerate(op.attrs["dims"]):
        if in_dim == lies.dim and step != 1 and number < len(given):
            taken = np.flatnonzero(np.isin(own, np.arange(start, start + step * out[out_dim], step)))
            first, every = given[number][2:]
            if np.array_equal(taken, first + every * np.arange(len(taken))):  # and no more: check_shape says so
                start, step = first, every
        elif in_dim == lies.dim and out[out_dim] != shape[in_dim]:
            start = int(np.count_nonzero(own < start))
        wanted.append((in_dim, out_dim, start, step))
    if tuple(wanted) != tuple(given):
        fail(
            state.program, node,
            f"takes {tuple(given)} (dim, dim of the result, start, step) of its share, where the model's slice lies "
            f"at {tuple(wanted)}",
            untouched=Duty.SIZES,
        )  # fmt: skip


def _check_groups(state: RankState, node: Node, op: Op, lies: Held, given: Any) -> None:
    """Checks that there are as many groups of channels as the rank has; the rule has seen to it that none is cut."""
    groups, (_, (shape, *_), _) = op.attrs["groups"], state.tools.rule(op)
    if lies.is_sharded and groups > 1 and len(shape) > 2 and lies.dim == 1:
        groups = groups * len(elements(lies, shape[1])) // shape[1]
    if dict(given) != {**op.attrs, "groups": groups}:
        fail(
            state.program, node, f"has {dict(given)} where {groups} groups and {dict(op.attrs)} are wanted",
            untouched=Duty.SIZES,
        )  # fmt: skip


# -- what single kinds owe beside their rule ---------------------------------------------------------------------------


def _embedding(state: RankState, node: Node, op: Op, types: tuple[Held, ...], done: Derivation) -> None:
    """Checks that rows of other ranks come out as zeros, and that the row of padding, and no other, gets no
    gradient."""
    module = submodule(state.module, str(node.target)) if node.op == "call_module" else None
    rows = state.graph.spec(op.inputs[1]).shape[0]
    if isinstance(module, VocabParallelEmbedding):
        own = held(0, module.intervals, rows)
        if own != (types[1] if types[1].dim == 0 else WHOLE):
            fail(state.program, node, f"looks up {own}, and its table is {types[1]}", untouched=Duty.WEIGHTS)
    elif types[1].dim == 0:
        fail(state.program, node, f"its table is {types[1]}, and it looks up every row", untouched=Duty.WEIGHTS)
    theirs = state.tools.whole.get(op.name)
    if theirs is not None and _padding(node, rows) != _padding(theirs, rows):
        fail(
            state.program, node,
            f"keeps the gradient from row {_padding(node, rows)}, and the model from row {_padding(theirs, rows)}",
            untouched=Duty.WEIGHTS,
        )  # fmt: skip


def _padding(node: Node, rows: int) -> int | None:
    if node.op == "call_module":
        given = getattr(submodule(node.graph.owning_module, str(node.target)), "padding_idx", None)
    else:
        given = argument(node, 2, "padding_idx")
    return None if given is None else given % rows


def _experts(state: RankState, node: Node, op: Op, types: tuple[Held, ...], done: Derivation) -> None:
    """Checks that the experts that a rank runs are those whose weights it holds, and that gate, up, and its bias are of
    the same elements of their inside as down."""
    count, said = op.attrs["experts"], argument(node, 11, "held")
    own = WHOLE if said is None else held(0, said, count)
    if own != (types[3] if types[3].dim == 0 else WHOLE):
        fail(state.program, node, f"runs experts {own}, and holds the weights of {types[3]}", untouched=Duty.SIZES)
    if not types[3].is_sharded or types[3].dim == 0:
        return
    parts, inner = op.attrs["parts"], state.graph.spec(op.inputs[4]).shape[1 if op.attrs["transposed"] else 2]
    of_down = elements(types[4], inner)
    wanted = {
        "one": of_down, "halves": np.concatenate([of_down, of_down + inner]),
        "pairs": np.stack([2 * of_down, 2 * of_down + 1], axis=1).ravel(),
    }  # fmt: skip
    for lies in (types[3], *types[5:6]):
        if not np.array_equal(elements(lies, inner * (1 if parts == "one" else 2)), wanted[parts]):
            fail(
                state.program, node, f"its gate and up are {lies}, which are no {parts} of {types[4]}",
                untouched=Duty.WEIGHTS,
            )  # fmt: skip


def _dropout(state: RankState, node: Node, op: Op, types: tuple[Held, ...], done: Derivation) -> None:
    """Checks that a rank draws the mask of those elements of the whole tensor that it holds."""
    shape, cut = state.graph.spec(op.inputs[0]).shape, argument(node, 6, "cut")
    said = WHOLE if cut is None else held(cut[0], cut[2], cut[1])
    if said != types[0] or (cut is not None and cut[1] != shape[cut[0]]):
        fail(
            state.program, node,
            f"draws the mask of {said}" + ("" if cut is None else f" of {cut[1]}")
            + f", and holds {types[0]} of {shape[types[0].dim] if types[0].is_sharded else list(shape)}",
            untouched=Duty.SIZES,
        )  # fmt: skip


def _mean(state: RankState, node: Node, op: Op, types: tuple[Held, ...], done: Derivation) -> None:
    """Checks that a part of a mean divides by the number of all elements."""
    owes = done.factor is not None and PARTIAL in done.outputs and op.attrs["op"] == "mean"
    if owes != (node.target is partial_mean):
        fail(
            state.program, node, "a mean over a sharded dim must divide by the number of all elements",
            untouched=Duty.SIZES,
        )  # fmt: skip
    if owes:
        cut, shape = types[0].dim, state.graph.spec(op.inputs[0]).shape
        if tuple(node.args[3:]) != (cut, shape[cut]):
            said = f"divides as if its whole input were {node.args[4]} long in dim {node.args[3]}"
            fail(
                state.program, node, f"{said}: it is {shape[cut]} long in dim {cut}, where it is sharded",
                untouched=Duty.SIZES,
            )  # fmt: skip
        theirs = state.tools.whole.get(op.name)
        if theirs is not None and node.kwargs.get("dtype") != theirs.kwargs.get("dtype"):
            fail(state.program, node, f"computes in {node.kwargs.get('dtype')}, unlike the model", untouched=Duty.SIZES)


def _cross_entropy(state: RankState, node: Node, op: Op, types: tuple[Held, ...], done: Derivation) -> None:
    """Checks that a rank's part of a loss is of the classes that it holds, and goes by the sum over all of them."""
    if (types[0].dim == 1) != (node.target is cross_entropy_part):
        fail(state.program, node, f"its scores are {types[0]}, and it is a loss of other classes", untouched=Duty.SIZES)
    if node.target is not cross_entropy_part:
        return
    scores, _, sums, (count, runs) = node.args
    classes = state.graph.spec(op.inputs[0]).shape[1]
    if count != classes or held(1, runs, classes) != types[0]:
        fail(
            state.program, node, f"is told that its scores are those of classes {list(runs)} of {count}, and they are "
            f"{types[0]} of {classes}",
            untouched=Duty.SIZES,
        )  # fmt: skip
    if not isinstance(sums, Node) or sums.target is not log_sum_exp or sums.args[0] is not scores:
        fail(state.program, node, f"goes by {sums}, which is no sum over all classes of its scores")


def _cache_update(state: RankState, node: Node, op: Op, types: tuple[Held, ...], done: Derivation) -> None:
    position, does = (1, "reads") if op.kind == "cache_read" else (3, "writes")
    layer, layers = argument(node, position, "layer_idx"), state.program.cache_layers
    if type(layer) is not int or not 0 <= layer < len(layers) or layers[layer] != op.attrs["layer"]:
        fail(
            state.program, node,
            f"{does} cache layer {layer} of this rank, whose layers are those numbered {list(layers)} in the model; "
            f"the model {does} {op.attrs['layer']}",
            untouched=Duty.CACHE,
        )  # fmt: skip
    state.facts.updates.append((op.name, layer, node))


FURTHER_CHECKS: dict[str, Callable[[RankState, Node, Op, tuple[Held, ...], Derivation], None]] = {
    "embedding": _embedding,
    "experts": _experts,
    "reduce": _mean,
    "dropout": _dropout,
    "cross_entropy": _cross_entropy,
    "cache_update": _cache_update,
    "cache_read": _cache_update,
}
