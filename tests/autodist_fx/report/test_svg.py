"""Drawings as SVG: well-formed, inside their borders, to scale, and with the names of a hostile plan escaped."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from autodist_fx.report.svg.bars import draw_bars
from autodist_fx.report.svg.drawing import WIDTH, Drawing
from autodist_fx.report.svg.stages import draw_stages
from autodist_fx.report.svg.steps import draw_forward, draw_step
from autodist_fx.report.svg.weights import draw_weights
from cost_model.format import bytes_text
from cost_model.schedule.schedule import Action, ActionKind, Schedule
from cost_model.schedule.timeline import StageCosts, Timeline, chain, simulate
from tests.support.plans.examples import large_plan, small_plan
from tests.support.plans.hostile import hostile_plan

SVG = "{http://www.w3.org/2000/svg}"


def step() -> Timeline:
    """Two ranks, two microbatches, 1F1B; a backward pass takes twice as long as a forward pass."""
    f, b = ActionKind.FORWARD, ActionKind.BACKWARD
    orders = ((f, 0), (f, 1), (b, 0), (b, 1)), ((f, 0), (b, 0), (f, 1), (b, 1))
    actions = tuple(tuple(Action(kind, rank, m) for kind, m in order) for rank, order in enumerate(orders))
    return simulate(Schedule("1f1b", 2, (0, 1), actions), [StageCosts(1.0, 1.0, 1.0)] * 2, chain(2))


def rectangles(drawing: Drawing) -> list[dict[str, float | str]]:
    """The rectangles behind the card, with their places as numbers and their titles."""
    root = ElementTree.fromstring(drawing.svg)
    found = []
    for rect in root.iter(f"{SVG}rect"):
        place = {name: float(rect.get(name, "0")) for name in ("x", "y", "width", "height")}
        found.append({**place, "title": rect.findtext(f"{SVG}title", ""), "cls": rect.get("class", "")})
    return found[1:]


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_stages(small_plan()),
        lambda: draw_stages(large_plan(8)),
        lambda: draw_stages(hostile_plan()),
        lambda: draw_forward(small_plan()),
        lambda: draw_weights(small_plan(), "model.layers.0"),
        lambda: draw_step(step()),
        lambda: draw_bars("<b>", [("</text>", {"&": 3.0})], bytes_text, limit=5.0),
    ],
)
def test_all_is_inside_of_the_card(draw):
    drawing = draw()
    root = ElementTree.fromstring(drawing.svg)
    *_, height = map(float, root.get("viewBox").split())
    for r in rectangles(drawing):
        assert r["x"] >= 0 and r["y"] >= 0 and r["x"] + r["width"] <= WIDTH and r["y"] + r["height"] <= height
    assert all(0 <= float(text.get("y")) <= height for text in root.iter(f"{SVG}text"))
    assert root.findtext(f"{SVG}title") == drawing.title and not list(root.iter(f"{SVG}script"))


def test_a_step_is_to_scale():
    timeline = step()
    drawn = [r for r in rectangles(draw_step(timeline)) if "microbatch" in r["title"]]
    spans = [span for own in timeline.spans for span in own]
    scale = (drawn[-1]["width"] + 1) / (spans[-1].stop - spans[-1].start)
    for r, span in zip(drawn, spans, strict=True):
        assert r["width"] + 1 == pytest.approx(scale * (span.stop - span.start), abs=0.1)
    for row in (drawn[:4], drawn[4:]):
        assert all(a["x"] + a["width"] <= b["x"] for a, b in pairwise(row))


def test_weights_are_cut_as_the_plan_says():
    plan = small_plan()
    cut = [p for p in plan.params if "layers.0." in p.name and p.layout >= 0 and p.matmul]
    areas = [0.0] * plan.mesh.tp
    for r in rectangles(draw_weights(plan, "model.layers.0")):
        if r["title"].startswith("tp rank"):
            areas[int(r["title"].split(":")[0].split()[-1])] += r["width"] * r["height"]
    held = [0.0] * plan.mesh.tp
    for param in cut:
        layout = plan.layout(param.layout)
        for rank in range(plan.mesh.tp):
            held[rank] += param.shape[0] * param.shape[1] * layout.local_size(rank) / layout.size
    assert areas[0] / sum(areas) == pytest.approx(held[0] / sum(held), abs=0.02)
    with pytest.raises(ValueError, match="has no linears in"):
        draw_weights(plan, "model.layers.99")


def test_bars_are_to_scale():
    rows = [("one", {"a": 1.0, "b": 2.0}), ("two", {"a": 4.0, "b": 0.0})]
    drawn = {r["title"]: r["width"] for r in rectangles(draw_bars("bars", rows, str)) if r["title"]}
    assert drawn["a: 4.0"] == pytest.approx(4 * drawn["a: 1.0"], abs=0.1) and drawn["b: 0.0"] == 0
    assert drawn["b: 2.0"] == pytest.approx(2 * drawn["a: 1.0"], abs=0.1)
