"""simulate: equal to longest paths found another way, to closed forms of the papers, and to laws of conservation."""

from __future__ import annotations

import itertools
import random

import networkx as nx
import pytest

from autodist_fx.runtime.training.schedules import make_schedule
from cost_model.errors import ScheduleError
from cost_model.schedule.schedule import Action, ActionKind
from cost_model.schedule.timeline import StageCosts, Transfer, chain, simulate
from tests.support.training.schedules import hand_made

ALL = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("interleaved_zero_bubble", 1), ("zbv_zero_bubble", 2))
UNIT = StageCosts(1.0, 1.0, 1.0, activation_bytes=10, weight_activation_bytes=4)


def longest_paths(schedule, costs, transfers):
    """{action: when it stops}, of a graph of actions and messages whose nodes have lengths."""
    graph, length = nx.DiGraph(), {}
    for actions in schedule.actions:
        nx.add_path(graph, actions)
    for action in schedule:
        graph.add_node(action)
        length[action] = costs[action.stage].seconds(action.kind)
    for actions in schedule.actions:
        last = {}  # by link
        for action in actions:
            for t in transfers:
                forward = action.kind is ActionKind.FORWARD
                if forward and t.source == action.stage:
                    other, seconds = t.target, t.seconds
                elif action.returns_input_gradients and t.target == action.stage and t.gradient_seconds is not None:
                    other, seconds = t.source, t.gradient_seconds
                else:
                    continue
                kinds = ("F",) if forward else ("B", "I")
                found = (Action(ActionKind(k), other, action.microbatch) for k in kinds)
                reader = next(a for a in found if a in length)
                if schedule.stage_ranks[other] == schedule.stage_ranks[action.stage]:
                    graph.add_edge(action, reader)
                    continue
                message, link = (action, t), schedule.stage_ranks[other]
                length[message] = seconds
                graph.add_edges_from([(action, message), (message, reader)])
                if link in last:
                    graph.add_edge(last[link], message)
                last[link] = message
    stop = {}
    for node in nx.topological_sort(graph):
        stop[node] = length[node] + max((stop[before] for before in graph.predecessors(node)), default=0.0)
    return stop


def random_case(name, local, rng):
    ranks = rng.choice([1, 2, 3])
    schedule = make_schedule(name, ranks, ranks * rng.choice([1, 2, 3]), local)
    costs = [StageCosts(rng.random(), rng.random(), rng.random()) for _ in range(schedule.stages)]
    transfers = [Transfer(s, s + 1, rng.random() / 3, rng.random() / 3) for s in range(schedule.stages - 1)]
    for source in range(schedule.stages - 2):  # two stages on, with a gradient or without
        transfers.append(Transfer(source, source + 2, rng.random() / 3, rng.choice([None, rng.random() / 3])))
    return schedule, costs, transfers


@pytest.mark.parametrize("name, local", ALL)
def test_times_are_those_of_longest_paths(name, local):
    rng = random.Random(name)
    for _ in range(6):
        schedule, costs, transfers = random_case(name, local, rng)
        timeline, stops = simulate(schedule, costs, transfers), longest_paths(schedule, costs, transfers)
        for own, actions in zip(timeline.spans, schedule.actions, strict=True):
            assert [span.action for span in own] == list(actions)
            assert [span.stop for span in own] == pytest.approx([stops[action] for action in actions])
        assert timeline.seconds == pytest.approx(max(stops.values()))


@pytest.mark.parametrize("name, local", ALL)
def test_a_rank_does_one_thing_at_a_time_and_all_of_its_work(name, local):
    schedule, costs, transfers = random_case(name, local, random.Random(7))
    timeline = simulate(schedule, costs, transfers)
    for rank, own in enumerate(timeline.spans):
        assert all(a.stop <= b.start for a, b in itertools.pairwise(own))
        each = [costs[s].forward_seconds + costs[s].seconds(ActionKind.BACKWARD) for s in schedule.stages_of(rank)]
        busy = schedule.microbatches * sum(each)
        assert timeline.idle_seconds(rank) == pytest.approx(timeline.seconds - busy)


