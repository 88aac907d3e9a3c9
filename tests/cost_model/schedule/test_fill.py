"""Fill: the seconds of parts in a pipeline are those of the simulated timeline, and parts are taken where they pay."""

from __future__ import annotations

import pytest

from cost_model.schedule.fill import best_filling, pipeline_seconds, round_seconds
from cost_model.schedule.schedule import Schedule
from cost_model.schedule.timeline import StageCosts, chain, simulate


@pytest.mark.parametrize("stages", [[1.0, 2.0], [3.0, 1.0, 2.0], [1.0]])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_take_as_long_as_the_timeline_says(stages: list[float], count: int) -> None:
    timeline = simulate(
        Schedule.in_order(len(stages), count), [StageCosts(seconds, 0, 0) for seconds in stages], chain(len(stages))
    )
    assert pipeline_seconds([stages] * count) == pytest.approx(timeline.seconds)


def test_rounds_are_bound_by_the_busiest_stage_or_by_one_groups_way() -> None:
    assert round_seconds([[1.0, 2.0], [1.0, 2.0]]) == 4.0
    assert round_seconds([[1.0, 2.0]]) == 3.0


def test_parts_are_taken_where_they_pay() -> None:
    """Work of 1 s on each of two stages, in n parts that each cost `fixed` more."""

    def seconds(count: int, fixed: float) -> float:
        return pipeline_seconds([[1 / count + fixed] * 2] * count)

    free = best_filling(lambda count: seconds(count, 0.0), 16)
    assert free.count == 16 and free.gain == pytest.approx(32 / 17)
    assert best_filling(lambda count: seconds(count, 0.01), 16).count in (8, 12)
    dear = best_filling(lambda count: seconds(count, 0.6), 16)
    assert dear.count == 1 and dear.gain == 1.0 and dear.seconds == pytest.approx(3.2)
