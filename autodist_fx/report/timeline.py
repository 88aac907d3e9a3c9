"""The predicted timeline of one forward pass: stage after stage, each computing and communicating."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element

from autodist_fx.report.parts import STAGES_SHOWN, left_out, note, ranks_text, section, span
from cost_model.explain import seconds_text
from cost_model.plan import PartitionPlan
from cost_model.plan_html import element

TICKS = 5


def timeline_section(plan: PartitionPlan) -> Element | None:
    total = plan.predicted_seconds
    if total <= 0:
        return None
    alone = plan.one_device_seconds if plan.mesh.size > 1 else 0.0
    end = max(total, alone)
    rows, at = [], 0.0
    for s in plan.stages:
        pieces = [("compute", s.compute_seconds), ("comm", s.comm_seconds)]
        if s.index < STAGES_SHOWN:
            rows.append(_row(f"Stage {s.index}", ranks_text(plan.mesh.tp, s.index), pieces, at, end, s.seconds))
        at += s.seconds
    if alone:
        rows.append(_row("One device", "the whole model", [("alone", alone)], 0.0, end, alone))
    return section(
        "timeline",
        "Timeline",
        "One forward pass over ranks",
        element(
            "ul",
            element("li", element("i", cls="key compute"), "compute"),
            element("li", element("i", cls="key comm"), "communication"),
            element("li", element("i", cls="key alone"), "one device, for comparison") if alone else None,
            cls="legend",
        ),
        element("div", _axis(end), *rows, cls="timeline", role="list"),
        left_out(len(plan.stages), STAGES_SHOWN, "stages"),
        note(
            "Stage after stage, as the first token sees it. Ranks of a stage work at once, and are drawn as one. "
            "Communication stands behind the compute of its stage; in fact it is spread between the stage's ops."
        ),
    )


def _row(
    title: str, who: str, pieces: list[tuple[str, float]], at: float, end: float, seconds: float
) -> Element:
    drawn = []
    start = at
    for kind, length in pieces:
        if length > 0:
            what = {"compute": "compute", "comm": "communication", "alone": "one device"}[kind]
            drawn.append(
                element("i", cls=kind, style=span(start / end, length / end), title=f"{what}: {seconds_text(length)}")
            )
            start += length
    said = f"{title}: from {seconds_text(at)} to {seconds_text(at + seconds)}"
    return element(
        "div",
        element("div", element("span", title, cls="strong"), element("small", who), cls="who"),
        element("div", *drawn, cls="track", role="img", aria_label=said),
        element("div", seconds_text(seconds), cls="num"),
        cls="line",
        role="listitem",
    )


def _axis(end: float) -> Element:
    """Ticks at round numbers."""
    step = _round(end / TICKS)
    marks = []
    tick = 0
    while tick * step <= end * 1.0001 and tick <= 2 * TICKS:
        share = min(tick * step / end, 1.0)
        side = "first" if tick == 0 else "last" if share > 0.96 else None
        text = seconds_text(tick * step) if tick else "0"
        marks.append(element("span", text, cls=side, style=f"left:{100 * share:.3f}%"))
        tick += 1
    blank = element("div")
    return element("div", blank, element("div", *marks, cls="axis"), blank, cls="line", aria_hidden="true")


def _round(value: float) -> float:
    """The smallest of 1, 2, 5, 10, ... times a power of ten that is not less."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= value * 0.999)
