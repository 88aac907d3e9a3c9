"""Drawings of a plan are to scale: splits of weights, memory of ranks, what crosses borders, the timeline."""

import re
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import LlamaConfig

from autodist_fx.api.compile import compile
from autodist_fx.report.memory import memory_rows, rank_parts
from autodist_fx.report.page import plan_page
from autodist_fx.report.split_bar import CELLS, SplitBars, matrix
from autodist_fx.report.stage_transfers import bytes_of, crossing, sent_tensors
from autodist_fx.report.timeline import timeline_section
from cost_model.explain.html import plan_fragment
from cost_model.graph.placement import Layout, Placement
from cost_model.plan.data import Hop, ParamPlan
from cost_model.plan.weights import param_bytes
from tests.support.plans.examples import large_plan, small_plan


def position(piece):
    """(left, width) of a piece of a bar, in shares of the bar."""
    left, width = re.fullmatch(r"left:([\d.]+)%;width:([\d.]+)%", piece.get("style")).groups()
    return float(left) / 100, float(width) / 100


# --- drawn to scale --------------------------------------------------------------------------------------------------

FUSED = Layout(24, (((0, 4), (8, 12), (16, 20)), ((4, 8), (12, 16), (20, 24))))
SHARED_HEADS = Layout(4, (((0, 2),), ((0, 2),), ((2, 4),), ((2, 4),)))
UNEVEN = Layout(576, (((0, 384),), ((384, 576),)))


@st.composite
def layouts(draw):
    size, ranks = draw(st.integers(1, 60)), draw(st.integers(1, 6))
    parts = []
    for _ in range(ranks):
        ends = sorted(draw(st.sets(st.integers(0, size), max_size=8)))
        parts.append(tuple(zip(ends[::2], ends[1::2])))
    return Layout(size, tuple(parts))


@given(layouts())
@example(FUSED)
@example(SHARED_HEADS)
@example(UNEVEN)
def test_a_bar_shows_each_rank_the_elements_it_holds(layout):
    ranks = len(layout.parts)
    bar = SplitBars((layout,), ranks).bar(0)
    if layout.is_whole:
        assert "whole" in bar.get("class")
        return
    drawn = [set() for _ in range(ranks)]
    for lane in bar:
        taken = set()
        for piece in lane:
            left, width = position(piece)
            elements = set(range(round(left * layout.size), round((left + width) * layout.size)))
            assert not elements & taken  # nothing lies on something else
            taken |= elements
            rank, colour = int(re.match(r"tp rank (\d+)", piece.get("title"))[1]), piece.get("class")
            assert colour == f"r{rank % 8}"
            drawn[rank] |= elements
    assert drawn == [{i for a, b in part for i in range(a, b)} for part in layout.parts]


def test_only_overlapping_layouts_need_a_second_lane():
    assert [len(SplitBars((layout,), 2).bar(0)) for layout in (FUSED, UNEVEN, SHARED_HEADS)] == [1, 1, 2]


def test_a_dim_in_very_many_pieces_is_drawn_coarsely_and_holds_no_less():
    size = 400_000
    strips = Layout(size, tuple(tuple((i, i + 100) for i in range(100 * r, size, 400)) for r in range(4)))
    bar = SplitBars((strips,), 4).bar(0)
    assert len(bar) == 4 and sum(len(lane) for lane in bar) <= 4 * CELLS
    half = size // 2
    halves = Layout(size, tuple(tuple((i, i + 100) for i in range(r * half, r * half + half, 200)) for r in (0, 1)))
    for rank, lane in enumerate(SplitBars((halves,), 2).bar(0)):
        left = min(position(p)[0] for p in lane)
        right = max(sum(position(p)) for p in lane)
        assert left == pytest.approx(rank / 2, abs=1 / CELLS) and right == pytest.approx((rank + 1) / 2, abs=1 / CELLS)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layout", [FUSED, SHARED_HEADS, UNEVEN])
