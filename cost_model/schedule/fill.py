"""Fill: the seconds of a pipeline whose stages work on one part of the work each, and the number of parts that pays.

Parts (rows of a batch, chunks of a prompt) go through the stages in order. A stage begins a part when the stage before
has done it and its own last part is done. Each part costs its own reading of weights and its own fixed costs, which is
why more parts are not always faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # numbers of parts that are tried
# Parts are taken where they are predicted to save this share at least: predictions of one forward are off by 3 to 35 %
# (issue 14, measured at c1e3df6), and what they are off by is mostly alike for both ways.
WORTH = 1.05

Parts = Sequence[Sequence[float]]  # seconds of each part on each stage


@dataclass(frozen=True, slots=True)
class Filling:
    """A number of parts, and the predicted seconds in so many and in one."""

    count: int
    seconds: float
    seconds_in_one: float

    @property
    def gain(self) -> float:
        """How many times faster the parts are than all in one."""
        return self.seconds_in_one / self.seconds if self.seconds else 1.0

    def __str__(self) -> str:
        if self.count == 1:
            return "one microbatch: more are predicted to take as long"
        return f"{self.count} microbatches: {self.gain:.2f}x as fast as one, predicted"


def pipeline_seconds(parts: Parts) -> float:
    """Returns the seconds until the last stage has done the last part."""
    free: list[float] = []
    for part in parts:
        free = free or [0.0] * len(part)
        arrived = 0.0
        for stage, seconds in enumerate(part):
            arrived = free[stage] = max(free[stage], arrived) + seconds
    return free[-1] if free else 0.0


def round_seconds(parts: Parts) -> float:
    """Returns the seconds of a round of generating, in which each part (a group of rows) makes one step, where a
    group's next step begins when its last has come through all stages, and rounds follow each other for long."""
    busiest: float = max(sum(stage) for stage in zip(*parts, strict=True))
    return max(busiest, max(sum(part) for part in parts))


def best_filling(seconds_of: Callable[[int], float], most: int) -> Filling:
    """Returns the number of parts, `most` or fewer, that is predicted to be fastest; 1 where others save less than
    WORTH. `seconds_of(n)` are those of n parts together."""
    alone = best_seconds = seconds_of(1)
    best, worse = 1, 0
    for count in COUNTS[1:]:
        if count > most or worse == 2:  # the fill saves less and less, and what each part costs stays
            break
        seconds = seconds_of(count)
        worse = 0 if seconds < best_seconds else worse + 1
        if seconds < best_seconds:
            best, best_seconds = count, seconds
    return Filling(best, best_seconds, alone) if alone >= WORTH * best_seconds else Filling(1, alone, alone)
