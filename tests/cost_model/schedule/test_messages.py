"""rendezvous_order: receives stand where torch's own runtime has them, and no later than they are needed."""

from __future__ import annotations

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from autodist_fx.runtime.training.schedules import make_schedule
from cost_model.errors import ScheduleError
from cost_model.schedule.messages import Receive, Send, StageValue, received_by, rendezvous_order
from cost_model.schedule.schedule import Action
from tests.support.training.schedules import hand_made, steps_in_place


def chain(stages):
    return [StageValue(stage, stage + 1, stage, name=f"h{stage}") for stage in range(stages - 1)]


def torch_text(step):
    """A step as torch prints it: "1F0", "1SEND_F0", "2RECV_F0"."""
    if isinstance(step, Action):
        return str(step)
    message, way = step.message, "B" if step.message.backward else "F"
    if isinstance(step, Send):
        return f"{message.sender}SEND_{way}{message.microbatch}"
    return f"{message.receiver}RECV_{way}{message.microbatch}"


@pytest.mark.parametrize(
    "name, ranks, microbatches, local",
    [
        ("gpipe", 3, 4, 1),
        ("1f1b", 3, 4, 1),
        ("interleaved_1f1b", 2, 4, 2),
        ("interleaved_1f1b", 3, 6, 3),
        ("interleaved_zero_bubble", 2, 4, 2),
        ("zbv_zero_bubble", 3, 6, 2),
    ],
)
def test_the_order_is_that_of_torchs_runtime(name, ranks, microbatches, local):
    schedule = make_schedule(name, ranks, microbatches, local)
    plain = {
        rank: [torch_schedules._Action.from_str(str(action)) for action in actions]
        for rank, actions in enumerate(schedule.actions)
    }
    theirs = torch_schedules._add_send_recv(plain, lambda stage: schedule.stage_ranks[stage], schedule.stages)
    ours = rendezvous_order(schedule, [chain(schedule.stages)] * microbatches)
    assert [list(map(torch_text, own)) for own in ours] == [list(map(str, theirs[rank])) for rank in range(ranks)]


def test_a_receive_is_posted_before_the_action_that_needs_it_and_once():
    schedule = make_schedule("zbv_zero_bubble", 2, 4)
    values = [*chain(4), StageValue(0, 2, 7), StageValue(1, 3, 8, has_gradient=False)]
    each = [values] * 4
    for steps, in_place in zip(rendezvous_order(schedule, each), steps_in_place(schedule, each), strict=True):
        assert sorted(map(str, steps)) == sorted(map(str, in_place))
        posted = set()
        for step in steps:
            if isinstance(step, Receive):
                assert step.message not in posted
                posted.add(step.message)
            elif isinstance(step, Action):
                local = {m for m in received_by(step, values) if Receive(m) not in steps}
                assert posted.issuperset(set(received_by(step, values)) - local)
                assert all(schedule.stage_ranks[m.sender] == schedule.stage_ranks[m.receiver] for m in local)


def test_what_no_transport_would_carry_is_refused_by_name():
    wrong = hand_made(2, (0, 1), "0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0")
    message = (
        r"these wait for ever: rank 0 at 0B0 for the gradient of h0 \(channel 0, microbatch 0\) of stage 1; "
        r"rank 1 at 1F1 for h0 \(channel 0, microbatch 1\) of stage 0"
    )
    with pytest.raises(ScheduleError, match=message):
        rendezvous_order(wrong, [chain(2)] * 2)
