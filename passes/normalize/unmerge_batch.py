"""unmerge_batch: gives heads that a model folds into the batch their own dim back, so that they can be sharded, and
experts that it folds into the tokens.

    before  q = reshape(q, (batch * 4, seq, 8));  s = baddbmm(bias, q, k);  s = reshape(s, (batch, 4, seq, seq))
    after   q = reshape(q, (batch, 4, seq, 8));   s = bias + q @ k          (the last reshape is none, and goes)

    before  x = repeat(x, 4, 1);                  x = x * reshape(s, (-1, 1));     x = reshape(x, (4, -1, 8))
    after   x = broadcast_to(x[None], (4, -1, 8));  x = x * reshape(s, (4, -1, 1))

A shard of a dim "B*4" is a stride of it (or runs whose lengths follow the inputs), which no layout says; a shard of 4
heads is plain. What hangs together through the folded dim is rewritten as a whole or not at all: between reshapes that
fold and unfold there may be only what computes each row by itself.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import networkx as nx
import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext

_ROW_BY_ROW = frozenset({
    "add", "sub", "mul", "truediv", "div", "neg", "pow", "exp", "tanh", "sigmoid", "relu", "clamp", "where",
    "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "to", "float", "type_as", "type", "contiguous",
    "clone", "dropout", "softmax", "log_softmax", "safe_softmax",
})  # fmt: skip
_SOFTMAXES = ("softmax", "log_softmax", "safe_softmax")
_MADE = (torch.zeros, torch.ones, torch.empty, torch.full)


class _Folded(NamedTuple):
    """A dim that is the product of two sizes, outer before inner: one a number, the other a size symbol; as
    arguments of a reshape (-1: what is left)."""

    dim: int
    lengths: tuple[Node | int, Node | int]
    symbols: tuple[str, str]

    @property
    def times(self) -> int:
        """Returns the number among the two sizes."""
        return next(n for n, symbol in zip(self.lengths, self.symbols) if isinstance(n, int) and not symbol)


def unmerge_batch(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place. Views must have their full shapes, every node `val` and `symbols`."""
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    folded = {node: where for node in graph.nodes if (where := _folded(node)) is not None}
    for region in list(nx.connected_components(_ties(folded))):
        alike = len({folded[node].lengths for node in region}) == 1
        if alike and all(_can(node, folded) for node in region):
            for node in [n for n in folded if n in region]:  # in the graph's order
                _rewrite(node, folded[node])
                matches += 1
    return edit.result(matches)


def _ties(folded: dict[Node, _Folded]) -> nx.Graph[Node]:
    ties: nx.Graph[Node] = nx.Graph()
    ties.add_nodes_from(folded)
    ties.add_edges_from((node, user) for node in folded for user in node.users if user in folded)
    return ties


def _folded(node: Node) -> _Folded | None:
    """Finds the dim of a tensor that is an input's size times a number: told by the sizes of a reshape, a repetition
    or a new tensor, or by the symbols of what is computed from one."""
    if not node_meta.is_tensor(node):
        return None
    symbols = [symbol.rpartition("*") for symbol in node_meta.symbols(node)]
    dims = [i for i, (length, _, count) in enumerate(symbols) if length and "?" not in length and count.isdecimal()]
    if len(dims) != 1:
        return None
    dim = dims[0]
    length, count = symbols[dim][0], int(symbols[dim][2])
    if _puts_in_front(node, dim, count):
        return _Folded(dim, (count, -1), ("", length))
    sizes = _sizes(node)
    if sizes is not None:
        size = sizes[dim]
        if not isinstance(size, Node) or size.target is not operator.mul or size.args[1] != count:
            return None
        return _Folded(dim, (size.args[0], count), (length, ""))
    for source in node.all_input_nodes:
        found = _folded(source)
        if found is not None and node_meta.symbols(source)[found.dim] == node_meta.symbols(node)[dim]:
            return found._replace(dim=dim)
    return None


def _puts_in_front(node: Node, dim: int, count: int) -> bool:
    """Returns whether a node repeats all rows `count` times, or reshapes them from [count, rows]."""
    if _repeats(node) is not None:
        return all(n == (count if d == dim else 1) for d, n in enumerate(_repeats(node) or ()))
    source = node.args[0] if node.op == "call_function" and node.target is torch.reshape else None
    if not isinstance(source, Node) or (sizes := _sizes(node)) is None or -1 in (*sizes[:dim], *sizes[dim + 1 :]):
        return False
    shape, symbols, after = node_meta.tensor(source).shape, node_meta.symbols(source), node_meta.tensor(node).shape
    inner = next((d for d in range(dim + 1, len(shape)) if not symbols[d]), len(shape))
    return (
        shape[: dim + 1] == (*after[:dim], count)
        and symbols[: dim + 1] == (*node_meta.symbols(node)[:dim], "")
        and math.prod(shape[dim:inner]) == after[dim]
    )