def test_a_matrix_has_its_proportions_and_is_cut_along_its_dim(dim, layout):
    other = 2 * layout.size
    shape = (layout.size, other) if dim == 0 else (other, layout.size)
    boxes = [{k: float(r.get(k)) for k in ("x", "y", "width", "height")} for r in matrix(shape, layout, dim)]
    length, across = ("height", "width") if dim == 0 else ("width", "height")
    lanes = 2 if layout is SHARED_HEADS else 1
    assert sum(box["width"] * box["height"] for box in boxes) == pytest.approx(32 * 16, rel=0.01)
    held = [b - a for part in layout.parts for a, b in part]
    assert [box[length] for box in boxes] == pytest.approx([16 * n / layout.size for n in held], abs=0.02)
    assert {box[across] for box in boxes} == {32 / lanes}


# --- memory, borders, time -------------------------------------------------------------------------------------------


def held_by_hand(plan, stage, rank):
    """Bytes of listed parameters on one rank, element by element of the sharded dim."""
    total = 0
    for p in plan.params:
        if stage in p.stages:
            size = param_bytes(p)
            if p.layout >= 0:
                part = plan.layouts[p.layout].parts[rank]
                size = size * sum(b - a for a, b in part) // p.shape[p.placement.dim]
            total += size
    return total


def test_memory_of_each_rank_matches_a_count_by_hand():
    plan = small_plan()
    # what the planner would have said: the fullest rank's parameters, and 1000 bytes of buffers
    stages = tuple(
        replace(s, weight_bytes=max(held_by_hand(plan, s.index, r) for r in range(2)) + 1000) for s in plan.stages
    )
    plan = replace(plan, stages=stages)
    for s in plan.stages:
        ranks = [dict(parts) for parts in rank_parts(plan, s.index)]
        assert [r["weights"] for r in ranks] == [held_by_hand(plan, s.index, r) + 1000 for r in range(2)]
        assert ranks[0]["weights"] > ranks[1]["weights"]  # 6 heads against 3
        assert max(sum(r.values()) for r in ranks) == s.memory_bytes


def test_an_expert_that_lies_on_one_rank_is_drawn_and_counted_there():
    """64 experts of 16 bytes: 40 on tp rank 0, 24 on tp rank 1."""
    plan = small_plan()
    linear = next(op for op in plan.ops if op.role == "row")
    names = [f"model.layers.0.experts.{i}" for i in range(64)]
    owned = [Placement("O", 0 if i < 40 else 1) for i in range(64)]
    ops = tuple(replace(linear, name=n, module=n, weight=n + ".weight", home=0, stages=(0,)) for n in names)
    params = tuple(ParamPlan(n + ".weight", (2, 4), "bfloat16", o, -1, (0,), True) for n, o in zip(names, owned))
    more = replace(plan, ops=plan.ops + ops, params=plan.params + params)
    before, after = ([dict(parts)["weights"] for parts in rank_parts(p, 0)] for p in (plan, more))
    # a stage's bytes are the fullest rank's: that they did not grow means 640 fewer bytes of buffers
    assert [b - a for a, b in zip(before, after)] == [40 * 16 - 640, 24 * 16 - 640]
    (row,) = [row for row in plan_page(more).split("<tr") if "experts" in row and "×64" in row]
    pieces = re.findall(r"tp rank (\d): (\d+)–(\d+)", row)
    assert pieces == [("0", "0", "39"), ("1", "40", "63")] and "64 whole weights" in row


