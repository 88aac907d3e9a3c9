"""Schedule: complete ones are taken, and every kind of mistake in one is named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_model.errors import ScheduleError
from tests.support.training.schedules import actions, hand_made

TWO_STAGES = hand_made(2, (0, 1), "0F0 0F1 0B0 0I1 0W1", "1F0 1B0 1F1 1B1")


def test_a_complete_schedule_says_what_it_is():
    assert (TWO_STAGES.stages, TWO_STAGES.ranks, TWO_STAGES.splits_backward) == (2, 2, True)
    assert TWO_STAGES.stages_of(1) == (1,)
    assert [str(TWO_STAGES.last_gradients(stage)) for stage in (0, 1)] == ["0W1", "1B1"]
    assert str(TWO_STAGES) == "rank 0: 0F0 0F1 0B0 0I1 0W1\nrank 1: 1F0 1B0 1F1 1B1"
    interleaved = hand_made(1, (0, 1, 0), "0F0 2F0 2B0 0B0", "1F0 1B0")
    assert (interleaved.stages_of(0), interleaved.splits_backward) == ((0, 2), False)


@pytest.mark.parametrize(
    "first_rank, message",
    [
        ("0F0 0F1 0B0", "rank 0: action 0B1 is missing"),
        ("0F0 0B0 0I1 0W1", "rank 0, action 0I1: it comes before 0F1"),
        ("0F0 0F1 0B0 0I1", "rank 0: action 0W1 is missing"),
        ("0F0 0F1 0B0 0W1 0I1", "rank 0, action 0W1: it comes before 0I1"),
        ("0F0 0F1 0F0 0B0 0B1", "rank 0, action 0F0: it comes twice"),
        ("0F0 0F1 0B0 0I0 0W0 0B1", "rank 0, action 0I0: 0B0 went backward before"),
        ("0F0 0F1 0I0 0B0 0W0 0B1", "rank 0, action 0B0: 0I0 went backward before"),
        ("0F0 0F1 0F2 0B0 0B1", "rank 0, action 0F2: there are 2 microbatches"),
        ("0F0 0F1 2F0 0B0 0B1", "rank 0, action 2F0: there are 2 stages"),
        ("0F0 0F1 1F0 0B0 0B1", "rank 0, action 1F0: stage 1 is on rank 1"),
    ],
)
def test_a_mistake_in_one_is_named(first_rank, message):
    with pytest.raises(ScheduleError, match=message) as caught:
        replace(TWO_STAGES, actions=(actions(first_rank), TWO_STAGES.actions[1]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"microbatches": 0}, "microbatches must be a whole number, 1 or more; got 0"),
        ({"microbatches": True}, "microbatches must be a whole number"),
        ({"actions": ()}, "no ranks"),
        ({"stage_ranks": (0, 2)}, "stage 1 is on rank 2 of 2"),
        ({"stage_ranks": (0, 0)}, "rank 1 has no stage"),
    ],
)
def test_sizes_that_do_not_fit_are_named(fields, message):
    with pytest.raises(ScheduleError, match=message):
        replace(TWO_STAGES, **fields)
