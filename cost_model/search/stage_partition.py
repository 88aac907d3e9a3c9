"""stage partition."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Spans:
    """Ways to go from end 0 to end `last` in `stages` steps forward. Step k from i to j is ruled out by `restrict` and
    `flatten`, one demand after the other; `shortest` then picks among what is left."""

    def __init__(self, last: int, stages: int) -> None:
        self.last = last
        self.stages = stages
        self._demands: list[tuple[Callable[[int, int, int], float], Sequence[float]]] = []

    def restrict(self, cost: Callable[[int, int, int], float], most: Sequence[float]) -> None:
        """Step k costs `most[k]` at most."""
        self._demands.append((cost, most))

    def flatten(self, cost: Callable[[int, int, int], float]) -> None:
        """No step costs more than the dearest step has to."""
        found = self._best(cost, max)
        if found is not None:
            self.restrict(cost, [found[0]] * self.stages)

    def least(self, cost: Callable[[int, int, int], float]) -> float:
        """What the dearest step costs at least, whatever else is demanded; there is a way."""
        found = Spans(self.last, self.stages)._best(cost, max)
        assert found is not None
        return found[0]

    def shortest(self, cost: Callable[[int, int, int], float]) -> list[int] | None:
        """The ends of the way whose steps cost the least together; None where there is no way."""
        found = self._best(cost, lambda a, b: a + b)
        return None if found is None else found[1]

    def _best(
        self, cost: Callable[[int, int, int], float], joined: Callable[[float, float], float]
    ) -> tuple[float, list[int]] | None:
        best: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]  # end -> (cost so far, end before it)
        for k in range(self.stages):
            row: dict[int, tuple[float, int]] = {}
            left = self.stages - 1 - k  # steps after this one
            for j in range(k + 1, self.last - left + 1) if left else (self.last,):
                for i, (so_far, _) in best[k].items():
                    if i >= j or any(of(k, i, j) > most[k] for of, most in self._demands):
                        continue
                    option = (joined(so_far, cost(k, i, j)), i)
                    if j not in row or option < row[j]:
                        row[j] = option
            best.append(row)
        if self.last not in best[self.stages]:
            return None
        way, at = [], self.last
        for k in range(self.stages, -1, -1):
            way.append(at)
            at = best[k][at][1]
        return best[self.stages][self.last][0], way[::-1]


def prefix_sums(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    return sums


def running_totals(steps: Sequence[int]) -> list[int]:
    total, out = 0, []
    for step in steps:
        total += step
        out.append(total)
    return out
