"""remove_no_ops: removes ops that give back the tensor that they were given.

before  x = dropout(x, training=False); x = x.contiguous(); x = x.to(torch.float32); y = x + 1
after   y = x + 1
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.arguments import submodule
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext
from passes.normalize.static_view_sizes import EXPANDS, RESHAPES

_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_CONTIGUOUS = ("contiguous",)
_CASTS = ("to", "float", "type_as", "half", "bfloat16", "double", "type")


def _same_tensor(a: Any, b: Any) -> bool:
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape


def _is_no_op(node: Node) -> bool:
    if node.op == "call_module":
        module = submodule(node.graph.owning_module, str(node.target))
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            return not module.training or module.p == 0
        return isinstance(module, torch.nn.Identity)
    if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], Node):
        return False
    name, before, after = op_name(node), node_meta.val(node.args[0]), node_meta.val(node)
    if not _same_tensor(before, after) or node_meta.symbols(node.args[0]) != node_meta.symbols(node):
        return False  # without the symbols, [B, S, 23] viewed as [B, 23, S] would be one where S is 23
    if name in _CONTIGUOUS or name in RESHAPES or name in EXPANDS or name in _CASTS:
        return True  # shapes are spelled out and only reshape reads them, so strides don't matter
    if name in _DROPOUTS:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        return training is False or p == 0
    if name == "getitem":
        index = node.args[1]
        items = index if isinstance(index, tuple) else (index,)
        if Ellipsis in items:
            return all(i is Ellipsis or _is_whole_slice(i, None) for i in items)
        return all(_is_whole_slice(i, n) for i, n in zip(items, before.shape, strict=False))
    if name in ("mul", "truediv", "div"):
        return len(node.args) == 2 and not node.kwargs and type(node.args[1]) in (int, float) and node.args[1] == 1
    return False


def _is_whole_slice(index: Any, size: int | None) -> bool:
    if not isinstance(index, slice) or index.start not in (None, 0) or index.step not in (None, 1):
        return False
    stop = index.stop
    # the length's own node: example sizes are told apart by two examples, so equal means the same length
    return stop is None or (size is not None and isinstance(stop, Node) and node_meta.val(stop) == size)


def remove_no_ops(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place. Shapes are written out by now, so that a view of the same shape is removed,
    too."""
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    for node in list(graph.nodes):
        if _is_no_op(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            matches += 1
        elif op_name(node) == "cat" and node.op == "call_function" and isinstance(node.args[0], (tuple, list)):
            matches += _drop_empty(node)
        elif op_name(node) in ("and", "logical_and") and len(node.args) == 2:
            matches += _drop_all_true(node)
    return edit.result(matches)


def _drop_empty(node: Node) -> bool:
    """Drops from a torch.cat the tensors of shape [0], which it passes over whatever the others are: the keys of a
    cache that is empty yet.

    True if there was one.
    """
    kept = [n for n in node.args[0] if node_meta.tensor(n).shape != (0,)]
    if len(kept) == 1 and _same_tensor(node_meta.val(kept[0]), node_meta.val(node)):
        node.replace_all_uses_with(kept[0])
        node.graph.erase_node(node)
        return True
    found = 0 < len(kept) < len(node.args[0])
    if kept:
        node.args = (kept, *node.args[1:])
    return found


def _drop_all_true(node: Node) -> bool:
    """Replaces `mask & ones` by the mask, when the ones don't widen it (masking_utils starts every mask that way).

    True if it was.
    """
    for ones, other in (node.args, node.args[::-1]):
        if not (isinstance(ones, Node) and isinstance(other, Node) and op_name(ones) == "new_ones"):
            continue
        if node_meta.tensor(ones).dtype == torch.bool and _same_tensor(node_meta.val(other), node_meta.val(node)):
            node.replace_all_uses_with(other)
            node.graph.erase_node(node)
            return True
    return False