def test_a_kv_cache_is_cut_as_its_heads_are():
    plan = small_plan()
    keys = next(op for op in plan.ops if op.role == "column")
    cache = replace(keys, name="cache", kind="cache_update", role="", output_layouts=(0,))
    plan = replace(plan, ops=(*plan.ops, cache))
    kv = plan.stages[0].kv_cache_bytes
    assert [dict(parts)["kv"] for parts in rank_parts(plan, 0)] == [kv, kv // 2]  # 2 KV heads, and 1
    assert [dict(parts)["kv"] for parts in rank_parts(plan, 1)] == [kv, kv]  # no cache is listed there


def test_ranks_that_hold_the_same_share_a_bar():
    assert [(stage, ranks) for stage, ranks, _ in memory_rows(large_plan(400))] == [
        (k, list(range(8 * k, 8 * k + 8))) for k in range(4)
    ]
    assert [ranks for _, ranks, _ in memory_rows(small_plan())] == [[0], [1], [2], [3]]


def test_each_hop_crosses_the_borders_between_its_ends():
    plan = large_plan(400)
    more = tuple(Hop("mask", 0, source, target, 9, True, 513) for source, target in [(0, 1), (0, 2), (0, 3), (1, 3)])
    plan = replace(plan, hops=plan.hops + more)
    sent = sent_tensors(plan)
    for border in range(3):
        over = [h for h in plan.hops if h.source <= border < h.target]
        assert bytes_of(crossing(sent, border)) == sum(h.nbytes for h in over)
    assert bytes_of(sent) == sum(h.nbytes for h in plan.hops)
    assert len(sent) == len(plan.hops) - 2  # the mask from stage 0 to three stages is one tensor


def tracks_of(plan):
    """The rectangles of each bar of the timeline: (kind, start, length), in shares of the longest bar."""
    tracks = [e for e in timeline_section(plan).iter("svg")]
    return [[(r.get("class"), float(r.get("x")) / 100, float(r.get("width")) / 100) for r in t] for t in tracks]


def test_the_timeline_runs_stage_after_stage_up_to_the_predicted_seconds():
    plan = large_plan(400)
    total, alone = plan.predicted_seconds, plan.one_device_seconds
    *stages, split, one = tracks_of(plan)
    at = 0.0
    for s, (whole, *pieces) in zip(plan.stages, stages, strict=True):
        assert whole == ("compute", pytest.approx(at, abs=2e-6), pytest.approx(s.seconds / total, abs=2e-6))
        said = sum(length for _, _, length in pieces)
        assert said == pytest.approx(s.comm_seconds / total, abs=1e-6 * len(pieces))
        assert all(at - 2e-6 <= start and start + length <= at + whole[2] + 4e-6 for _, start, length in pieces)
        at += whole[2]
    assert at == pytest.approx(1.0, abs=1e-5)
    ends = [bar[0][1] + bar[0][2] for bar in (split, one)]
    assert ends == pytest.approx([total / max(total, alone), alone / max(total, alone)], abs=1e-5)


def test_the_timeline_has_collectives_where_they_run():
    plan = small_plan()
    seconds = [(1.0, 0.0), (2.0, 0.5), (4.0, 0.0), (0.0, 0.25), (1.0, 0.25), (2.0, 0.0)]
    ops = tuple(
        replace(op, home=1, stages=(1,), compute_seconds=a, comm_seconds=b) for op, (a, b) in zip(plan.ops, seconds)
    )
    stages = tuple(replace(s, compute_seconds=10.0, comm_seconds=2.0, recomputed=()) for s in plan.stages)
    first, second, *_ = tracks_of(replace(plan, ops=ops, stages=stages, hops=()))
    # the second stage: 12 to 24 s, of which the first is not the ops' own
    expected = [("compute", 12, 12), ("receive", 12, 1), ("comm", 16, 0.5), ("comm", 20.5, 0.25), ("comm", 21.75, 0.25)]
    assert [kind for kind, *_ in second] == [kind for kind, *_ in expected]
    for (_, *drawn), (_, *lengths) in zip(second, expected):
        assert drawn == pytest.approx([n / 24 for n in lengths], abs=1e-6)
    assert [kind for kind, *_ in first] == ["compute", "receive"]  # of its ops nothing is known


def test_a_compiled_model_with_fewer_kv_heads_than_ranks():
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)  # fmt: skip
    compiled = compile(config, tp=4, pp=2, use_cache=True, verify=False)
    assert compiled._repr_html_() == plan_fragment(compiled.plan)
    keys = [p for p in compiled.plan.params if "k_proj" in p.name]
    bar = SplitBars(compiled.plan.layouts, 4).bar(keys[0].layout)
    assert [[(*position(piece), piece.get("class")) for piece in lane] for lane in bar] == [
        [(0.0, 0.5, "r0"), (0.5, 0.5, "r2")],
        [(0.0, 0.5, "r1"), (0.5, 0.5, "r3")],
    ]
    # on each rank as much as a program of it holds
    for stage in range(2):
        held = [dict(parts)["weights"] for parts in rank_parts(compiled.plan, stage)]
        for tp_rank, nbytes in enumerate(held):
            graph = compiled.rank(4 * stage + tp_rank)
            tensors = [*graph.parameters(), *graph.buffers()]
            assert nbytes == pytest.approx(sum(t.numel() * t.element_size() for t in tensors), rel=1e-9)
