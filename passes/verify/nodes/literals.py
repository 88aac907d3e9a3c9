"""Compares the numbers in an emitted node's arguments with the model's own graph. The op graph does not know them
all (the scale of a softmax, an eps, which element an index takes)."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import Op
from passes.fx import node_meta
from passes.fx.arguments import submodule
from passes.op_graph.indexing import spelled_index
from passes.ops.losses import cross_entropy_part
from passes.ops.parallel_layers import partial_mean
from passes.verify.core.held import Held
from passes.verify.core.report import Duty, fail
from passes.verify.core.state import RankState

# Their numbers become the rank's own, and are proven in other ways.
_REWRITTEN = (
    "view", "expand", "split", "slice", "repeat_interleave", "cache_update", "cache_read", "linear", "embedding",
    "experts",
)  # fmt: skip


def nodes_by_name(whole: torch.fx.GraphModule) -> dict[str, Node]:
    """Returns the nodes of the model's graph by name."""
    return {node.name: node for node in whole.graph.nodes}


def check_literals(state: RankState, node: Node, op: Op, types: tuple[Held, ...]) -> None:
    """Checks the numbers among a node's arguments, and the settings of its module, against the model's."""
    theirs = state.tools.whole.get(op.name)
    if theirs is None or node.target in (partial_mean, cross_entropy_part):
        return
    if op.kind == "slice":
        _check_index(state, node, theirs, types[0])
    is_as_it_was = op.kind == "embedding" and node.op == theirs.op == "call_function" and node.target is theirs.target
    if op.kind in _REWRITTEN and not is_as_it_was:  # a lookup of a whole table has the model's own flags
        return
    called, calls = (n.op if n.op == "call_module" else (n.op, n.target) for n in (node, theirs))
    if called != calls:
        fail(state.program, node, f"calls {node.target}, and the model calls {theirs.target}")
    if node.op == "call_module":
        _check_settings(state, node, theirs)
    own, others = _by_position(node, op), _by_position(theirs, op)
    mine, wanted = _pattern((own, _named(node, op)), state), _pattern((others, _named(theirs, op)))
    if mine != wanted:
        fail(
            state.program, node,
            f"is called with {node.args} {dict(node.kwargs)}, and the model calls it with {theirs.args} "
            f"{dict(theirs.kwargs)}",
        )  # fmt: skip


def _check_index(state: RankState, node: Node, theirs: Node, lies: Held) -> None:
    """Checks x[...]: what is taken of each dim but the sharded one, which same_op.py looks at."""
    shape = node_meta.tensor(theirs.args[0]).shape
    mine, wanted = (_taken(spelled_index(n), shape, s) for n, s in ((node, state), (theirs, None)))
    differing = [d for d in range(len(shape)) if d != lies.dim and mine[d] != wanted[d]]
    if differing:
        fail(
            state.program, node,
            f"takes {node.args[1]} of dim {differing[0]}, and the model takes {theirs.args[1]}",
        )  # fmt: skip


def _taken(index: list[Any], shape: torch.Size, state: RankState | None) -> list[Any]:
    """Returns what an index takes of each dim: the element, or (first, end, step)."""
    found: list[Any] = []
    for item in (i for i in index if i is not None):
        size = shape[len(found)]
        if isinstance(item, slice):
            bounds = [_number(b, state) for b in (item.start, item.stop, item.step)]
            found.append(slice(*bounds).indices(size) if all(type(b) in (int, type(None)) for b in bounds) else bounds)
        else:
            found.append(item % size)
    return found


def _check_settings(state: RankState, node: Node, theirs: Node) -> None:
    """Checks the settings that a module computes by: the eps of a norm, the approximation of a gelu."""
    module = submodule(state.module, str(node.target))
    model = submodule(theirs.graph.owning_module, str(theirs.target))
    mine, wanted = _settings(module), _settings(model)
    if type(module) is not type(model) or mine != wanted:
        differing = [f"{k}={mine.get(k)}" for k in {**mine, **wanted} if mine.get(k) != wanted.get(k)]
        fail(
            state.program, node,
            f"is {type(module).__name__} with {', '.join(differing) or 'the same settings'}, and the model has {model}",
            untouched=Duty.WEIGHTS,
        )  # fmt: skip


def _settings(module: torch.nn.Module, prefix: str = "") -> dict[str, Any]:
    """Returns the plain values among a module's attributes, and those of the modules in it."""
    plain = (int, float, str, bool, tuple, torch.dtype, type(None))
    found = {
        prefix + name: value for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, plain) and name != "training"
    }  # fmt: skip
    for name, child in module.named_children():
        found |= {f"{prefix}{name}": type(child), **_settings(child, f"{prefix}{name}.")}
    return found


def check_eps(state: RankState, node: Node, add: Op) -> None:
    """Checks the eps of `node`, a norm that fuse_ops made; `add` is the op of the model that adds it."""
    theirs = state.tools.whole.get(add.name)
    if theirs is None:
        return
    numbers = [a for a in theirs.args if not isinstance(a, Node)]
    if numbers != [node.args[3]]:
        fail(state.program, node, f"has eps {node.args[3]}, and the model {numbers}")


def _by_position(node: Node, op: Op) -> tuple[Any, ...]:
    """Returns the arguments by position, but for the bias and groups of a convolution, the groups of a norm, what a
    mask is drawn for: a rank has its own (same_op.py)."""
    left_out = {"conv": (2, 6), "group_norm": (1,), "dropout": (6,)}.get(op.kind, ())
    return tuple(a for i, a in enumerate(node.args) if i not in left_out)


def _named(node: Node, op: Op) -> dict[str, Any]:
    """Returns the keyword arguments; whether attention repeats heads is looked at with the heads."""
    return {k: v for k, v in node.kwargs.items() if not (op.kind == "sdpa" and k == "enable_gqa")}


def _pattern(value: Any, state: RankState | None = None) -> Any:
    """Returns `value` with a mark for each tensor, and sizes as they are at the example. 1, 1.0 and True are
    different to torch. `state`: of the rank whose node it is, None for the model's."""
    if isinstance(value, Node):
        number = _number(value, state)
        return Node if number is value else ("number", number)
    if isinstance(value, (tuple, list)):
        return [_pattern(v, state) for v in value]
    if isinstance(value, dict):
        return {k: _pattern(v, state) for k, v in value.items()}
    if isinstance(value, slice):
        return slice, *(_pattern(v, state) for v in (value.start, value.stop, value.step))
    return type(value), value


def _number(value: Any, state: RankState | None) -> Any:
    """Returns what a node gives that gives a number; anything else as it is."""
    if not isinstance(value, Node):
        return value
    known = node_meta.val(value) if state is None else state.known.get(value)
    return known if isinstance(known, (int, float)) else value
