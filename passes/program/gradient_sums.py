"""Computes which gradients of parameters are sums over ranks, box by box of their elements.

A backward pass leaves on each rank a gradient of each tensor that the rank holds. Where all ranks of a stage did the
same with a whole parameter, each has the whole gradient. Where each did its own (the scale of a norm over the heads
that a rank has, a KV head that several ranks' queries read), each has a term. And stages have a term each of a weight
that they share (tied embeddings). Elements held by one rank alone, of one stage alone, owe nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cost_model.graph.placement import Interval
from cost_model.mesh import Mesh

Box = tuple[Interval, ...]  # an interval of each dim of a whole parameter
Holder = tuple[int, str]  # global rank, path of a parameter in its module


@dataclass(frozen=True, slots=True)
class GradSum:
    """A sum that is owed after a backward pass: what `terms` have of the gradient of `box`, added up, is what all
    `holders` are to have.

    `source` is the parameter's name in the model; `box` [start, stop) of each of its dims, in the whole parameter.
    A holder that is no term has, before, the same as one of the terms.
    """

    source: str
    box: Box
    terms: tuple[Holder, ...]
    holders: tuple[Holder, ...]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Returns the global ranks that take part, each once."""
        return tuple(dict.fromkeys(rank for rank, _ in self.holders))


@dataclass(frozen=True, slots=True)
class ParamUse:
    """The use of one tensor by a stage's ranks, at one path. `parts[t]`: the elements of `dim` that tp rank t has;
    `dim` None for the whole.

    `owed`: each rank has a term of its gradient, and not all of it. `holders`: the tp ranks that have the tensor.
    """

    source: str
    path: str
    shape: tuple[int, ...]
    dim: int | None
    parts: tuple[tuple[Interval, ...], ...]
    owed: bool
    holders: tuple[int, ...]

    def boxes(self, tp_rank: int) -> list[Box]:
        """Returns the boxes of the parameter that a tp rank has."""
        whole = tuple((0, n) for n in self.shape)
        if self.dim is None:
            return [whole]
        return [(*whole[: self.dim], run, *whole[self.dim + 1 :]) for run in self.parts[tp_rank]]


def grad_sums(mesh: Mesh, uses: Mapping[int, Sequence[ParamUse]]) -> tuple[GradSum, ...]:
    """Returns all sums that are owed, of all ranks, given what each stage does with its parameters."""
    by_source: dict[str, list[tuple[int, ParamUse]]] = {}
    for stage in sorted(uses):
        for use in uses[stage]:
            by_source.setdefault(use.source, []).append((stage, use))
    found: list[GradSum] = []
    for source, own in by_source.items():
        boxes = [box for _, use in own for t in use.holders for box in use.boxes(t)]
        sums: list[GradSum] = []
        for cell in cells(boxes):
            terms: list[Holder] = []
            holders: list[Holder] = []
            for stage, use in own:
                having = [t for t in use.holders if any(contains(box, cell) for box in use.boxes(t))]
                having_it = [(mesh.rank(stage, t), use.path) for t in having]
                holders += having_it
                terms += having_it if use.owed or use.dim is not None else having_it[:1]
            if len(terms) > 1:
                _add(sums, GradSum(source, cell, tuple(terms), tuple(holders)))
        found += sums
    return tuple(found)


def of_rank(sums: Iterable[GradSum], rank: int) -> tuple[GradSum, ...]:
    """Returns the sums that a rank takes part in."""
    return tuple(s for s in sums if rank in s.ranks)


def cells(boxes: Sequence[Box]) -> list[Box]:
    """Cuts a parameter along the edges of `boxes`: each of the boxes returned is wholly in or outside of any of
    them."""
    edges = [sorted({edge for box in boxes for edge in box[d]}) for d in range(len(boxes[0]))]
    return list(itertools.product(*(itertools.pairwise(e) for e in edges)))


def contains(box: Box, cell: Box) -> bool:
    """Returns whether `cell` lies in `box`."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(box, cell, strict=True))


def _add(sums: list[GradSum], new: GradSum) -> None:
    """Appends a sum, joined with the last one where that is the same sum of the elements just before."""
    if sums and (sums[-1].terms, sums[-1].holders) == (new.terms, new.holders):
        differing = [d for d, (a, b) in enumerate(zip(sums[-1].box, new.box, strict=True)) if a != b]
        if len(differing) == 1 and sums[-1].box[differing[0]][1] == new.box[differing[0]][0]:
            d = differing[0]
            box = (*new.box[:d], (sums[-1].box[d][0], new.box[d][1]), *new.box[d + 1 :])
            sums[-1] = GradSum(new.source, box, new.terms, new.holders)
            return
    sums.append(new)
