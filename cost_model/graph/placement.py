"""How a tensor lies on the tp axis, and which elements of a dim each rank holds.

    R       whole on every rank                S(dim)  cut along `dim`
    P       a sum over the ranks is owed       O(rank) whole on one rank, and nowhere else: what one expert reads
    D(dim)  cut along `dim` so that whole experts lie on a rank each, where S(dim) would cut each of them
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

PLACEMENTS = "R, P, S(<dim>), D(<dim>) or O(<rank>)"
Interval = tuple[int, int]  # [start, stop) along one dim of the whole tensor


class Placement(NamedTuple):
    """`kind` is "R", "S", "D", "P" or "O"; `dim` is the sharded dim of an "S" or "D", the rank of an "O", else -1."""

    kind: str
    dim: int = -1

    @property
    def is_replicate(self) -> bool:
        return self.kind == "R"

    @property
    def is_shard(self) -> bool:
        return self.kind in ("S", "D")

    @property
    def is_dealt(self) -> bool:
        return self.kind == "D"

    @property
    def is_owned(self) -> bool:
        return self.kind == "O"

    @property
    def is_partial(self) -> bool:
        return self.kind == "P"

    def __str__(self) -> str:
        return f"{self.kind}({self.dim})" if self.kind in ("S", "D", "O") else self.kind

    @classmethod
    def parse(cls, text: str) -> Placement:
        """Inverse of str(). Raises ValueError on anything else."""
        if text in ("R", "P"):
            return cls(text)
        if text[:2] in ("S(", "D(", "O(") and text.endswith(")") and text[2:-1].isdecimal():
            return cls(text[0], int(text[2:-1]))
        raise ValueError(f"not a placement: {text!r} (expected {PLACEMENTS})")


REPLICATE = Placement("R")
PARTIAL = Placement("P")  # a sum over the tp axis is still owed


def shard(dim: int) -> Placement:
    return Placement("S", dim)


def dealt(dim: int) -> Placement:
    return Placement("D", dim)


def owned(tp_rank: int) -> Placement:
    return Placement("O", tp_rank)


@dataclass(frozen=True, slots=True)
class Layout:
    """Which elements of one dim (of `size` elements) each tp rank holds.

    `parts[r]` are the rank's intervals in ascending order; its local dim is their concatenation. Parts need not be
    equal (9 heads on 2 ranks), need not be one interval (each third of a fused q|k|v), and may overlap (a KV head
    held by several ranks). They cover the dim together.
    """

    size: int
    parts: tuple[tuple[Interval, ...], ...]

    def local_size(self, tp_rank: int) -> int:
        return sum(stop - start for start, stop in self.parts[tp_rank])

    @property
    def max_local_size(self) -> int:
        return max(self.local_size(r) for r in range(len(self.parts)))

    @property
    def is_whole(self) -> bool:
        """True when every rank holds everything, so that the dim is in fact replicated."""
        return all(part == ((0, self.size),) for part in self.parts)

    @property
    def overlaps(self) -> bool:
        """True when several ranks hold an element: a sum over the dim would then have it more than once."""
        return sum(self.local_size(r) for r in range(len(self.parts))) > self.size

    def local_range(self, tp_rank: int, start: int, stop: int) -> Interval:
        """Where the global elements [start, stop) that the rank holds lie in its local dim."""
        before = sum(max(0, min(b, start) - a) for a, b in self.parts[tp_rank])
        held = sum(max(0, min(b, stop) - max(a, start)) for a, b in self.parts[tp_rank])
        return before, before + held


def whole(size: int, ranks: int) -> Layout:
    return Layout(size, (((0, size),),) * ranks)


def intervals_of(indices: list[int]) -> tuple[Interval, ...]:
    """Runs of consecutive integers in an ascending list."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i:
            runs[-1][1] = i + 1
        else:
            runs.append([i, i + 1])
    return tuple((a, b) for a, b in runs)
