"""Translates ops that pick elements by integers: x[index], index_add, gather, scatter, rows by counts."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.op_graph.handlers import Builder, Found, Handler, shape_of


def index_by_tensors(node: Node) -> tuple[tuple[int, int], ...] | None:
    """Returns (input dim, output dim) of every dim that x[...] takes whole, where some of the index are tensors of
    integers; None for masks as an index.

    As torch does it: integers and None first, then all tensors at once, whose common shape stands where they stand,
    or in front where something is between them. None for masks as an index.
    """
    items = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    shape = shape_of(node.args[0])
    takes = sum(1 for i in items if i is not None and i is not Ellipsis)
    at = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[at : at + 1] = [slice(None)] * (len(shape) - takes)
    dims: list[int | None] = []  # per dim that is left: the input dim, None for a new dim, -1 for an index tensor
    in_dim, index_rank = 0, 0
    for item in items:
        if item is None:
            dims.append(None)
            continue
        if isinstance(item, slice):
            dims.append(in_dim if item == slice(None) else None)
        elif isinstance(item, (Node, list)):
            value = node_meta.val(item) if isinstance(item, Node) else torch.tensor(item)
            if not isinstance(value, torch.Tensor) or value.dtype not in (torch.long, torch.int):
                return None
            index_rank = max(index_rank, value.dim())
            dims.append(-1)
        elif type(item) is not int:
            return None
        in_dim += 1
    tensors = [i for i, d in enumerate(dims) if d == -1]
    together = tensors == list(range(tensors[0], tensors[-1] + 1))
    front = tensors[0] if together else 0
    rest = [d for d in dims if d != -1]
    return tuple((d, i if i < front else i + index_rank) for i, d in enumerate(rest) if d is not None)


def _index_select(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    rank = len(shape_of(node))
    dim = argument(node, 1, "dim") % rank
    return "index", inputs, {"dims": tuple((d, d) for d in range(rank) if d != dim)}


def _index_add(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    if len(inputs) != 3:
        return None
    return "index_add", inputs, {"dim": argument(node, 1, "dim") % len(shape_of(node))}


def _gather(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    dim = argument(node, 2 if op_name(node) == "take_along_dim" else 1, "dim")
    if type(dim) is not int or len(inputs) != 2:
        return None
    return "gather", inputs, {"dim": dim % len(shape_of(node))}


def _scatter(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    dim = argument(node, 1, "dim")
    if type(dim) is not int or "reduce" in node.kwargs or len(inputs) not in (2, 3):
        return None
    return "scatter", inputs, {"dim": dim % len(shape_of(node)), "adds": op_name(node) == "scatter_add"}


def _split_rows(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "split_rows", inputs, {}


def _join_rows(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return "join_rows", inputs, {}


def _with_item(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates x[rows] = source: as index_add, but that what was there goes."""
    rows = node_meta.val(node.args[1]) if isinstance(node.args[1], Node) else None
    if not isinstance(rows, torch.Tensor) or rows.dim() != 1 or rows.dtype != torch.long or len(inputs) != 3:
        return None
    if node_meta.tensor(node.args[2]).dim() != len(shape_of(node)):
        return None
    return "index_put", inputs, {"dim": 0}


def _getitem(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    dims = basic_index(node)
    if dims is not None:
        picks = picked_elements(node)
        return "slice", inputs[:1], {"dims": dims, "picks": picks} if picks else {"dims": dims}
    kept = index_by_tensors(node)
    return None if kept is None else ("index", inputs, {"dims": kept})


def basic_index(node: Node) -> tuple[tuple[int, int, int, int], ...] | None:
    """Returns (input dim, output dim, start, step) of every dim that x[...] keeps; None for anything but slices,
    integers, None and Ellipsis. A start that follows the inputs counts as 0: such dims are never sharded."""
    shape, index = shape_of(node.args[0]), spelled_index(node)
    if any(not (i is None or isinstance(i, slice) or type(i) is int) for i in index):
        return None
    dims, in_dim, out_dim = [], 0, 0
    for i in index:
        if i is None:
            out_dim += 1
        elif isinstance(i, slice):
            start = i.start if isinstance(i.start, int) else 0
            dims.append((in_dim, out_dim, start % shape[in_dim] if start < 0 else start, i.step or 1))
            in_dim, out_dim = in_dim + 1, out_dim + 1
        else:
            in_dim += 1
    return tuple(dims)


def picked_elements(node: Node) -> tuple[tuple[int, int], ...]:
    """Returns (input dim, element) of every dim of constant size that x[...] takes one element of."""
    shape, symbols = shape_of(node.args[0]), node_meta.symbols(node.args[0])
    items = [item for item in spelled_index(node) if item is not None]
    return tuple(
        (d, item % shape[d]) for d, item in enumerate(items) if type(item) is int and not (symbols and symbols[d])
    )


def spelled_index(node: Node) -> list[Any]:
    """Returns the index of x[...] without an Ellipsis: an item for each dim of x, and None for each new one."""
    rank = len(shape_of(node.args[0]))
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    kept = sum(1 for i in index if i is not None and i is not Ellipsis)
    spelled: list[Any] = []
    for i in index:
        spelled += [slice(None)] * (rank - kept) if i is Ellipsis else [i]
    return spelled + [slice(None)] * (rank - sum(1 for i in spelled if i is not None))


HANDLERS: dict[str, Handler] = {
    "index_select": _index_select,
    "index_add": _index_add,
    "gather": _gather, "take_along_dim": _gather,
    "scatter": _scatter, "scatter_add": _scatter,
    "split_rows": _split_rows,
    "join_rows": _join_rows,
    "with_item": _with_item,
    "getitem": _getitem,
}  # fmt: skip
KINDS = ("index", "index_add", "index_put", "gather", "scatter", "split_rows", "join_rows", "slice")
