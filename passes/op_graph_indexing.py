"""op_graph's lines for ops that pick elements by integers: x[index], index_add, gather, scatter, rows by counts."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from cost_model.op_graph import TensorRef
from passes.normalize import op_name
from passes.op_graph import _handles, _shape, argument


def index_by_tensors(node: Node) -> tuple[tuple[int, int], ...] | None:
    """(input dim, output dim) of every dim that x[...] takes whole, where some of the index are tensors of integers.

    As torch does it: integers and None first, then all tensors at once, whose common shape stands where they stand,
    or in front where something is between them. None for masks as an index.
    """
    items = list(node.args[1]) if isinstance(node.args[1], tuple) else [node.args[1]]
    shape = _shape(node.args[0])
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
            value = item.meta.get("val") if isinstance(item, Node) else torch.tensor(item)
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


@_handles("index_select")
def _index_select(builder: Any, node: Node, inputs: list[TensorRef]) -> Any:
    rank = len(_shape(node))
    dim = argument(node, 1, "dim") % rank
    return "index", inputs, {"dims": tuple((d, d) for d in range(rank) if d != dim)}


@_handles("index_add")
def _index_add(builder: Any, node: Node, inputs: list[TensorRef]) -> Any:
    if len(inputs) != 3:
        return None
    return "index_add", inputs, {"dim": argument(node, 1, "dim") % len(_shape(node))}


@_handles("gather", "take_along_dim")
def _gather(builder: Any, node: Node, inputs: list[TensorRef]) -> Any:
    dim = argument(node, 2 if op_name(node) == "take_along_dim" else 1, "dim")
    if type(dim) is not int or len(inputs) != 2:
        return None
    return "gather", inputs, {"dim": dim % len(_shape(node))}


@_handles("scatter", "scatter_add")
def _scatter(builder: Any, node: Node, inputs: list[TensorRef]) -> Any:
    dim = argument(node, 1, "dim")
    if type(dim) is not int or "reduce" in node.kwargs or len(inputs) not in (2, 3):
        return None
    return "scatter", inputs, {"dim": dim % len(_shape(node)), "adds": op_name(node) == "scatter_add"}


@_handles("split_rows")
def _split_rows(builder: Any, node: Node, inputs: list[TensorRef]) -> Any:
    return "split_rows", inputs, {}


@_handles("join_rows")
def _join_rows(builder: Any, node: Node, inputs: list[TensorRef]) -> Any:
    return "join_rows", inputs, {}


@_handles("with_item")
def _with_item(builder: Any, node: Node, inputs: list[TensorRef]) -> Any:
    """x[rows] = source: as index_add, but that what was there goes."""
    rows = node.args[1].meta.get("val") if isinstance(node.args[1], Node) else None
    if not isinstance(rows, torch.Tensor) or rows.dim() != 1 or rows.dtype != torch.long or len(inputs) != 3:
        return None
    if node.args[2].meta["val"].dim() != len(_shape(node)):
        return None
    return "index_put", inputs, {"dim": 0}
