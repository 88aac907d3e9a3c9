"""Notices slices with fixed bounds along a dim that is a length: `mask[:, -window:]` is as long as the mask, or as the
window.

At both example sizes it is the window, a number, and so is what Python or the graph computes of its size. A guard says
on which side of the bound the length is: a call on the other has a graph of its own.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

from autodist_fx.tracing.versions.tracer_base import SymbolicProxy, SymbolicTracer
from passes.fx import node_meta


def guard_bounds(tracer: SymbolicTracer, x: SymbolicProxy, index: Any) -> None:
    """Make a guard of each fixed bound in x[index] on a length, where the model's own code says it: what transformers'
    common code cuts off (masks, caches) is of no consequence for shorter ones."""
    if not _is_the_models(tracer):
        return
    for dim, bound in _bounds(x, index):
        size = x.size(dim)
        known = getattr(size, "_metadata", None)
        if type(known) is int and tracer.other_example.value(size.node) != known:
            node_meta.set_guard_outcome((size >= bound).node, known >= bound)


def _bounds(x: SymbolicProxy, index: Any) -> Iterator[tuple[int, int]]:
    """Yield (dim, how many elements there have to be) of each bound that is a number; 1 is there always."""
    example = getattr(x, "_metadata", None)
    items = index if isinstance(index, tuple) else (index,)
    if not isinstance(example, torch.Tensor) or not all(map(_is_basic, items)):
        return
    taken = sum(i is not None and i is not Ellipsis for i in items)
    dim = 0
    for item in items:
        if item is Ellipsis:
            dim += example.dim() - taken
        elif item is not None:
            for bound in (item.start, item.stop) if isinstance(item, slice) else ():
                number = _number(bound)
                if number is not None and abs(number) > 1:
                    yield dim, abs(number)
            dim += 1


def _number(bound: Any) -> int | None:
    """Return a bound that is the same number for all inputs; None for others."""
    if isinstance(bound, SymbolicProxy):
        known = getattr(bound, "_metadata", None)
        same = type(known) is int and bound.tracer.other_example.value(bound.node) == known
        return known if same else None
    return bound if type(bound) is int else None


def _is_basic(item: Any) -> bool:
    """Return whether an index is a number, a slice, None or an ellipsis: tensors and lists have dims of their own."""
    if isinstance(item, SymbolicProxy):
        return isinstance(getattr(item, "_metadata", None), int)
    return isinstance(item, (slice, int, types.EllipsisType, types.NoneType))


def _is_the_models(tracer: SymbolicTracer) -> bool:
    """Return whether the innermost line outside of torch and of the tracer is in the model's source."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename in tracer.source_files:
            return True
        if "/transformers/" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return False


__all__ = ["guard_bounds"]
