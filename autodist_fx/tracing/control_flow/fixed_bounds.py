"""Notices ops that come out otherwise on the other side of a fixed number, along a dim that is a length.

    mask[:, -window:]    is as long as the mask, or as the window
    ids.squeeze(1)       has a dim less for a single token

At both example sizes a length is on the same side, and so is what Python or the graph computes of what the op gives. A
guard says on which: a call on the other has a graph of its own.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from autodist_fx.tracing.versions.tracer_base import SymbolicProxy, SymbolicTracer
from passes.fx import node_meta


def guard_bounds(tracer: SymbolicTracer, x: SymbolicProxy, index: Any) -> None:
    """Make a guard of each fixed bound in x[index] on a length, where the model's own code says it: what transformers'
    common code cuts off (masks, caches) is of no consequence for shorter ones."""
    line = _line_of_the_model(tracer)
    example = getattr(x, "_metadata", None)
    if line is None or not isinstance(example, torch.Tensor):
        return
    for dim, bound in _bounds(example, index):
        known, number = example.shape[dim], _example_of(bound)
        # Each layer of a deep model halves its heads on the same line: what was no length in one is none in the next.
        place = (*line, example.shape, dim, number)
        if type(number) is not int or abs(number) <= 1 or place in tracer.constant_dims:  # one element is there always
            continue
        if not _is_for_all(bound, number):
            continue
        if tracer.other_example.value(x.node).shape[dim] == known:
            tracer.constant_dims.add(place)
        else:
            node_meta.set_guard_outcome((x.size(dim) >= abs(number)).node, known >= abs(number))


def guard_squeeze(tracer: SymbolicTracer, x: Any, dims: Sequence[Any]) -> None:
    """Make a guard of each length that x.squeeze(*dims) would leave out if it were 1, wherever that is said."""
    example = getattr(x, "_metadata", None)
    if not isinstance(example, torch.Tensor):
        return
    chosen = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    for dim in chosen or range(example.dim()):
        place = ("squeeze", example.shape, dim)
        if place in tracer.constant_dims:
            continue
        if tracer.other_example.value(x.node).shape[dim] == example.shape[dim]:
            tracer.constant_dims.add(place)
        else:  # in these words, since a comparison with 1 is taken for a shortcut (extract_guards)
            node_meta.set_guard_outcome((x.size(dim) < 2).node, example.shape[dim] < 2)


def _bounds(example: torch.Tensor, index: Any) -> Iterator[tuple[int, Any]]:
    """Yield (dim, bound) of each slice's bounds."""
    items = index if isinstance(index, tuple) else (index,)
    if not all(map(_is_basic, items)):
        return
    taken = sum(i is not None and i is not Ellipsis for i in items)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += example.dim() - taken
        elif item is not None:
            if isinstance(item, slice):
                yield from ((dim, bound) for bound in (item.start, item.stop))
            dim += 1


def _example_of(bound: Any) -> Any:
    """Return what a bound, which may be traced, is for the example inputs; None where that is not known."""
    return getattr(bound, "_metadata", None) if isinstance(bound, SymbolicProxy) else bound


def _is_for_all(bound: Any, number: int) -> bool:
    """Return whether a bound is the same number for all inputs."""
    return not isinstance(bound, SymbolicProxy) or bound.tracer.other_example.value(bound.node) == number


def _is_basic(item: Any) -> bool:
    """Return whether an index is a number, a slice, None or an ellipsis: tensors and lists have dims of their own."""
    if isinstance(item, SymbolicProxy):
        return isinstance(_example_of(item), int)
    return isinstance(item, (slice, int, types.EllipsisType, types.NoneType))


def _line_of_the_model(tracer: SymbolicTracer) -> tuple[str, int] | None:
    """Return the innermost line outside of torch and of the tracer, where it is in the model's source; else None."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename in tracer.source_files:
            return frame.f_code.co_filename, frame.f_lineno
        if "/transformers/" in frame.f_code.co_filename:
            return None
        frame = frame.f_back
    return None


__all__ = ["guard_bounds", "guard_squeeze"]
