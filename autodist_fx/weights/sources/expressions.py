"""Tensors that are put together of a checkpoint's tensors, and read in slices without the rest.

    Joined([Stored(w1), Stored(w3)], dim=0)       torch.cat((w1, w3), dim=0)
        .fill(out, {0: ((4, 8),)})                the rows of w1 and w3 that are rows 4 to 8 of both together

A slice is asked for by its intervals in each dim that is cut. Each node finds the slices of its operands that hold it,
down to tensors in files, which are read straight into their place in the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch

from autodist_fx.weights.sources.source import WeightSource
from cost_model.graph.placement import Interval

Cuts = Mapping[int, Sequence[Interval]]  # by dim, the elements [start, stop) that are wanted; all of any other dim


class Expression(Protocol):
    """A tensor of a checkpoint, or one that is computed of several."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is stored: of several tensors one that is no floating-point dtype, if there is any."""

    def fill(self, out: torch.Tensor, cuts: Cuts) -> None:
        """Write the slice `cuts`, cast to the dtype of `out`, into `out`, which has its shape and any strides."""


class Stored:
    """A tensor of a source, under the source's name."""

    def __init__(self, source: WeightSource, name: str) -> None:
        self.source, self.name = source, name
        self.shape, self.dtype = source.shape(name), source.dtype(name)

    def fill(self, out: torch.Tensor, cuts: Cuts) -> None:
        """Read one dim's intervals from the source; those of the dim that leaves the least, where several are cut."""
        cuts = _proper(cuts, self.shape)
        if not cuts:
            self.source.read(self.name, out=out)
            return
        dim = min(cuts, key=lambda d: _held(cuts[d]) / max(1, self.shape[d]))
        rest = {d: intervals for d, intervals in cuts.items() if d != dim}
        if not rest:
            self.source.read(self.name, dim, cuts[dim], out=out)
        else:
            out.copy_(narrowed(self.source.read(self.name, dim, cuts[dim], out.dtype), rest))


class Joined:
    """Tensors one behind the other along a dim (torch.cat). Raises ValueError where their other dims differ."""

    def __init__(self, parts: Sequence[Expression], dim: int) -> None:
        first = parts[0].shape
        for part in parts:
            if len(part.shape) != len(first) or any(part.shape[d] != n for d, n in enumerate(first) if d != dim):
                raise ValueError(f"shapes {list(first)} and {list(part.shape)} do not go together")
        self._parts, self._dim = tuple(parts), dim
        self.shape = (*first[:dim], sum(part.shape[dim] for part in parts), *first[dim + 1 :])
        self.dtype = next((part.dtype for part in parts if not part.dtype.is_floating_point), parts[0].dtype)

    def fill(self, out: torch.Tensor, cuts: Cuts) -> None:
        """Fill each interval from the parts that it lies in."""
        dim, at = self._dim, 0
        for start, stop in cuts.get(dim, ((0, self.shape[dim]),)):
            begin = 0
            for part in self._parts:
                end = begin + part.shape[dim]
                first, last = max(start, begin), min(stop, end)
                if first < last:
                    here = out.narrow(dim, at, last - first)
                    part.fill(here, {**cuts, dim: ((first - begin, last - begin),)})
                    at += last - first
                begin = end


class Part:
    """The elements [start, stop) of a dim (torch.narrow)."""

    def __init__(self, base: Expression, dim: int, start: int, stop: int) -> None:
        self._base, self._dim, self._start, self._stop = base, dim, start, stop
        self.shape = (*base.shape[:dim], stop - start, *base.shape[dim + 1 :])
        self.dtype = base.dtype

    def fill(self, out: torch.Tensor, cuts: Cuts) -> None:
        """Fill from the same elements, counted from the start of the base."""
        wanted = cuts.get(self._dim, ((0, self._stop - self._start),))
        moved = tuple((a + self._start, b + self._start) for a, b in wanted)
        self._base.fill(out, {**cuts, self._dim: moved})


