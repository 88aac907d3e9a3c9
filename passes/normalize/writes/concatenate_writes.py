"""concatenate_writes: turns pieces that are written one by one into a new tensor into one concatenation of them.

    before  %new = new_empty(%x, 2, 4, 7, 12)
            %a = with_item(%new, (..., :8), copied(%new[..., :8], %nope))
            %b = with_item(%a, (..., 8:), copied(%a[..., 8:], %rope))
    after   %b = cat([%nope, %rope], 3)

Nothing says of a write how the tensor may be split, and of a concatenation its rule does.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx
from torch.fx import Node

from passes.fx import node_meta
from passes.fx.nodes import op_name
from passes.fx.run_passes import GraphEdit, PassResult
from passes.fx.shape_propagation import NormalizeContext
from passes.op_graph.indexing import spelled_index
from passes.ops.functional_writes import copied, with_item

# Calls that make a tensor of no other's values: what is overwritten in it is lost to nobody, gradients included.
_NEW = frozenset({
    "new_empty", "new_zeros", "new_ones", "new_full", "empty", "zeros", "ones", "full", "empty_like", "zeros_like",
    "ones_like", "full_like",
})  # fmt: skip


def concatenate_writes(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Rewrites `graph_module` in place; nodes that nothing uses any more are left to eliminate_dead_code.

    Matches are the tensors of which every element is written once, in pieces along one dim, none of another dtype than
    the tensor has.
    """
    graph, edit, matches = graph_module.graph, GraphEdit(graph_module), 0
    for node in list(graph.nodes):
        found = _pieces(node)
        if found is None:
            continue
        dim, pieces = found
        with graph.inserting_before(node):
            joined = graph.call_function(torch.cat, ([pieces[start] for start in sorted(pieces)], dim))
        node_meta.copy(node, joined)
        node.replace_all_uses_with(joined)
        matches += 1
    return edit.result(matches)


@dataclass(frozen=True, slots=True)
class _Write:
    """One piece that a with_item writes: elements `start` to `stop` of `dim`, all of them in every other dim."""

    dim: int
    start: int
    stop: int
    value: Node


def _pieces(node: Node) -> tuple[int, Mapping[int, Node]] | None:
    """Returns (dim, {first element: piece}) of a tensor that is nothing but pieces written into a new one; else
    None."""
    found: dict[int, Node] = {}
    dim, covered = -1, 0
    write = _write(node)
    while write is not None and dim in (-1, write.dim):
        dim = write.dim
        found[write.start] = write.value
        covered += write.stop - write.start
        node = node.args[0]
        if covered == node_meta.tensor(node).shape[dim]:
            return (dim, found) if op_name(node) in _NEW and _tile(found, dim) else None
        write = _write(node)
    return None


def _tile(pieces: Mapping[int, Node], dim: int) -> bool:
    """Returns whether pieces, by their first elements, lie one behind the other, from 0."""
    end = 0
    for start in sorted(pieces):
        if start != end:
            return False
        end += node_meta.tensor(pieces[start]).shape[dim]
    return True


def _write(node: Node) -> _Write | None:
    """Returns what a node writes, if it is a with_item of a plain piece."""
    if node.target is not with_item or not node_meta.is_tensor(node.args[0]) or not isinstance(node.args[2], Node):
        return None
    whole, value = node.args[0], _written(node)
    shape, symbols = node_meta.tensor(whole).shape, node_meta.symbols(whole)
    index = spelled_index(node)
    if not all(isinstance(i, slice) for i in index) or len(symbols) != len(shape):
        return None
    cut = [d for d, i in enumerate(index) if i != slice(None)]
    if len(cut) != 1 or symbols[cut[0]] or not all(_is_number(n) for n in (index[cut[0]].start, index[cut[0]].stop)):
        return None
    dim = cut[0]
    start, stop, step = index[dim].indices(shape[dim])
    wanted = (*shape[:dim], stop - start, *shape[dim + 1 :])
    fits = (
        node_meta.is_tensor(value)
        and node_meta.tensor(value).shape == wanted
        and node_meta.tensor(value).dtype == node_meta.tensor(whole).dtype
        and node_meta.symbols(value) == symbols
    )
    return _Write(dim, start, stop, value) if fits and step == 1 and start < stop else None


def _written(node: Node) -> Node:
    """Returns what a with_item writes: of a copy into the piece itself, what is copied."""
    value: Node = node.args[2]
    if value.target is copied and isinstance(value.args[1], Node):
        piece = value.args[0]
        if piece.target is operator.getitem and piece.args[0] is node.args[0] and piece.args[1] == node.args[1]:
            return value.args[1]
    return value


def _is_number(bound: object) -> bool:
    return bound is None or type(bound) is int
