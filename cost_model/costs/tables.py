"""Tables of measured seconds over sizes, read in between by interpolating utilisation.

    seconds = fixed + bound / utilisation

A bound is what peak rates allow: FLOPs / peak, or bytes / bandwidth. How near an op comes to it changes slowly with its
sizes, where seconds change by orders of magnitude; so the logarithm of utilisation is interpolated, linearly in the
logarithms of the sizes (the method of AIConfigurator, arXiv 2601.06288, whose error for sizes that were not measured
fell from 64 % and more to 7 to 15 % by it). What was measured comes back as it was; beyond the sizes that were measured
utilisation stays what it is at the border, and the bound grows.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, log, prod

# A call's fixed cost is measured apart from the calls at other sizes: at least this share of their time is work.
_LEAST_WORK = 0.02

Sizes = tuple[float, ...]
Bound = Callable[[Sizes], float]  # seconds that peak rates allow for an op of these sizes


@dataclass(frozen=True, slots=True)
class Table:
    """The seconds of one kind of op, or of message, measured at all points of a grid.

    axes: ascending sizes along each dim of the grid; what they mean is the kind's (`compute.table_sizes`).
    seconds: of one op at each point, the last axis fastest; on a GPU, which computes while the host calls, those of
    the call and of the device, one after the other.
    fixed_seconds: of an op on tensors so small that only its call takes time.
    """

    kind: str
    dtype: str
    axes: tuple[Sizes, ...]
    seconds: tuple[float, ...]
    fixed_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.axes or any(not axis or list(axis) != sorted(set(axis)) or axis[0] <= 0 for axis in self.axes):
            raise ValueError(f"{self}: the sizes of each axis must be above 0 and ascending")
        points = prod(map(len, self.axes))
        if len(self.seconds) != points:
            raise ValueError(f"{self}: {len(self.seconds)} seconds for {points} points")
        if any(s <= 0 for s in self.seconds) or self.fixed_seconds < 0:
            raise ValueError(f"{self}: seconds must be above 0")

    def __str__(self) -> str:
        return f"table of {self.kind} {self.dtype}".rstrip()

    def points(self) -> Iterator[tuple[Sizes, float]]:
        """Yields (sizes, measured seconds) of each point."""
        yield from zip(itertools.product(*self.axes), self.seconds, strict=True)

    def utilisation(self, sizes: Sequence[float], bound: Bound) -> float:
        """Returns the share of the peak that an op of these sizes reaches, without its fixed cost."""
        return exp(sum(weight * self._log_utilisation(at, bound) for at, weight in self._corners(sizes)))

    def left_out(self, at: Sequence[int], bound: Bound) -> float | None:
        """Returns the seconds of a point, predicted from its neighbours alone: the mean, over the axes on which it has
        one on either side, of what they say. None for a point that has neighbours on both sides of no axis.

        at: the point's index along each axis.
        """
        guesses = []
        for axis, index in enumerate(at):
            sizes = self.axes[axis]
            if 0 < index < len(sizes) - 1:
                near, far = ((*at[:axis], index + step, *at[axis + 1 :]) for step in (-1, 1))
                share = _share(sizes[index], sizes[index - 1], sizes[index + 1])
                guesses.append(
                    (1 - share) * self._log_utilisation(near, bound) + share * self._log_utilisation(far, bound)
                )
        if not guesses:
            return None
        return self.fixed_seconds + bound(self._sizes(at)) / exp(sum(guesses) / len(guesses))

    def at(self, at: Sequence[int]) -> float:
        """Returns the measured seconds of a point, by its index along each axis."""
        flat = 0
        for index, axis in zip(at, self.axes, strict=True):
            flat = flat * len(axis) + index
        return self.seconds[flat]

    def _sizes(self, at: Sequence[int]) -> Sizes:
        return tuple(axis[index] for index, axis in zip(at, self.axes, strict=True))

    def _log_utilisation(self, at: Sequence[int], bound: Bound) -> float:
        measured = self.at(at)
        return log(bound(self._sizes(at)) / max(measured - self.fixed_seconds, _LEAST_WORK * measured))

    def _corners(self, sizes: Sequence[float]) -> Iterator[tuple[tuple[int, ...], float]]:
        """Yields the points around, by index, each with its weight; the weights add up to 1."""
        sides: list[list[tuple[int, float]]] = []
        for axis, size in zip(self.axes, sizes, strict=True):
            if size <= axis[0] or len(axis) == 1:
                sides.append([(0, 1.0)])
            elif size >= axis[-1]:
                sides.append([(len(axis) - 1, 1.0)])
            else:
                above = bisect_right(axis, size)
                share = _share(size, axis[above - 1], axis[above])
                sides.append([(above - 1, 1 - share), (above, share)] if share else [(above - 1, 1.0)])
        for corner in itertools.product(*sides):
            yield tuple(index for index, _ in corner), prod(weight for _, weight in corner)


def _share(size: float, low: float, high: float) -> float:
    """Returns where `size` lies between two others, from 0 to 1, by their logarithms."""
    return log(size / low) / log(high / low)