class Permuted:
    """The same elements with the dims in another order (torch.permute): dim d is dim order[d] of the base."""

    def __init__(self, base: Expression, order: Sequence[int]) -> None:
        self._base, self._order = base, tuple(order)
        self.shape = tuple(base.shape[d] for d in order)
        self.dtype = base.dtype

    def fill(self, out: torch.Tensor, cuts: Cuts) -> None:
        """Fill the base's order of dims, as a view of `out`."""
        back = [self._order.index(d) for d in range(len(self._order))]
        self._base.fill(out.permute(back), {self._order[d]: intervals for d, intervals in cuts.items()})


class Reshaped:
    """The same elements, in the same order, in another shape (torch.reshape)."""

    def __init__(self, base: Expression, shape: Sequence[int]) -> None:
        self._base, self.shape, self.dtype = base, tuple(shape), base.dtype

    def fill(self, out: torch.Tensor, cuts: Cuts) -> None:
        """Follow cuts to the base where whole rows of it are wanted; make any other of the whole dim."""
        cuts = _proper(cuts, self.shape)
        followed = self._followed(cuts)
        rest = {d: intervals for d, intervals in cuts.items() if d not in followed}
        there = dict(followed.values())
        held = tuple(_held(there[d]) if d in there else size for d, size in enumerate(self._base.shape))
        if rest or not out.is_contiguous():
            shape = [_held(cuts[d]) if d in followed else size for d, size in enumerate(self.shape)]
            whole = torch.empty(shape, dtype=out.dtype, device=out.device)
            self._base.fill(whole.view(held), there)
            out.copy_(narrowed(whole, rest))
        else:
            self._base.fill(out.view(held), there)

    def _followed(self, cuts: Cuts) -> dict[int, tuple[int, Sequence[Interval]]]:
        """Return, by dim that is cut, the dim of the base that holds the same elements, and its intervals.

        Dims that are split or merged fall into groups of equal products. The first dim of a group on one side runs
        through whole blocks of the first dim on the other: a head's rows are so many rows of the projection.
        """
        found: dict[int, tuple[int, Sequence[Interval]]] = {}
        for of_base, of_result in _groups(self._base.shape, self.shape) if 0 not in self.shape else ():
            outer = next((d for d in of_result if self.shape[d] != 1), None)
            base = next((d for d in of_base if self._base.shape[d] != 1), None)
            if outer is None or base is None or outer not in cuts:
                continue
            block = math.prod(self.shape[d] for d in of_result if d > outer)
            row = math.prod(self._base.shape[d] for d in of_base if d > base)
            flat = [(start * block, stop * block) for start, stop in cuts[outer]]
            if all(start % row == stop % row == 0 for start, stop in flat):
                found[outer] = base, tuple((start // row, stop // row) for start, stop in flat)
        return found


def _groups(base: Sequence[int], result: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of dims of two shapes of the same elements that have the same product."""
    i = j = 0
    while i < len(base) or j < len(result):
        of_base: list[int] = []
        of_result: list[int] = []
        left = right = 1
        while not (of_base or of_result) or left != right:
            if j == len(result) or (i < len(base) and left <= right):
                of_base, left, i = [*of_base, i], left * base[i], i + 1
            else:
                of_result, right, j = [*of_result, j], right * result[j], j + 1
        yield of_base, of_result


def _proper(cuts: Cuts, shape: Sequence[int]) -> Cuts:
    """Leave out dims that are wanted whole and in order."""
    return {d: tuple(i) for d, i in cuts.items() if tuple(i) != ((0, shape[d]),)}


def _held(intervals: Sequence[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)


def narrowed(tensor: torch.Tensor, cuts: Cuts) -> torch.Tensor:
    """Return the slice of a tensor that is in memory."""
    for dim, intervals in cuts.items():
        tensor = torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in (*intervals, (0, 0))], dim)
    return tensor
