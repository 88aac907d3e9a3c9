"""make_schedule: torch's action lists as schedules, by any of their names; its refusals as errors of one line."""

from __future__ import annotations

import itertools

import pytest

from autodist_fx.errors import ScheduleError
from autodist_fx.runtime.training.schedules import SCHEDULES, make_schedule
from cost_model.schedule.schedule import ActionKind


def kinds(schedule, rank):
    return "".join(action.kind.value for action in schedule.actions[rank])


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_is_complete(name):
    """Schedule itself refuses what is not; the numbers that torch takes are those that its classes document."""
    taken = set()
    for ranks, microbatches, local in itertools.product((1, 2, 3, 4), range(1, 10), (1, 2, 3)):
        try:
            schedule = make_schedule(name, ranks, microbatches, local)
        except ScheduleError as error:
            assert "\n" not in str(error), error
            continue
        taken.add((ranks, microbatches, local))
        assert schedule.stages == ranks * local
        assert all(len(schedule.stages_of(rank)) == local for rank in range(ranks))
    rounds_fit = {(p, m, v) for p in (1, 2, 3, 4) for m in range(1, 10) for v in (1, 2, 3) if m % max(1, m // p) == 0}
    assert taken == {
        "gpipe": {(p, m, 1) for p in (1, 2, 3, 4) for m in range(1, 10)},
        "1f1b": {(p, m, 1) for p in (1, 2, 3, 4) for m in range(p, 10)},
        "interleaved_1f1b": rounds_fit,
        "interleaved_zero_bubble": rounds_fit,
        "zbv_zero_bubble": {(p, m, 2) for p in (1, 2, 3, 4) for m in range(1, 10)},
    }[name]


def test_the_orders_are_those_of_the_papers():
    gpipe, one = make_schedule("gpipe", 3, 4), make_schedule("1f1b", 3, 4)
    assert [kinds(gpipe, rank) for rank in range(3)] == ["FFFFBBBB"] * 3
    assert [kinds(one, rank) for rank in range(3)] == ["FFFBFBBB", "FFBFBFBB", "FBFBFBFB"]
    for schedule in (gpipe, one):  # microbatches in order: torch 2.13's list of 1f1b counts the last stage's from 1
        for rank, kind in itertools.product(range(3), (ActionKind.FORWARD, ActionKind.BACKWARD)):
            assert [a.microbatch for a in schedule.actions[rank] if a.kind is kind] == [0, 1, 2, 3]
    assert make_schedule("interleaved_1f1b", 2, 2).stage_ranks == (0, 1, 0, 1)
    zero_bubble = make_schedule("zbv_zero_bubble", 2, 4)
    assert (zero_bubble.stage_ranks, zero_bubble.splits_backward) == ((0, 1, 1, 0), True)
    assert make_schedule("interleaved_zero_bubble", 2, 4, stages_per_rank=1).splits_backward


@pytest.mark.parametrize("name", ["zbv_zero_bubble", "ZBVZeroBubble", "ScheduleZBVZeroBubble"])
def test_torchs_names_are_names_too(name):
    assert make_schedule(name, 2, 4).name == "zbv_zero_bubble"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("2f2b", 2, 4), "there is no schedule '2f2b': use one of gpipe, 1f1b, "),
        (("gpipe", 2, 4, 2), "schedule gpipe has one stage a rank, and was asked for 2: use interleaved_1f1b"),
        (("1f1b", 4, 3), r"must be greater than or equal to the number of stages \(4\); 4 microbatches would do"),
        (("interleaved_1f1b", 2, 5), r"multiple of the number of rounds \(2\), but got 5; 4 or 6 microbatches would"),
        (("zbv_zero_bubble", 2, 4, 3), "ZBV requires exactly 2 stages per rank, but got 3$"),
        (("gpipe", 0, 4), "ranks must be a whole number, 1 or more; got 0"),
        (("gpipe", 2, 2.0), "microbatches must be a whole number, 1 or more; got 2.0"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(arguments, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        make_schedule(*arguments)
    assert "\n" not in str(caught.value)