@pytest.mark.parametrize("p, m", [(1, 1), (1, 4), (2, 2), (2, 5), (4, 4), (4, 9)])
def test_bubbles_and_live_microbatches_are_the_papers(p, m):
    costs = [UNIT] * p
    for name in ("gpipe", "1f1b"):
        timeline = simulate(make_schedule(name, p, m), costs, chain(p))
        assert timeline.idle_share == pytest.approx((p - 1) / (m + p - 1)), name
        assert timeline.seconds == pytest.approx(3 * (m + p - 1)), name
        peaks = tuple(m if name == "gpipe" else min(m, p - stage) for stage in range(p))
        assert timeline.live_microbatches == peaks
        assert timeline.stage_activation_bytes == timeline.rank_activation_bytes == tuple(10 * n for n in peaks)


@pytest.mark.parametrize("p, m, v", [(2, 4, 2), (4, 8, 2), (2, 6, 3)])
def test_interleaving_divides_the_bubble(p, m, v):
    """Narayanan et al. 2021, section 2.2: (p - 1) / v of a microbatch's time on a rank, where m is p's multiple."""
    timeline = simulate(make_schedule("interleaved_1f1b", p, m, v), [UNIT] * (p * v), chain(p * v))
    assert timeline.seconds == pytest.approx(3 * v * m + 3 * (p - 1))


@pytest.mark.parametrize("p, m", [(2, 4), (3, 6), (4, 8)])
def test_zero_bubble_schedules_fill_the_bubble_with_weight_gradients(p, m):
    """Qi et al. 2024: ZB-H1 idles (p - 1) (F + B - W) at 1F1B's peak of activations, and ZB-V of two stages a rank not
    at all but for the p - 1 forwards until the last rank begins, which the first waits for at the end."""
    plain = simulate(make_schedule("interleaved_zero_bubble", p, m, 1), [UNIT] * p, chain(p))
    assert plain.seconds == pytest.approx(3 * m + p - 1)
    v_shaped = simulate(make_schedule("zbv_zero_bubble", p, m), [UNIT] * (2 * p), chain(2 * p))
    assert v_shaped.seconds == pytest.approx(6 * m + p - 1)


def test_what_is_kept_between_the_parts_of_a_backward_pass():
    timeline = simulate(hand_made(3, (0,), "0F0 0I0 0F1 0F2 0W0 0I1 0W1 0B2"), [UNIT], ())
    assert timeline.live_microbatches == (3,)
    assert timeline.rank_activation_bytes == (24,)  # 4 of the first, which waits for its W, and 10 of both others


def test_a_rank_of_two_stages_keeps_what_both_keep():
    schedule = make_schedule("interleaved_1f1b", 1, 2, 2)
    costs = [StageCosts(1, 1, 1, activation_bytes=10), StageCosts(1, 1, 1, activation_bytes=1)]
    timeline = simulate(schedule, costs, chain(2))
    assert str(schedule) == "rank 0: 0F0 1F0 1B0 0F1 0B0 1F1 1B1 0B1"
    assert timeline.stage_activation_bytes == (20, 1)
    assert timeline.rank_activation_bytes == (20,)


def test_messages_of_one_link_follow_each_other_and_a_rank_hands_over_at_once():
    two = simulate(make_schedule("gpipe", 2, 2), [UNIT, UNIT], [Transfer(0, 1, 5.0), Transfer(0, 1, 5.0)])
    assert [span.start for span in two.spans[1][:2]] == [11.0, 21.0]
    one = simulate(make_schedule("interleaved_1f1b", 1, 1, 2), [UNIT, UNIT], [Transfer(0, 1, 5.0, 5.0)])
    assert one.seconds == 6.0


def test_ranks_that_wait_for_each_other_are_named():
    message = (
        "schedule mine: these wait for ever: rank 0 at 0B0 for stage 1's backward of microbatch 0; "
        "rank 1 at 1F1 for stage 0's forward of microbatch 1"
    )
    with pytest.raises(ScheduleError, match=message):
        simulate(hand_made(2, (0, 1), "0F0 0B0 0F1 0B1", "1F1 1B1 1F0 1B0"), [UNIT, UNIT], chain(2))


@pytest.mark.parametrize("source, target", [(1, 0), (0, 0), (0, 2)])
def test_transfers_that_lead_nowhere_are_refused(source, target):
    with pytest.raises(ScheduleError, match=f"from stage {source} to stage {target} of 2"):
        simulate(make_schedule("gpipe", 2, 2), [UNIT, UNIT], [Transfer(source, target)])
    with pytest.raises(ScheduleError, match="has 2 stages; got the costs of 1"):
        simulate(make_schedule("gpipe", 2, 2), [UNIT], ())
