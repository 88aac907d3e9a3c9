"""A plan as a page, for Graphviz, in a terminal and in a notebook: all is said, whatever names the plan has."""

import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from rich.console import Console

from autodist_fx.report.dot import plan_dot
from autodist_fx.report.page import plan_page
from autodist_fx.report.terminal import print_plan
from cost_model.errors import PlanError
from cost_model.explain.html import plan_fragment
from cost_model.explain.plan_text import plan_sections
from cost_model.graph.placement import Placement
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import Device, Request
from tests.support.plans.examples import large_plan, small_plan
from tests.support.plans.hostile import ATTACK, enormous_plan, hostile_plan
from tests.support.plans.mutations import mutated

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


def test_page_shows_pins_cuts_and_each_stages_device():
    devices = (Device("a100", 40 * 2**30), Device("h100", 2**27))
    request = Request((("*.q_proj", "replicate"),), ("model.layers.2",), tuple(d.memory for d in devices), devices)
    said = " ".join(Page(plan_page(replace(small_plan(), request=request))).texts)
    assert "pinned: *.q_proj replicate" in said and "cut before: model.layers.2" in said
    assert "ranks 0–1 of a100" in said and "ranks 2–3 of h100" in said
    assert "0% of 40.0 GiB" in said and "% of 128 MiB" in said
    assert "stage 1 does not fit" in said


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


def test_terminal_shows_every_cell_of_the_text():
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


def test_dot_has_stages_linears_and_collectives():
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
