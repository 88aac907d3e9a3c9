"""Reads off single nodes and rules what is asked where rows or tokens are followed through an op graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from cost_model.graph.op_graph import Op
from cost_model.rules.rule import DimLink
from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.op_graph.indexing import spelled_index


def is_link_of(links: Sequence[DimLink], dim: int | None) -> bool:
    """Returns whether a factor runs through dim `dim` of an input, whole and in order, and through nothing else of it;
    None: not through that input at all."""
    if dim is None:
        return not links
    return len(links) == 1 and links[0].dim == dim and links[0].pairs is None and not links[0].cover


def size_of(node: Node) -> str | None:
    """Returns the size symbol of a node that gives an int, "" for a constant; None where none is known."""
    if node.target is torch.ops.aten.sym_size.int and isinstance(node.args[0], Node):
        symbols, dim = node_meta.symbols(node.args[0]), argument(node, 1, "dim")
        return symbols[dim] if symbols and type(dim) is int else None
    return node_meta.size_symbol(node)


def index_tensors(node: Node) -> dict[int, Node]:
    """Returns the tensors in the index of x[...], by the dim of x that each picks from."""
    items = [item for item in spelled_index(node) if item is not None]
    return {dim: item for dim, item in enumerate(items) if isinstance(item, Node)}


def front_of(node: Node) -> int:
    """Returns the output dim at which the index tensors' own dims begin: where they stand, or 0 where something is
    between them; integers are taken out before."""
    items = [item for item in spelled_index(node) if type(item) is not int]
    places = [place for place, item in enumerate(items) if isinstance(item, Node)]
    return places[0] if places == list(range(places[0], places[-1] + 1)) else 0


def named(op: Op) -> str:
    return f"{op.kind.removeprefix('opaque.')} ({op.name}{', ' + op.source if op.source else ''})"
