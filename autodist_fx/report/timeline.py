"""Draws the predicted timeline of one forward pass: stage after stage, each with its compute and collectives."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import STAGES_SHOWN, left_out, note, ranks_text, section
from cost_model.explain.html import element
from cost_model.format import seconds_text
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import StageSummary
from cost_model.plan.warnings import whole_device

SHORTEST = 1e-12  # seconds: a shorter forward pass gets no timeline
TICKS = 5
PIECES_ACROSS = 300  # pieces of a timeline, at most: some pixels each
KINDS = {"compute": "compute", "comm": "collectives", "receive": "receive from the stage before", "alone": "one device"}


def timeline_section(plan: PartitionPlan) -> Element | None:
    """Build the section "One forward pass over ranks"; None where the predicted seconds are zero or infinite."""
    total = plan.predicted_seconds
    if not SHORTEST <= total < math.inf:
        return None
    rows, at = [], 0.0
    for s in plan.stages:
        if s.index < STAGES_SHOWN:
            pieces = pieces_of(plan, s, total / PIECES_ACROSS)
            rows.append(_row(f"Stage {s.index}", ranks_text(plan.mesh.tp, s.index), pieces, at, total))
        at += s.seconds
    kinds = ["compute", *(["comm"] if plan.mesh.tp > 1 else []), *(["receive"] if plan.mesh.pp > 1 else [])]
    return section(
        "timeline",
        "Timeline",
        "One forward pass over ranks",
        element("ul", *(element("li", element("i", cls=f"key {k}"), KINDS[k]) for k in kinds), cls="legend"),
        element("div", axis(total), *rows, cls="timeline", role="list"),
        left_out(len(plan.stages), STAGES_SHOWN, "stages"),
        note(
            "Stage after stage, as a single request sees it; ranks of a stage work at the same time. Ops and "
            "collectives in the order in which they run, on the stage's slowest rank; a collective is drawn at least a "
            "pixel wide."
        ),
        *_against_one_device(plan),
    )


def _against_one_device(plan: PartitionPlan) -> list[Element]:
    """Build a bar of this split and one of a single device; [] where there is nothing to compare."""
    total, alone = plan.predicted_seconds, plan.one_device_seconds
    if plan.mesh.size == 1 or not SHORTEST <= alone < math.inf:
        return []
    end = max(total, alone)
    compute = sum(s.compute_seconds for s in plan.stages)
    split = [("compute", compute), ("comm", total - compute)]
    rows = [
        _row("This split", f"{plan.mesh.size} ranks", split, 0.0, end),
        _row("One device", whole_device(plan).strip() or "the whole model", [("alone", alone)], 0.0, end),
    ]
    return [element("h3", "Against one device"), element("div", *rows, cls="timeline", role="list")]


def pieces_of(plan: PartitionPlan, stage: StageSummary, shortest: float) -> list[tuple[str, float]]:
    """List (kind, seconds) in the order in which they happen: the receive, then ops and the collectives behind them.

    Collectives that follow each other within `shortest` seconds are merged into one, behind the compute between them.
    """
    ops = [op for op in plan.ops if stage.index in op.stages]
    op_compute, op_comm = sum(op.compute_seconds for op in ops), sum(op.comm_seconds for op in ops)
    # A plan rounds the seconds of ops, not those of stages. The communication that no op accounts for is receiving.
    compute_scale = stage.compute_seconds / op_compute if op_compute else 0.0
    comm_scale = min(1.0, stage.comm_seconds / op_comm) if op_comm else 0.0
    received = stage.comm_seconds - op_comm * comm_scale
    if not compute_scale:
        return [("receive", received), ("compute", stage.compute_seconds), ("comm", stage.comm_seconds - received)]
    pieces = [("receive", received)]
    compute = comm = 0.0
    for op in ops:
        if comm and compute + comm >= shortest and op.compute_seconds:
            pieces += [("compute", compute), ("comm", comm)]
            compute = comm = 0.0
        compute += op.compute_seconds * compute_scale
        comm += op.comm_seconds * comm_scale
    return [*pieces, ("compute", compute), ("comm", comm)]


def _row(title: str, who: str, pieces: list[tuple[str, float]], at: float, end: float) -> Element:
    """Build a bar that begins at `at` seconds. Its most frequent kind
    is drawn behind all of it, so that thin pieces show no seams."""
    seconds = sum(length for _, length in pieces)
    behind = max(pieces, key=lambda piece: piece[1])[0]
    drawn, start = [_rectangle(behind, at, seconds, end, sum(n for kind, n in pieces if kind == behind))], at
    for kind, length in pieces:
        if kind != behind and length > 0:
            drawn.append(_rectangle(kind, start, length, end, length))
        start += length
    label = f"{title}: from {seconds_text(at)} to {seconds_text(at + seconds)}"
    # SVG draws a piece of less than a pixel fainter (but for collectives: page.css); an HTML box would be a whole pixel
    # wide, or nothing.
    picture = element("svg", *drawn, viewBox="0 0 100 1", preserveAspectRatio="none", role="img", aria_label=label)
    return element(
        "div",
        element("div", element("span", title, cls="strong"), element("small", who), cls="who"),
        element("div", picture, cls="track"),
        element("div", seconds_text(seconds), cls="num"),
        cls="line",
        role="listitem",
    )


def _rectangle(kind: str, start: float, length: float, end: float, said: float) -> Element:
    """Build one piece of a bar, from `start` for `length` seconds on an axis that ends at `end`."""
    x, width = f"{100 * start / end:.4f}", f"{100 * length / end:.4f}"
    title = element("title", f"{KINDS[kind]}: {seconds_text(said)}")
    return element("rect", title, x=x, y="0", width=width, height="1", cls=kind)


def axis(end: float) -> Element:
    """Build an axis with ticks at round numbers of seconds."""
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
    """Return the smallest of 1, 2, 5, 10, ... times a power of ten that is not less than `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= value * 0.999)
