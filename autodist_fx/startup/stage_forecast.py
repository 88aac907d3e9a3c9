"""Predicts what each pipeline stage takes for a call, by the plan and its op graph, for who divides the call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from cost_model.graph.op_graph import OpGraph
from cost_model.plan.data import PlanData
from cost_model.request.plan_request import PlanRequest

if TYPE_CHECKING:
    from cost_model.search.plan_search import SharedSearches

# The search is imported where something is predicted: a rank that starts from the cache of splits needs none of it.

# A step of generating beside its graph, where the machine was not measured (`autodist-fx measure` says it of others):
# transformers' loop, its processors, and the announcement to the other ranks. An estimate, of the size that GPT-2's
# steps took beyond their programs on two ranks of a server's CPU.
LOOP_SECONDS = 2e-3


class StageForecast:
    """The predicted seconds of each stage, at any sizes. `graph` makes the plan's op graph when it is first needed.

    Predicted are lengths that are powers of two, once each; what lies between is interpolated, so that prompts of all
    lengths cost no search each.
    """

    def __init__(self, graph: Callable[[], OpGraph], plan: PlanData, request: PlanRequest) -> None:
        self._graph, self._plan = graph, plan
        # The plan says how each op is split, and where stages end: nothing is left to ask for.
        self._request = replace(request, mesh=plan.mesh, pin=(), cuts=(), like=None)
        self._symbols: set[str] | None = None  # of the graph's lengths
        self._shared: SharedSearches = {}
        self._known: dict[tuple[tuple[tuple[str, int], ...], bool], Sequence[float]] = {}

    def __call__(self, sizes: Mapping[str, int], /, *, at_once: bool = False) -> Sequence[float]:
        """Return the seconds by stage, at lengths by size symbol; `at_once`: while all stages compute."""
        from cost_model.search.prediction_sizes import lengths_of

        if self._symbols is None:
            self._symbols = lengths_of(self._graph())
        sizes = {symbol: length for symbol, length in sizes.items() if symbol in self._symbols}
        corners = [_corners(length) for length in sizes.values()]
        total = [0.0] * self._plan.mesh.pp
        for corner in itertools.product(*corners):
            share = prod(weight for _, weight in corner)
            seconds = self._at(tuple(zip(sizes, (length for length, _ in corner), strict=True)), at_once)
            total = [a + share * b for a, b in zip(total, seconds, strict=True)]
        return total

    def _at(self, sizes: tuple[tuple[str, int], ...], at_once: bool) -> Sequence[float]:
        from cost_model.search.planner import stage_seconds

        if (sizes, at_once) not in self._known:
            request, graph = replace(self._request, ranks_at_once=self._plan.mesh.size if at_once else 0), self._graph()
            found = stage_seconds(graph, self._plan, request, dict(sizes), self._shared)
            if request.stage_devices[-1].measured is None and any(op.kind == "cache_update" for op in graph):
                found[-1] += LOOP_SECONDS
            self._known[sizes, at_once] = found
            for old in list(self._shared)[:-1]:  # each has a table of costs for each op; the layouts go on to the next
                del self._shared[old]
        return self._known[sizes, at_once]


def _corners(length: int) -> list[tuple[int, float]]:
    """Return the powers of two around a length, 0 among them, with the weights that they have in it."""
    if length < 1 or length & (length - 1) == 0:
        return [(length, 1.0)]
    below = 1 << (length.bit_length() - 1)
    share = (length - below) / below
    return [(below, 1.0 - share), (2 * below, share)]
