"""Are the numbers in an emitted node's arguments those that the model has there? The op graph does not know them all
(the scale of a softmax, an eps), so they are compared with the whole model's own graph."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch.fx import Node

from cost_model.op_graph import Op
from passes.verify_facts import RankState
from passes.verify_report import fail

# Their numbers become the rank's own, and are proven in other ways.
_REWRITTEN = (
    "view", "expand", "split", "slice", "repeat_interleave", "cache_update", "cache_read", "linear", "embedding",
)  # fmt: skip
_HERE = "passes/localize_shapes.py"


def nodes_by_name(whole: torch.fx.GraphModule) -> dict[str, Node]:
    return {node.name: node for node in whole.graph.nodes}


def check_literals(state: RankState, node: Node, op: Op) -> None:
    theirs = state.tools.whole.get(op.name)
    if theirs is None or op.kind in _REWRITTEN or (op.kind == "reduce" and node.target is not theirs.target):
        return
    if (node.op, node.target) != (theirs.op, theirs.target):
        fail(state.program, node, f"calls {node.target}, and the model calls {theirs.target}", _HERE)
    own, others = _by_position(node, op), _by_position(theirs, op)
    mine, wanted = _pattern((own, _named(node, op))), _pattern((others, _named(theirs, op)))
    if mine != wanted:
        fail(
            state.program, node,
            f"is called with {node.args} {dict(node.kwargs)}, and the model calls it with {theirs.args} "
            f"{dict(theirs.kwargs)}",
            _HERE,
        )  # fmt: skip


def check_eps(state: RankState, node: Node, add: Op) -> None:
    """`node` is a norm that fuse_ops made; `add` the op of the model that adds its eps."""
    theirs = state.tools.whole.get(add.name)
    if theirs is None:
        return
    numbers = [a for a in theirs.args if not isinstance(a, Node)]
    if numbers != [node.args[3]]:
        fail(state.program, node, f"has eps {node.args[3]}, and the model {numbers}", "passes/fuse_ops.py")


def _by_position(node: Node, op: Op) -> tuple[Any, ...]:
    """But for the bias and groups of a convolution, the groups of a norm: a rank has its own (verify_same_op)."""
    left_out = {"conv": (2, 6), "group_norm": (1,)}.get(op.kind, ())
    return tuple(a for i, a in enumerate(node.args) if i not in left_out)


def _named(node: Node, op: Op) -> dict[str, Any]:
    """Keyword arguments; whether attention repeats heads is looked at with the heads."""
    return {k: v for k, v in node.kwargs.items() if not (op.kind == "sdpa" and k == "enable_gqa")}


def _pattern(value: Any) -> Any:
    """`value` with a mark for each node. 1, 1.0 and True are different to torch."""
    if isinstance(value, Node):
        return Node
    if isinstance(value, (tuple, list)):
        return [_pattern(v) for v in value]
    if isinstance(value, dict):
        return {k: _pattern(v) for k, v in value.items()}
    if isinstance(value, slice):
        return slice, _pattern(value.start), _pattern(value.stop), _pattern(value.step)
    return type(value), value