def _repeats(node: Node) -> tuple[Any, ...] | None:
    """Returns the repetitions of x.repeat(...), one a dim of x; None for other calls."""
    if node.op != "call_method" or node.target != "repeat":
        return None
    given = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return tuple(given) if len(given) == _rank(node.args[0]) else None


def _sizes(node: Node) -> tuple[Any, ...] | None:
    if node.op != "call_function":
        return None
    if node.target is torch.reshape:
        return tuple(node.args[1])
    if node.target in _MADE and node.args and isinstance(node.args[0], (tuple, list)):
        return tuple(node.args[0])
    return None


def _can(node: Node, folded: dict[Node, _Folded]) -> bool:
    dim = folded[node].dim
    if any(user not in folded and not _unfolds(user) for user in node.users):
        return False
    if _sizes(node) is not None or _puts_in_front(node, dim, folded[node].times):
        return True
    inputs = [a for a in node.all_input_nodes if node_meta.is_tensor(a)]
    name, rank = op_name(node), node_meta.tensor(node).dim()
    if name in ("bmm", "baddbmm", "matmul"):
        return rank == 3 and dim == 0 and all(a in folded and folded[a].dim == 0 and _rank(a) == 3 for a in inputs)
    if name == "transpose":
        return True
    if name in _SOFTMAXES and _along(node) % rank == dim:
        return False
    return name in _ROW_BY_ROW and all(
        (folded[a].dim == dim and _rank(a) == rank) if a in folded else _rank(a) < rank - dim for a in inputs
    )


def _unfolds(user: Node) -> bool:
    return user.op == "call_function" and user.target is torch.reshape


def _rank(node: Node) -> int:
    return int(node_meta.tensor(node).dim())


def _along(node: Node) -> int:
    return int(node.kwargs["dim"] if "dim" in node.kwargs else node.args[1])


def _rewrite(node: Node, where: _Folded) -> None:
    dim, lengths, symbols = where
    name, value, known = op_name(node), node_meta.val(node), node_meta.symbols(node)
    numbers = [value.shape[dim] // where.times if symbol else where.times for symbol in symbols]
    node_meta.set_val(node, value.new_empty((*value.shape[:dim], *numbers, *value.shape[dim + 1 :])))
    node_meta.set_symbols(node, (*known[:dim], *symbols, *known[dim + 1 :]))
    sizes = _sizes(node)
    if sizes is not None:
        at = 1 if node.target is torch.reshape else 0
        node.update_arg(at, (*sizes[:dim], *lengths, *sizes[dim + 1 :]))
    elif _repeats(node) is not None:
        _broadcast(node, dim, where.times)
    elif name == "transpose":
        _transpose(node, dim, value.dim())
    elif name in ("bmm", "matmul"):
        node.op, node.target = "call_function", torch.matmul
        node.args, node.kwargs = tuple(node.all_input_nodes), {}
    elif name == "baddbmm":
        _multiply_and_add(node)
    elif name in _SOFTMAXES:
        along = _along(node) % value.dim()
        node.args, node.kwargs = node.args[:1], {**node.kwargs, "dim": along + (along > dim)}


def _broadcast(node: Node, dim: int, count: int) -> None:
    source, rank = node.args[0], node_meta.tensor(node).dim()
    with node.graph.inserting_before(node):
        one = node.graph.call_method("unsqueeze", (source, dim))
    shape, symbols = node_meta.tensor(source).shape, node_meta.symbols(source)
    node_meta.copy(node, one)
    node_meta.set_val(one, node_meta.tensor(source).new_empty((*shape[:dim], 1, *shape[dim:])))
    node_meta.set_symbols(one, (*symbols[:dim], "", *symbols[dim:]))
    node.op, node.target, node.kwargs = "call_function", torch.broadcast_to, {}
    node.args = (one, tuple(count if d == dim else -1 for d in range(rank)))


def _transpose(node: Node, dim: int, rank: int) -> None:
    """Rewrites a transpose in place, over the two dims that the folded one becomes; `dim` is the folded one of what
    comes out."""
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
    """Writes baddbmm out: beta * input + alpha * (batch1 @ batch2)."""
    names = ("input", "batch1", "batch2")
    added, one, other = (node.args[i] if i < len(node.args) else node.kwargs[name] for i, name in enumerate(names))
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)

    def call(target: Callable[..., Any], *args: Any, like: Node = node) -> Node:
        made = node.graph.call_function(target, args)
        node_meta.copy(node, made)
        node_meta.set_val(made, node_meta.val(like))
        node_meta.set_symbols(made, node_meta.symbols(like))
        return made

    with node.graph.inserting_before(node):
        result = call(torch.matmul, one, other)
        if alpha != 1:
            result = call(operator.mul, result, alpha)
        if beta != 0:
            result = call(operator.add, added if beta == 1 else call(operator.mul, added, beta, like=added), result)
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
