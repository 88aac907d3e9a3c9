"""Drawings of a training step: each action where and as long as it runs."""

from __future__ import annotations

import pytest

from autodist_fx.report.schedule import schedule_section, schedule_text
from cost_model.explain.html import to_html
from cost_model.schedule.timeline import StageCosts, chain, simulate
from tests.support.training.schedules import hand_made

COSTS = [StageCosts(1.0, 1.0, 1.0)] * 2
ONE_F_ONE_B = hand_made(2, (0, 1), "0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1I1 1W1")


def test_a_step_as_text_is_to_scale():
    text = schedule_text(simulate(ONE_F_ONE_B, COSTS, chain(2)), columns=32)
    assert text.splitlines() == [
        "mine: 2 ranks, 2 stages, 2 microbatches, 8.00 s a step, 25 % of it idle; stages keep up to 2, 1 microbatches",
        "rank 0  F0--F1--........B0------B1------",
        "rank 1  ....F0--B0------F1--I1--W1--....",
    ]


def test_an_action_names_its_stage_where_a_rank_has_several():
    several = hand_made(1, (0, 1, 0, 1), "0F0 2F0 2B0 0B0", "1F0 3F0 3B0 1B0")
    text = schedule_text(simulate(several, COSTS * 2, chain(4)), columns=48)
    assert text.splitlines()[1] == "rank 0  0F0-....2F0-............2B0-----........0B0-----"
    assert text.splitlines()[0].startswith("mine: 2 ranks, 4 stages, 1 microbatch, ")


def test_the_page_draws_each_action_where_it_runs():
    timeline = simulate(ONE_F_ONE_B, COSTS, chain(2, 0.5))
    section = schedule_section(timeline)
    tracks = [track.findall("rect") for track in section.iter("svg")]
    assert [len(track) for track in tracks] == [4, 5]
    for track, spans in zip(tracks, timeline.spans, strict=True):
        for rect, span in zip(track, spans, strict=True):
            drawn = [float(rect.get(key)) for key in ("x", "width")]
            times = span.start, span.stop - span.start
            assert drawn == pytest.approx([100 * t / timeline.seconds for t in times], abs=1e-4)
    assert [r.get("class") for r in tracks[1]] == [
        *("forward", "backward", "forward", "backward-input", "backward-weight"),
    ]
    assert [r.get("fill-opacity") for r in tracks[0]] == [None, "0.7"] * 2
    assert "1W1: backward, gradients of weights, stage 1, microbatch 1, from " in to_html(section)


def test_a_step_that_takes_no_time_is_drawn_too():
    free = simulate(ONE_F_ONE_B, [StageCosts(0.0, 0.0, 0.0)] * 2, chain(2))
    assert schedule_text(free, 4).splitlines()[1:] == ["rank 0  ....", "rank 1  ...."]
    assert not list(schedule_section(free).iter("rect"))
