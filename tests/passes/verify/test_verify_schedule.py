"""verify_schedule: torch's schedules are proven, and every way to break an order of messages is named."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autodist_fx.runtime.training.schedules import make_schedule
from cost_model.errors import ScheduleError, VerificationError
from cost_model.schedule.messages import Receive, rendezvous_order
from cost_model.schedule.timeline import StageCosts, Transfer, simulate
from passes.ops.comm import all_reduce, recv, send
from passes.verify.schedule import check_rendezvous, verify_schedule
from tests.support.graphs.broken_programs import add_after, calls, with_keyword
from tests.support.training.schedules import hand_made, steps_in_place
from tests.support.training.stage_programs import CHAIN, SKIPS, chain_values, stage_programs

ALL = [
    make_schedule("gpipe", 4, 3),
    make_schedule("1f1b", 4, 6),
    make_schedule("interleaved_1f1b", 2, 4, 2),
    make_schedule("interleaved_zero_bubble", 4, 4, 1),
    make_schedule("interleaved_zero_bubble", 2, 6, 2),
    make_schedule("zbv_zero_bubble", 2, 5),
    make_schedule("interleaved_1f1b", 1, 2, 4),
]


def verify(programs, schedule):
    verify_schedule([programs] * schedule.microbatches, schedule)


def in_place(programs, schedule):
    """Without channels, where each action receives where its program does."""
    steps = steps_in_place(schedule, chain_values(schedule))
    check_rendezvous([programs] * schedule.microbatches, schedule, [steps])


def refused(programs, schedule, message):
    with pytest.raises(VerificationError, match=message) as caught:
        verify(programs, schedule)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [CHAIN, SKIPS], ids=["chain", "two stages on"])
@pytest.mark.parametrize("tp", [1, 2])
def test_torchs_schedules_are_proven_on_either_transport(tp, values):
    for schedule in ALL:
        verify(stage_programs(tp, 4, values), schedule)
        verify(stage_programs(tp, 4, values, gradient=False), schedule)


def test_without_channels_receives_have_to_be_posted_early():
    """Where each action receives and sends in place, all but the simplest orders hang on a transport by rendezvous."""
    hang = []
    for schedule in ALL:
        programs = stage_programs(1, 4)
        try:
            in_place(programs, schedule)
        except VerificationError as error:
            hang.append(f"{schedule.name} {schedule.ranks}")
            assert "these wait for each other for ever" in str(error)
    zero_bubble = ["interleaved_zero_bubble 4", "interleaved_zero_bubble 2", "zbv_zero_bubble 2"]
    assert hang == ["1f1b 4", "interleaved_1f1b 2", *zero_bubble]
    two = make_schedule("1f1b", 2, 2)
    message = (
        r"^schedule 1f1b: these wait for each other for ever: "
        r"rank 0 waits at 0F1 for rank 1 to receive from_0_to_1 \(channel 0, microbatch 1\); "
        r"rank 1 waits at 1B0 for rank 0 to receive the gradient of from_0_to_1 \(channel 0, microbatch 0\)$"
    )
    with pytest.raises(VerificationError, match=message):
        in_place(stage_programs(1, 2, CHAIN[:1]), two)


def test_an_order_hangs_exactly_where_its_simulation_does():
    """Actions that change places at random, held against the timeline, which knows no programs."""
    rng, programs = random.Random(0), stage_programs(1, 4, SKIPS)
    costs, transfers = [StageCosts(1, 1, 1)] * 4, [Transfer(*value) for value in SKIPS]
    hung = ran = 0
    for _ in range(60):
        schedule = rng.choice(ALL)
        actions = [list(own) for own in schedule.actions]
        for _ in range(rng.choice([1, 2])):
            own = rng.choice(actions)
            i, j = rng.sample(range(len(own)), 2)
            own[i], own[j] = own[j], own[i]
        try:
            changed = replace(schedule, actions=tuple(map(tuple, actions)))
        except ScheduleError:
            continue
        try:
            simulate(changed, costs, transfers)
        except ScheduleError:
            hung += 1
            refused(programs, changed, "these wait for each other for ever| and gets ")
            continue
        ran += 1
        try:
            verify(programs, changed)
        except VerificationError as error:  # microbatches in another order than they were sent in
            assert " and gets " in str(error)
    assert hung > 5 and ran > 5, (hung, ran)


def test_swapped_actions_are_named_with_rank_action_and_message():
    schedule = hand_made(2, (0, 1), "0F0 0B0 0F1 0B1", "1F0 1F1 1B0 1B1")
    refused(
        stage_programs(1, 2, CHAIN[:1]),
        schedule,
        r"^schedule mine: these wait for each other for ever: rank 0 waits at 0B0 for the gradient of from_0_to_1 "
        r"\(channel 0, microbatch 0\) from rank 1; rank 1 waits at 1F1 for from_0_to_1 \(channel 0, microbatch 1\) "
        "from rank 0$",
    )


def test_microbatches_come_in_the_order_in_which_they_were_sent():
    schedule = hand_made(2, (0, 1), "0F0 0F1 0B0 0B1", "1F1 1F0 1B0 1B1")
    refused(
        stage_programs(1, 2, CHAIN[:1]),
        schedule,
        r"rank 1 at 1F1 waits for from_0_to_1 \(channel 0, microbatch 1\) and gets .* microbatch 0\)",
    )


def test_a_stage_before_the_stage_that_it_reads_on_the_same_rank():
    schedule = hand_made(1, (0, 1, 1, 0), "0F0 3F0 3B0 0B0", "2F0 1F0 2B0 1B0")
    refused(stage_programs(1, 4), schedule, r"rank 1 waits at 2F0 for \S+ \(channel 1, microbatch 0\) from rank 1$")


def test_a_missing_action_makes_no_schedule():
    schedule = make_schedule("1f1b", 2, 2)
    with pytest.raises(ScheduleError, match="rank 1: action 1B1 is missing"):
        replace(schedule, actions=(schedule.actions[0], schedule.actions[1][:-1]))


def test_broken_programs_are_named():
    schedule = make_schedule("1f1b", 4, 4)

    def broken(change):
        programs = stage_programs(2, 4)
        change(programs)
        return programs

    def lost_recv(programs):
        node = calls(programs[2], recv)[0]
        node.replace_all_uses_with(next(n for n in node.graph.nodes if n.op == "placeholder"))
        node.graph.erase_node(node)

    def lost_send(programs):
        node = calls(programs[1], send)[0]
        node.graph.erase_node(node)

    def no_gradient_sent(programs):
        with_keyword(calls(programs[3], recv)[0], gradient=False)

    def no_gradient_awaited(programs):
        with_keyword(calls(programs[1], send)[0], gradient=False)

    def late_recv(programs):
        node = calls(programs[3], recv)[0]
        last = calls(programs[3], all_reduce)[-1]
        x = next(n for n in node.graph.nodes if n.op == "placeholder")
        last.append(node)
        for user in [u for u in node.users if u is not last]:
            user.replace_input_with(node, x)

    def crossed(programs):
        node = calls(programs[0], send)[0]
        add_after(node, send, node.args, {"to": 3, "channel": 9})

    gradient = r"for the gradient of from_0_to_1 \(channel 0, microbatch 0\) from rank 1"
    refused(broken(lost_recv), schedule, rf"rank 0 \(tp rank 0\) waits at 0B0 {gradient} .*; rank 1 .* ended$")
    refused(broken(lost_send), schedule, r"rank 1 \(tp rank 1\) waits at 1F0 for from_0_to_1 .* from rank 0 ")
    refused(broken(no_gradient_sent), schedule, rf"rank 0 \(tp rank 1\) waits at 0B0 {gradient} \(tp rank 1\)")
    refused(broken(no_gradient_awaited), schedule, r"stage 1 sends the gradient of .*, and stage 0 never waits for it$")
    refused(broken(crossed), schedule, "it leads from stage 0, tp rank 0 to stage 1, tp rank 1")
    verify(broken(late_recv), schedule)  # no fault: the ranks of its stage do not need it at the same time


@pytest.mark.parametrize("mutant", ["lost", "late", "swapped"])
def test_posted_receives_are_held_to_their_order(mutant):
    """By rendezvous: a receive that is not posted, one that is posted after the action which needs it, two of one
    sender in the wrong order."""
    schedule, programs = make_schedule("1f1b", 4, 4), stage_programs(1, 4)
    steps = [list(own) for own in rendezvous_order(schedule, chain_values(schedule))]
    own = steps[1]
    first, second = [i for i, s in enumerate(own) if isinstance(s, Receive) and not s.message.backward][:2]
    if mutant == "lost":
        del own[first]
    elif mutant == "late":
        own.append(own.pop(first))
    else:
        own[first], own[second] = own[second], own[first]
    with pytest.raises(VerificationError, match="these wait for each other for ever"):
        check_rendezvous([programs] * 4, schedule, [steps])


def test_stages_that_are_not_the_schedules_are_refused():
    refused(stage_programs(1, 2), make_schedule("gpipe", 4, 2), "has 4 stages, and the programs are of ranks")
    with pytest.raises(VerificationError, match="has 2 microbatches, and the programs are of 1"):
        verify_schedule([stage_programs(1, 4)], make_schedule("gpipe", 4, 2))


def test_microbatches_may_be_run_by_programs_of_their_own():
    """Where lengths of a step lie on either side of a guard. Channels are numbered in each graph by itself."""
    plain, skipping = stage_programs(2, 4), stage_programs(2, 4, SKIPS[::-1])
    for schedule in ALL:
        each = [skipping if m % 2 else plain for m in range(schedule.microbatches)]
        verify_schedule(each, schedule)
    # rank 0 sends stage 2's of microbatch 0 before stage 0's of microbatch 1, and rank 1 takes them the other way round
    late = hand_made(2, (0, 1, 0, 1), "0F0 2F0 0F1 2F1 2B0 0B0 2B1 0B1", "1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1")
    one, other = stage_programs(1, 4, ((0, 1), (1, 2), (2, 3))), stage_programs(1, 4, ((1, 2), (2, 3), (0, 1)))
    message = (
        r"^schedule mine: rank 1 at 1F1 waits for from_0_to_1 \(channel 2, microbatch 1\) and gets from_2_to_3 "
        r"\(channel 2, microbatch 0\)$"
    )
    verify_schedule([one, one], late)
    with pytest.raises(VerificationError, match=message):
        verify_schedule([one, other], late)
