"""Finds where the rows of the batch lie in a tensor, also where they are folded with other dims.

    [B, heads, S, T]                                 rows along dim 0
    [B*S, hidden], reshaped from [B, S, hidden]      rows along dim 0, S elements each
    [heads, S], [1, heads, S, S]                     no rows: the same for all
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.errors import PlanError
from passes.fx import node_meta
from passes.fx.nodes import op_name
from passes.op_graph.elementwise import FUNCTION_KINDS, MODULE_KINDS

BATCH = "B"
# Ops that leave a dim's elements in their order, where the dim is as long behind them as before.
_KEEP_ORDER = frozenset({
    *FUNCTION_KINDS, *MODULE_KINDS, "linear", "Linear", "Conv1D", "matmul", "bmm", "baddbmm", "embedding", "Embedding",
    "layer_norm", "LayerNorm", "rms_norm", "RMSNorm", "softmax", "log_softmax", "safe_softmax", "transpose", "permute",
    "unsqueeze", "squeeze", "expand", "broadcast_to", "getitem", "narrow", "split", "chunk", "unbind", "cat",
    "repeat_interleave", "seeded_dropout", "dropout", "dropout1d", "dropout2d", "dropout3d", "Dropout", "Dropout1d",
    "Dropout2d", "Dropout3d", "rand_like", "bernoulli", "uniform_", "rrelu", "RReLU",
})  # fmt: skip

_Size = tuple[int, tuple[str, ...]]  # a number times size symbols: "B*S*4" is (4, ("B", "S"))


def batch_rows(node: Node, drawn: int) -> tuple[int, Any, Any] | None:
    """Returns (dim, outer, inner) of the rows among the first `drawn` dims of a tensor, numbers or nodes (see
    passes/ops/random.py); None where these are the same for all rows. Makes nodes for lengths that it needs.

    Raises PlanError, a part of a sentence, where that cannot be told.
    """
    symbols = node_meta.symbols(node)[:drawn]
    dims = [d for d, symbol in enumerate(symbols) if BATCH in symbol.split("*")]
    if any("~" in symbol for symbol in symbols) or (not dims and any("?" in symbol for symbol in symbols)):
        raise PlanError(f"its rows [{', '.join(symbols)}] are chosen by values, or cut in a way that nothing tells")
    if len(dims) > 1:
        raise PlanError(f"rows of the batch lie along several dims of [{', '.join(symbols)}]")
    if not dims:
        return None
    outer, inner = _place(node, dims[0])
    return dims[0], length_node(node.graph, outer), length_node(node.graph, inner)


def _place(node: Node, dim: int) -> tuple[_Size, _Size]:
    """Returns what a dim's elements are split into outside and inside of the rows."""
    symbol = node_meta.symbols(node)[dim]
    if symbol == BATCH:
        return (1, ()), (1, ())
    if node.op == "call_function" and node.target is torch.reshape:
        return _place_before_reshape(node, dim)
    for source in node.all_input_nodes if node.op.startswith("call") and op_name(node) in _KEEP_ORDER else ():
        if node_meta.is_tensor(source) and node_meta.symbols(source).count(symbol) == 1:
            return _place(source, node_meta.symbols(source).index(symbol))
    raise PlanError(f"which of its {symbol} rows are of one sequence cannot be told at {node.name}")


def _place_before_reshape(node: Node, dim: int) -> tuple[_Size, _Size]:
    source = node.args[0]
    before, after = _sizes(source), _sizes(node)
    for first in range(len(before)):
        for last in range(first + 1, len(before) + 1):
            if _product(before[:first]) == _product(after[:dim]) and _product(before[first:last]) == after[dim]:
                at = next(d for d in range(first, last) if BATCH in before[d][1])
                outer, inner = _place(source, at)
                return _product([*before[first:at], outer]), _product([inner, *before[at + 1 : last]])
    raise PlanError(f"{node.name} cuts rows of the batch in pieces")


def _sizes(node: Node) -> list[_Size]:
    return [as_factors(n, s) for n, s in zip(node_meta.tensor(node).shape, node_meta.symbols(node), strict=True)]


def as_factors(number: int, symbol: str) -> tuple[int, tuple[str, ...]]:
    """Returns a dim's size as a number times size symbols: "B*S*4" is (4, ("B", "S")), a constant 8 is (8, ())."""
    if not symbol or symbol.startswith("?"):
        return (1, (symbol,)) if symbol else (number, ())
    factors = symbol.split("*")
    return math.prod(int(f) for f in factors if f.isdecimal()), tuple(f for f in factors if not f.isdecimal())


def _product(sizes: Sequence[_Size]) -> _Size:
    return math.prod(number for number, _ in sizes), tuple(sorted(f for _, factors in sizes for f in factors))


def length_node(graph: torch.fx.Graph, size: tuple[int, tuple[str, ...]]) -> Any:
    """Returns a size, a number times size symbols, as a number or as a node at the top of the graph, which computes it
    from inputs' sizes. Raises PlanError, a part of a sentence, for symbols that no input has."""
    number, symbols = size
    found: Any = number
    for symbol in symbols:
        length = _of_inputs(graph, symbol)
        if found == 1:
            found = length
            continue
        last = max((n for n in (length, found) if isinstance(n, Node)), key=list(graph.nodes).index)
        with graph.inserting_after(last):
            product = graph.call_function(operator.mul, (length, found))
        value = node_meta.val(found) if isinstance(found, Node) else found
        node_meta.set_val(product, node_meta.val(length) * value)
        found = product
    return found


def _of_inputs(graph: torch.fx.Graph, symbol: str) -> Node:
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    places = [(n, d) for n in inputs for d, own in enumerate(node_meta.symbols(n)) if own == symbol]
    if not places:
        raise PlanError(f"its size {symbol} is no input's")
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int and node.args in places:
            return node
    source, dim = places[0]
    with graph.inserting_after(inputs[-1]):
        length = graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
    node_meta.set_val(length, node_meta.tensor(source).shape[dim])
    return length
