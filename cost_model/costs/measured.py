"""A machine as it was measured: how near its ops come to its peak rates, by kind, dtype and size, and by how many ranks
compute at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log

from cost_model.costs.tables import Bound, Sizes, Table

BoundOf = Callable[[Table], Bound]


@dataclass(frozen=True, slots=True)
class Run:
    """All tables that were measured while `ranks` ranks of the machine did the same at once."""

    ranks: int
    tables: tuple[Table, ...]

    def table(self, kinds: Sequence[str], dtype: str) -> Table:
        """Returns the table of the first of `kinds` that has one for a dtype, else of the first that has one at all.

        Raises ValueError where none has.
        """
        for alike in (True, False):
            for kind in kinds:
                for table in self.tables:
                    if table.kind == kind and (table.dtype == dtype or not alike):
                        return table
        raise ValueError(f"no table of {' or '.join(kinds)}")


@dataclass(frozen=True, slots=True)
class Measured:
    """A machine as `autodist-fx measure` found it, but for its peak rates.

    cores: those that the ranks share; 0 where each has a device of its own. With more ranks than cores, all wait.
    runs: by ascending number of ranks, the first of one rank alone.
    node_factor: how much longer a call takes in a graph of many kinds of ops than in one of many alike, which its
    tables are of.
    step_seconds: what a step of generating takes beside its graph: the loop, the sampling, the cache's bookkeeping.
    start_seconds: what generating takes besides before its first step, which reads the prompt.
    """

    cores: int
    runs: tuple[Run, ...]
    node_factor: float = 1.0
    step_seconds: float = 0.0
    start_seconds: float = 0.0

    def fixed_seconds(self, kinds: Sequence[str], dtype: str, ranks: int) -> float:
        """Returns the seconds of a call of the first of `kinds` that was measured, while `ranks` ranks compute."""
        return self._between(ranks, lambda run: run.table(kinds, dtype).fixed_seconds) * self.node_factor

    def utilisation(self, kinds: Sequence[str], dtype: str, sizes: Sizes, bound_of: BoundOf, ranks: int) -> float:
        """Returns the share of the peak that an op reaches while `ranks` ranks compute at once.

        bound_of: from a table to what peak rates allow for its kind and dtype.
        """

        def times_the_bound(run: Run) -> float:
            table = run.table(kinds, dtype)
            return 1 / table.utilisation(sizes, bound_of(table))

        return 1 / self._between(ranks, times_the_bound)

    def _between(self, ranks: int, seconds: Callable[[Run], float]) -> float:
        """Returns what holds for a number of ranks, from the runs with as many, or with fewer and more."""
        waiting = max(1.0, ranks / self.cores) if self.cores else 1.0
        ranks = min(ranks, self.cores or ranks)
        below = max((run for run in self.runs if run.ranks <= ranks), key=lambda run: run.ranks, default=self.runs[0])
        above = min((run for run in self.runs if run.ranks >= ranks), key=lambda run: run.ranks, default=below)
        low = seconds(below)
        if above.ranks <= below.ranks:
            return low * waiting
        share = log(ranks / below.ranks) / log(above.ranks / below.ranks)
        return (low + share * (seconds(above) - low)) * waiting
