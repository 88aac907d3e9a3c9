"""Partitions a sequence into consecutive stages by dynamic programming, exactly, under several demands in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Spans:
    """The partitions of the places 0 to `last` into `stages` spans: span k, stage k, goes from place i to place j > i.

    Costs are functions cost(k, i, j). Objectives come in order of importance: `restrict` and `flatten` each rule out
    spans, `flatten` among the partitions that all demands so far have left; `shortest` then picks one of the rest.
    """

    def __init__(self, last: int, stages: int) -> None:
        self.last = last
        self.stages = stages
        self._demands: list[tuple[Callable[[int, int, int], float], Sequence[float]]] = []

    def restrict(self, cost: Callable[[int, int, int], float], most: Sequence[float]) -> None:
        """Demands that span k cost `most[k]` at most."""
        self._demands.append((cost, most))

    def flatten(self, cost: Callable[[int, int, int], float]) -> None:
        """Demands that no span cost more than the dearest span must: the least maximum that demands so far allow.

        Demands nothing where no partition is left.
        """
        found = self._best(cost, max)
        if found is not None:
            self.restrict(cost, [found[0]] * self.stages)

    def least(self, cost: Callable[[int, int, int], float]) -> float:
        """Returns the least cost of the dearest span, over all partitions, whatever is demanded."""
        found = Spans(self.last, self.stages)._best(cost, max)
        assert found is not None
        return found[0]

    def shortest(self, cost: Callable[[int, int, int], float]) -> list[int] | None:
        """Returns the ends, `stages` + 1 places from 0 to `last`, of the partition whose spans cost the least together;
        None where no partition is left."""
        found = self._best(cost, lambda a, b: a + b)
        return None if found is None else found[1]

    def _best(
        self, cost: Callable[[int, int, int], float], joined: Callable[[float, float], float]
    ) -> tuple[float, list[int]] | None:
        """Returns the least cost of a partition that meets all demands, and its ends; None where there is none.

        `joined` adds the cost of a span to that of the spans before it: max for the dearest span, + for the sum. Both
        grow with either argument, so that the best way to a place is a best way to the place before it and one span
        more: stages * last**2 steps in all, where there are C(last - 1, stages - 1) partitions.
        """
        # best[k]: place -> (cost of k spans up to it, place where the last of them begins). Of equal costs the earlier
        # place is taken, so that every process cuts alike.
        best: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
        for k in range(self.stages):
            row: dict[int, tuple[float, int]] = {}
            remaining = self.stages - 1 - k  # spans behind this one, each of which needs a place
            for j in range(k + 1, self.last - remaining + 1) if remaining else (self.last,):
                for i, (so_far, _) in best[k].items():
                    if i >= j or any(of(k, i, j) > most[k] for of, most in self._demands):
                        continue
                    option = (joined(so_far, cost(k, i, j)), i)
                    if j not in row or option < row[j]:
                        row[j] = option
            best.append(row)
        if self.last not in best[self.stages]:
            return None
        ends, at = [], self.last
        for k in range(self.stages, -1, -1):
            ends.append(at)
            at = best[k][at][1]
        return best[self.stages][self.last][0], ends[::-1]


def prefix_sums(values: Sequence[float]) -> list[float]:
    """Returns len(values) + 1 sums: entry i is the sum of the first i values."""
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    return sums


def running_totals(steps: Sequence[int]) -> list[int]:
    """Returns len(steps) sums: entry i is the sum of steps 0 to i."""
    total, out = 0, []
    for step in steps:
        total += step
        out.append(total)
    return out
