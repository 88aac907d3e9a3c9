"""canonicalize_calls: leaves one way to call each function that later passes rewrite.

before  linear(%x, bias=%b, weight=%w)              getattr(%max, "values")
after   linear(%x, %w, %b)                          getitem(%max, 0)

before  matmul(%x, getattr(%w, "T"))                with a parameter w of two dims
after   linear(%x, %w)

before  %x.mean(axis=-1, keepdims=True)             as numpy calls them
after   %x.mean(dim=-1, keepdim=True)

before  %past.update(%k, %v, 0, {"sin": %s, "cos": %c, "cache_position": %p})
after   %past.update(%k, %v, 0, {"cache_position": %p})
"""

from __future__ import annotations

import operator
import types
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.nn import functional as F

from passes.fx import node_meta
from passes.fx.run_passes import PassResult
from passes.fx.shape_propagation import NormalizeContext

# Functions whose weights may be cut -> their parameters, in order, up to the last that a pass rewrites; with defaults.
_CONV = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_CONV_TRANSPOSE = {
    "input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1,
}  # fmt: skip
_SIGNATURES: dict[Any, dict[str, Any]] = {
    F.linear: {"input": None, "weight": None, "bias": None},
    F.embedding: {"input": None, "weight": None},
    F.group_norm: {"input": None, "num_groups": None},
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _CONV_TRANSPOSE),
}
# torch's own functions take these names, too.
_NUMPY = {"axis": "dim", "keepdims": "keepdim"}


def canonicalize_calls(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place. Every node must have its `val`."""
    matches = 0
    for node in list(graph_module.graph.nodes):
        before = node.op, node.target, node.args, node.kwargs
        _canonicalize(node)
        matches += before != (node.op, node.target, node.args, node.kwargs)
    return PassResult(graph_module, matches)


def _canonicalize(node: Node) -> None:
    if node.op == "call_method" or isinstance(node.target, types.BuiltinFunctionType):
        node.kwargs = {_NUMPY.get(name, name): value for name, value in node.kwargs.items()}
    if node.target is getattr and node.args[1] in ("T", "mT") and _dims(node.args[0]) == 2:
        node.target, node.args = torch.t, node.args[:1]
    elif _is_product_with_transposed_weight(node):
        node.op, node.target = "call_function", F.linear
        node.args = (node.args[0], node.args[1].args[0])
    if node.op == "call_method" and node.target == "update" and len(node.args) > 4:
        _drop_rotary_tables(node)
    if node.op != "call_function":
        return
    if node.target in _SIGNATURES:
        _by_position(node, _SIGNATURES[node.target])
    elif node.target is getattr and isinstance(node.args[0], Node):
        _by_number(node)


def _is_product_with_transposed_weight(node: Node) -> bool:
    if node.target not in (operator.matmul, torch.matmul, "matmul", "__matmul__") or node.kwargs or _dims(node) < 1:
        return False
    x, transposed = node.args
    if not isinstance(transposed, Node) or transposed.target not in (torch.t, "t") or _dims(x) < 2:
        return False
    weight = transposed.args[0]
    return weight.op == "get_attr" and _dims(weight) == 2


def _dims(node: Any) -> int:
    """Returns a tensor's number of dims, -1 for what is no tensor."""
    value = node_meta.val(node) if isinstance(node, Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else -1


def _drop_rotary_tables(node: Node) -> None:
    """Drops the rotary tables that models hand to Cache.update for kinds of caches that left transformers; only
    positions are read."""
    if isinstance(node.args[4], dict):
        kept = {k: v for k, v in node.args[4].items() if k == "cache_position"}
        node.args = (*node.args[:4], kept)


def _by_position(node: Node, defaults: dict[str, Any]) -> None:
    given = dict(node.kwargs)
    values = [*node.args, *(given.pop(name, defaults[name]) for name in list(defaults)[len(node.args) :])]
    while len(values) > 1 and values[-1] is None:
        values.pop()
    node.args, node.kwargs = tuple(values), given


def _by_number(node: Node) -> None:
    """Rewrites an attribute of torch's named tuples, x.max(1).values, as an item of a plain one."""
    fields = getattr(type(node_meta.val(node.args[0])), "__match_args__", ())
    if isinstance(node_meta.val(node.args[0]), tuple) and node.args[1] in fields:
        node.target, node.args = operator.getitem, (node.args[0], fields.index(node.args[1]))
