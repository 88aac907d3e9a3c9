"""What each cut of a pipeline would cost at the places next to it: for people who ask a plan why it is cut there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from cost_model.op_graph import TensorRef
from cost_model.pipeline import PipelineSearch, Stage
from cost_model.plan import CutOption, CutPlan, rounded

NEIGHBOURS = 2  # places shown on each side of a cut


def cut_plans(
    search: PipelineSearch, stages: Sequence[Stage], nbytes: Callable[[TensorRef], int]
) -> tuple[CutPlan, ...]:
    """The border behind each stage but the last, with the nearest places on both sides where it could be instead.

    `nbytes` of a whole tensor.
    """
    if len(stages) == 1:
        return ()
    places = search.candidates(len(stages) - 1)
    plans = []
    for before, after in pairwise(stages):
        cut = after.start
        below = places[bisect_right(places, before.start) : bisect_left(places, cut)][-NEIGHBOURS:]
        above = places[bisect_right(places, cut) : bisect_left(places, after.stop)][:NEIGHBOURS]
        options = tuple(
            CutOption(
                op=search.sequence[place],
                module=search.graph[search.sequence[place]].module,
                before_seconds=rounded(search.stage_seconds(before.start, place)),
                after_seconds=rounded(search.stage_seconds(place, after.stop)),
                nbytes=sum(map(nbytes, search.crossing(place))),
            )
            for place in (*below, cut, *above)
        )
        plans.append(CutPlan(options, len(below)))
    return tuple(plans)
