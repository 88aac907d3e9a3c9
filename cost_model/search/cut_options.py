"""Costs of each pipeline cut at the places next to it; `explain` prints them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from cost_model.graph.op_graph import TensorRef
from cost_model.plan.data import CutOption, CutPlan, rounded
from cost_model.search.pipeline import PipelineSearch, Stage

NEIGHBOURS = 2  # places shown on each side of a cut


def cut_plans(
    search: PipelineSearch, stages: Sequence[Stage], nbytes: Callable[[TensorRef], int]
) -> tuple[CutPlan, ...]:
    """Returns the border behind each stage but the last, with the nearest places on both sides where it could be.

    `nbytes(ref)` are the bytes of a whole tensor.
    """
    if len(stages) == 1:
        return ()
    places, starts = search.candidates(len(stages) - 1), [stage.start for stage in stages]
    plans = []
    for k, (before, after) in enumerate(pairwise(stages)):
        cut = after.start
        below = places[bisect_right(places, before.start) : bisect_left(places, cut)][-NEIGHBOURS:]
        above = places[bisect_right(places, cut) : bisect_left(places, after.stop)][:NEIGHBOURS]
        options = tuple(_option(search, k, starts, place, after.stop, nbytes) for place in (*below, cut, *above))
        plans.append(CutPlan(options, len(below)))
    return tuple(plans)


def _option(
    search: PipelineSearch, k: int, starts: Sequence[int], place: int, stop: int, nbytes: Callable[[TensorRef], int]
) -> CutOption:
    """Returns the costs if stage k + 1 began at `place`, and all other cuts stayed."""
    moved = [*starts[: k + 1], place, *starts[k + 2 :]]
    before, after = (
        rounded(search.stage_seconds(j, search.stage(j, begin, end), moved))
        for j, begin, end in ((k, starts[k], place), (k + 1, place, stop))
    )
    name = search.sequence[place]
    return CutOption(
        op=name,
        module=search.graph[name].module,
        before_seconds=before,
        after_seconds=after,
        nbytes=sum(map(nbytes, search.crossing(place))),
    )
