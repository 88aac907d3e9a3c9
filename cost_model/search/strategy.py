"""strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cost_model.graph.placement import Placement
from cost_model.search.elimination import Elimination, Table

INFEASIBLE = np.inf


@dataclass(frozen=True, slots=True)
class Strategy:
    """How one op runs on the tp axis. `gather[j]`: output j is also made whole on every rank."""

    factor: str  # the sharded factor of the op's rule, "" for none
    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    gather: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class TensorParallelResult:
    """The chosen strategy of every op, and the optimum's cost in seconds (price of memory included).

    `elimination` knows what other choices from the `domains` would cost.
    """

    strategies: Mapping[str, Strategy]
    cost: float
    domains: Mapping[str, Sequence[Strategy]]
    elimination: Elimination
    variable: Mapping[str, str]  # op -> the op whose choice is its own, too: itself, but for alike experts
    # Seconds of agreement (TensorParallelSearch.agreement), of all ops of a variable together: with ops that have no
    # choice, by its own; and between two variables, by both their choices.
    reading: Mapping[str, Table]
    pairs: Mapping[tuple[str, str], Table]
