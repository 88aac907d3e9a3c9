"""Placements of a tensor on the tp axis, and layouts: which elements of a dim each rank holds.

    R       whole on every rank                S(dim)  cut along `dim`
    P       a sum over the ranks is owed       O(rank) whole on one rank, and nowhere else: the tensors of one expert
    D(dim)  cut along `dim` between experts, each whole on one rank, where S(dim) would cut inside each expert

R, S and P are DTensor's Replicate, Shard and Partial; D and O are for expert parallelism.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PLACEMENTS = "R, P, S(<dim>), D(<dim>) or O(<rank>)"
Interval = tuple[int, int]  # [start, stop) along one dim of the whole tensor


class Placement(NamedTuple):
    """A placement: `kind` is R, S, D, P or O; `dim` the sharded dim of an S or D, the tp rank of an O, else -1."""

    kind: str
    dim: int = -1

    @property
    def is_replicate(self) -> bool:
        return self.kind == "R"

    @property
    def is_shard(self) -> bool:
        """True for S and D: each rank holds a part of one dim, which a layout describes."""
        return self.kind in ("S", "D")

    @property
    def is_dealt(self) -> bool:
        """True for D: each rank holds the elements of its own experts."""
        return self.kind == "D"

    @property
    def is_owned(self) -> bool:
        """True for O: one tp rank alone holds the tensor."""
        return self.kind == "O"

    @property
    def is_partial(self) -> bool:
        """True for P: each rank holds a summand of the tensor's shape."""
        return self.kind == "P"

    def __str__(self) -> str:
        return f"{self.kind}({self.dim})" if self.kind in ("S", "D", "O") else self.kind

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Parses what str() returned: "R", "S(0)". Raises ValueError on anything else."""
        if text in ("R", "P"):
            return cls(text)
        if text[:2] in ("S(", "D(", "O(") and text.endswith(")") and text[2:-1].isdecimal():
            return cls(text[0], int(text[2:-1]))
        raise ValueError(f"not a placement: {text!r} (expected {PLACEMENTS})")


REPLICATE = Placement("R")
PARTIAL = Placement("P")  # a sum over the tp axis is still owed


def shard(dim: int) -> Placement:
    """Returns S(dim)."""
    return Placement("S", dim)


def dealt(dim: int) -> Placement:
    """Returns D(dim)."""
    return Placement("D", dim)


def owned(tp_rank: int) -> Placement:
    """Returns O(tp_rank)."""
    return Placement("O", tp_rank)


@dataclass(frozen=True, slots=True)
class Layout:
    """The elements of one dim that each tp rank holds.

    The whole dim has `size` elements; `parts[r]` are the intervals of tp rank r in ascending order, and the rank's
    local dim is their concatenation. Parts need not be equal (9 heads on 2 ranks), need not be one interval (a piece of
    each third of a fused q|k|v), and may overlap (a KV head held by several ranks). They cover the dim together.
    """

    size: int
    parts: tuple[tuple[Interval, ...], ...]

    def local_size(self, tp_rank: int) -> int:
        """Returns the number of elements that the rank holds."""
        return sum(stop - start for start, stop in self.parts[tp_rank])

    @property
    def max_local_size(self) -> int:
        """Number of elements on the rank that holds most."""
        return max(self.local_size(r) for r in range(len(self.parts)))

    @property
    def is_whole(self) -> bool:
        """True if every rank holds all elements: the dim is in fact replicated."""
        return all(part == ((0, self.size),) for part in self.parts)

    @property
    def overlaps(self) -> bool:
        """True if some element is held by several ranks: a sum over the dim would count it more than once."""
        return sum(self.local_size(r) for r in range(len(self.parts))) > self.size

    def local_range(self, tp_rank: int, start: int, stop: int) -> Interval:
        """Maps the elements of the whole dim's interval [start, stop) that the rank holds to its local dim."""
        before = sum(max(0, min(b, start) - a) for a, b in self.parts[tp_rank])
        held = sum(max(0, min(b, stop) - max(a, start)) for a, b in self.parts[tp_rank])
        return before, before + held


def whole(size: int, ranks: int) -> Layout:
    """Returns the layout of a dim of `size` elements that every one of `ranks` ranks holds whole."""
    return Layout(size, (((0, size),),) * ranks)


def intervals_of(indices: list[int]) -> tuple[Interval, ...]:
    """Returns the runs of consecutive integers in an ascending list: [0, 1, 4] -> ((0, 2), (4, 5))."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return tuple((a, b) for a, b in runs)
