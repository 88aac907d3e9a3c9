"""unmerge_batch: heads that a model folds into the batch get their own dim back, so that they can be sharded.

    before  q = reshape(q, (batch * 4, seq, 8));  s = baddbmm(bias, q, k);  s = reshape(s, (batch, 4, seq, seq))
    after   q = reshape(q, (batch, 4, seq, 8));   s = bias + q @ k          (the last reshape is none, and goes)

A shard of a dim "B*4" is a stride of it, which no layout says; a shard of 4 heads is plain. What hangs together through
the folded dim is rewritten as a whole or not at all: between reshapes that fold and unfold there may be only what
computes each row by itself.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
import torch.fx
from torch.fx import Node

from passes.nodes import op_name

_ROW_BY_ROW = frozenset({
    "add", "sub", "mul", "truediv", "div", "neg", "pow", "exp", "tanh", "sigmoid", "relu", "clamp", "where",
    "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "to", "float", "type_as", "type", "contiguous",
    "clone", "dropout", "softmax", "log_softmax",
})  # fmt: skip
_MADE = (torch.zeros, torch.ones, torch.empty, torch.full)
_FOLDED = tuple[int, Node, int]  # the dim, the length in front, how many were folded into it


def unmerge_batch(graph: torch.fx.Graph) -> None:
    """Rewrites `graph` in place. Views must have their full shapes, every node `meta["val"]` and `meta["symbols"]`."""
    folded = {node: where for node in graph.nodes if (where := _folded(node)) is not None}
    for region in list(nx.connected_components(_ties(folded))):
        if all(_can(node, folded) for node in region):
            for node in [n for n in folded if n in region]:  # in the graph's order
                _rewrite(node, folded[node])


def _ties(folded: dict[Node, _FOLDED]) -> nx.Graph[Node]:
    ties: nx.Graph[Node] = nx.Graph()
    ties.add_nodes_from(folded)
    ties.add_edges_from((node, user) for node in folded for user in node.users if user in folded)
    return ties


def _folded(node: Node) -> _FOLDED | None:
    """Which dim of a tensor is a length of the inputs times a number: told by a reshape's or a new tensor's sizes, or
    by the symbols of what is computed from one."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    symbols = node.meta["symbols"]
    dims = [i for i, symbol in enumerate(symbols) if symbol.partition("*")[2].isdecimal()]
    if len(dims) != 1:
        return None
    dim = dims[0]
    length, count = symbols[dim].split("*")
    sizes = _sizes(node)
    if sizes is not None:
        size = sizes[dim]
        if not isinstance(size, Node) or size.target is not operator.mul or size.args[1] != int(count):
            return None
        return dim, size.args[0], int(count)
    for source in node.all_input_nodes:
        found = _folded(source)
        if found is not None and source.meta["symbols"][found[0]] == symbols[dim]:
            return dim, found[1], found[2]
    return None


def _sizes(node: Node) -> tuple[Any, ...] | None:
    if node.op != "call_function":
        return None
    if node.target is torch.reshape:
        return tuple(node.args[1])
    if node.target in _MADE and node.args and isinstance(node.args[0], (tuple, list)):
        return tuple(node.args[0])
    return None


def _can(node: Node, folded: dict[Node, _FOLDED]) -> bool:
    dim = folded[node][0]
    if any(user not in folded and not _unfolds(user) for user in node.users):
        return False
    if _sizes(node) is not None:
        return True
    inputs = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    name, rank = op_name(node), node.meta["val"].dim()
    if name in ("bmm", "baddbmm", "matmul"):
        return rank == 3 and dim == 0 and all(a in folded and folded[a][0] == 0 and _rank(a) == 3 for a in inputs)
    if name == "transpose":
        return True
    if name in ("softmax", "log_softmax") and _along(node) % rank == dim:
        return False
    return name in _ROW_BY_ROW and all(
        (folded[a][0] == dim and _rank(a) == rank) if a in folded else _rank(a) < rank - dim for a in inputs
    )


def _unfolds(user: Node) -> bool:
    return user.op == "call_function" and user.target is torch.reshape


def _rank(node: Node) -> int:
    return int(node.meta["val"].dim())


def _along(node: Node) -> int:
    return int(node.kwargs["dim"] if "dim" in node.kwargs else node.args[1])


def _rewrite(node: Node, where: _FOLDED) -> None:
    dim, length, count = where
    name, value, symbols = op_name(node), node.meta["val"], node.meta["symbols"]
    rows = length.meta["val"]
    shape = (*value.shape[:dim], rows, count, *value.shape[dim + 1 :])
    node.meta["val"] = value.new_empty(shape)
    node.meta["symbols"] = (*symbols[:dim], symbols[dim].split("*")[0], "", *symbols[dim + 1 :])
    sizes = _sizes(node)
    if sizes is not None:
        at = 1 if node.target is torch.reshape else 0
        node.update_arg(at, (*sizes[:dim], length, count, *sizes[dim + 1 :]))
    elif name == "transpose":
        _transpose(node, dim, value.dim())
    elif name in ("bmm", "matmul"):
        node.op, node.target = "call_function", torch.matmul
        node.args, node.kwargs = tuple(node.all_input_nodes), {}
    elif name == "baddbmm":
        _multiply_and_add(node)
    elif name in ("softmax", "log_softmax"):
        along = _along(node) % value.dim()
        node.args, node.kwargs = node.args[:1], {**node.kwargs, "dim": along + (along > dim)}


def _transpose(node: Node, dim: int, rank: int) -> None:
    """`dim` is the folded one of what comes out."""
    one, other = (int(a) % rank for a in node.args[1:])
    if dim not in (one, other):
        node.args = (node.args[0], one + (one > dim), other + (other > dim))
        return
    order = list(range(rank))
    order[one], order[other] = order[other], order[one]
    dim = order[dim]  # of what goes in
    spread = [new for old in order for new in ((dim, dim + 1) if old == dim else (old + (old > dim),))]
    node.op, node.target, node.args = "call_function", torch.permute, (node.args[0], tuple(spread))


def _multiply_and_add(node: Node) -> None:
    """beta * input + alpha * (batch1 @ batch2)."""
    names = ("input", "batch1", "batch2")
    added, one, other = (node.args[i] if i < len(node.args) else node.kwargs[name] for i, name in enumerate(names))
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)

    def call(target: Callable[..., Any], *args: Any, like: Node = node) -> Node:
        made = node.graph.call_function(target, args)
        made.meta = {**node.meta, "val": like.meta["val"], "symbols": like.meta["symbols"]}
        return made

    with node.graph.inserting_before(node):
        result = call(torch.matmul, one, other)
        if alpha != 1:
            result = call(operator.mul, result, alpha)
        if beta != 0:
            result = call(operator.add, added if beta == 1 else call(operator.mul, added, beta, like=added), result)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
