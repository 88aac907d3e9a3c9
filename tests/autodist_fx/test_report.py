"""What a plan looks like, on a page, in Graphviz, a terminal and a notebook: drawn is what is in the plan."""

import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hostile_plan import ATTACK, enormous_plan, hostile_plan
from hypothesis import given
from hypothesis import strategies as st
from plan_examples import large_plan, small_plan
from plan_mutations import mutated
from rich.console import Console
from transformers import LlamaConfig

from autodist_fx.compiled import compile
from autodist_fx.report.borders import bytes_of, crossing, sent_tensors
from autodist_fx.report.dot import plan_dot
from autodist_fx.report.memory import memory_rows, rank_parts
from autodist_fx.report.page import plan_page
from autodist_fx.report.split_bar import CELLS, SplitBars, matrix
from autodist_fx.report.terminal import print_plan
from autodist_fx.report.timeline import timeline_section
from cost_model.errors import PlanError
from cost_model.explain import param_bytes, plan_sections
from cost_model.placement import Layout, Placement
from cost_model.plan import Hop, ParamPlan, PartitionPlan
from cost_model.plan_html import plan_fragment

LIMIT = 3_000_000
VOID = {"meta", "br", "wbr", "input", "link", "img", "hr"}


class Page(HTMLParser):
    """Elements and texts; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.texts.append(data)


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
@pytest.mark.parametrize("fixed", [None, FUSED, SHARED_HEADS, UNEVEN])
def test_a_bar_shows_each_rank_the_elements_it_holds(fixed, layout):
    layout = fixed or layout
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


def test_only_what_several_ranks_hold_needs_a_second_lane():
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


def test_memory_of_each_rank_is_what_it_holds():
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


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_repeated_layers_share_rows():
    small, large = plan_page(small_plan(4)), plan_page(large_plan(8000))
    assert len(large) < 2 * len(small) < 200_000
    for text in (small, large):
        page = Page(text)
        assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("http-equiv", ""))
        assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "base")]
        assert [a for t, a in page.tags if t == "script"] == [{}]
        ids = [a["id"] for _, a in page.tags if "id" in a]
        assert len(ids) == len(set(ids))
        assert {a["href"] for t, a in page.tags if t == "a"} <= {"#" + i for i in ids}
        # pictures have words
        assert all(a.get("aria-label") for _, a in page.tags if a.get("role") in ("img", "region"))
    said = " ".join(Page(large).texts)
    assert all(words in said for words in ("Stage 3", "ranks 24–31", "×20"))
    assert not re.search(r"and \d+ more", said)


def test_every_linear_of_the_text_is_a_row_of_the_page():
    plan = large_plan(400)
    (linears,) = [s for s in plan_sections(plan) if s.title.startswith("Linears")]
    codes = "".join(Page(plan_page(plan)).texts)
    for label, role, times, *_ in linears.rows[1:]:
        assert f"{label}{role}{times.replace('x', '×')}" in codes


def test_names_from_a_stranger_are_shown_as_they_are():
    plan = hostile_plan()
    assert PartitionPlan.from_dict(plan.to_dict()) == plan  # it can come from a file
    for text in (plan_page(plan), plan_fragment(plan)):
        page = Page(text)
        assert not [tag for tag, _ in page.tags if tag == "img"]
        assert sum(tag == "script" for tag, _ in page.tags) == (1 if "<!doctype" in text else 0)
        assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
        assert any(ATTACK in said for said in page.texts)


@pytest.mark.parametrize("show, layers", [(plan_page, 10_000), (plan_fragment, 3000), (plan_dot, 3000)])
def test_an_enormous_plan_is_cut_short_and_says_so(show, layers):
    text = show(enormous_plan(layers))
    assert len(text.encode()) < LIMIT
    assert re.search(r"and [0-9]{4,} more", text)


def test_whatever_plan_can_be_read_can_be_shown():
    shown = 0
    for seed in range(400):
        try:
            plan = PartitionPlan.from_dict(mutated(seed))
        except PlanError:
            continue
        shown += 1
        Page(plan_page(plan))
        Page(plan_fragment(plan))
        assert plan_dot(plan).startswith("digraph")
        assert in_terminal(plan)
    assert shown > 30


def test_absurd_numbers_are_shown():
    plan = small_plan()
    for seconds in (1e-320, 1e308):
        stages = tuple(replace(s, compute_seconds=seconds, comm_seconds=seconds, flops=1e308) for s in plan.stages)
        Page(plan_page(replace(plan, stages=stages, one_device_seconds=seconds)))
    params = tuple(replace(p, shape=(2**62,) * 4, layout=-1, placement=Placement("R")) for p in plan.params)
    stages = tuple(replace(s, weight_bytes=2**62, kv_cache_bytes=2**62) for s in plan.stages)
    Page(plan_page(replace(plan, params=params, stages=stages)))


def test_many_stages_and_ranks_stay_small():
    assert len(plan_page(small_plan(600, tp=16, pp=300)).encode()) < LIMIT
    assert len(plan_page(small_plan(4, tp=512, pp=1)).encode()) < LIMIT


@pytest.mark.parametrize("tp, pp", [(1, 1), (1, 3), (3, 1)])
def test_one_rank_one_stage_or_one_of_both(tp, pp):
    said = " ".join(Page(plan_page(small_plan(4, tp, pp))).texts)
    assert ("What crosses between stages" in said) == (pp > 1)
    assert ("Speed-up" in said) == (tp * pp > 1)


def test_a_plan_that_predicts_nothing():
    plan = small_plan()
    stages = tuple(
        replace(s, compute_seconds=0.0, comm_seconds=0.0, weight_bytes=0, kv_cache_bytes=0, activation_bytes=0,
                layers=(), recomputed=())
        for s in plan.stages
    )
    empty = replace(plan, stages=stages, ops=(), params=(), hops=(), one_device_seconds=0.0, device_memory_bytes=0)
    Page(plan_page(empty))
    Page(plan_fragment(empty))
    print_plan(empty, Console(file=io.StringIO()))
    assert plan_dot(empty).count("cluster_") == 2


# --- notebook, terminal, Graphviz ------------------------------------------------------------------------------------


def test_a_notebook_gets_a_fragment_that_styles_nothing_else():
    text = small_plan()._repr_html_()
    page = Page(text)
    assert page.tags[0] == ("div", {"class": "adx-plan"}) and len(text) < 20_000
    style = re.search(r"<style>(.*)</style>", text, re.S)[1]
    for selectors in re.findall(r"([^{}]+)\{", style):
        assert all(s.strip().startswith(".adx-plan") for s in selectors.split(","))
    said = "".join(page.texts)
    assert "model.layers.*.mlp.up_proj" in said and "34.0 ms" in said


def in_terminal(plan, **options):
    console = Console(file=io.StringIO(), width=120, **options)
    print_plan(plan, console)
    return console.file.getvalue()


def test_the_terminal_says_what_the_text_says():
    plan = large_plan(400)
    text = in_terminal(plan)
    assert max(map(len, text.splitlines())) <= 120
    words = text.split()
    for section in plan_sections(plan):
        for row in section.rows:
            for cell in row:
                assert all(word in words for word in cell.split())
    assert "ranks 24-31, each" in text


def test_the_terminal_takes_no_name_for_markup():
    text = in_terminal(hostile_plan(), force_terminal=True, color_system="truecolor")
    assert "[red]" in text


def test_dot_has_stages_linears_and_what_is_said():
    text = plan_dot(small_plan())
    assert len(re.findall(r"subgraph cluster_\d+ \{", text)) == 2
    assert 'label="self_attn.q_proj ×2\\ncolumn\\n576x576 → [384|192]x576"' in text
    assert 'out0 -> in1 [label="add_1\\n576 KiB a tp rank"' in text
    # every sum of a row-parallel linear: two layers of two in each stage, and what embeds and gives logits
    labels = re.findall(r"-> \S+ \[label=\"([^\"]*)\"\]", text)
    counts = {"all_reduce": 0, "all_gather": 0}
    for label in labels:
        for name, times in re.findall(r"(all_\w+)(?: ×(\d+))?", label):
            counts[name] += int(times or 1)
    assert counts == {"all_reduce": 2 * 4 + 1, "all_gather": 1}


@pytest.mark.parametrize("plan", [small_plan(), hostile_plan()], ids=["small", "hostile"])
def test_graphviz_reads_it(plan):
    text = plan_dot(plan)
    # outside of quotes nothing but our own words
    bare = re.sub(r'"(\\.|[^"\\])*"', '""', text)
    assert not re.search(r'[^\w\s{}\[\]();,=>".\-]', bare) and "hacked" not in bare
    if shutil.which("dot") is None:
        pytest.skip("no dot: apt-get install graphviz")
    drawn = subprocess.run(["dot", "-Tsvg"], input=text, capture_output=True, text=True, timeout=60, check=True)
    assert not drawn.stderr and drawn.stdout.count("<g ") > 10 and "<script" not in drawn.stdout


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
