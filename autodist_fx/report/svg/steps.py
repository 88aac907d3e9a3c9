"""Draws time from left to right: a training step's schedule, and one forward pass over the stages of a plan."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import ranks_text
from autodist_fx.report.schedule import NAMES
from autodist_fx.report.svg.drawing import INK, PAD, WIDTH, Drawing, box, drawing, legend, words
from autodist_fx.report.timeline import PIECES_ACROSS, pieces_of
from cost_model.format import seconds_text
from cost_model.partition_plan import PartitionPlan
from cost_model.schedule.schedule import ActionKind
from cost_model.schedule.timeline import Span, Timeline

BAR, GAP = 30.0, 8.0
NAME, SAID = 64.0, 66.0  # pixels of a row's name on the left, and of what is said of it on the right
COLOURS = {
    ActionKind.FORWARD: "var(--compute)",
    ActionKind.BACKWARD: "var(--comm)",
    ActionKind.BACKWARD_INPUT: "var(--receive)",
    ActionKind.BACKWARD_WEIGHT: "var(--alone)",
}
PIECES = {"compute": ("var(--compute)", "compute"), "comm": ("var(--comm)", "collectives"),
          "receive": ("var(--receive)", "receive from the stage before")}  # fmt: skip


def draw_step(timeline: Timeline) -> Drawing:
    """Draw a simulated training step: a bar a rank, a box for each forward and backward pass of a microbatch."""
    room = WIDTH - 2 * PAD - NAME - SAID
    scale = room / timeline.seconds
    shapes: list[Element] = []
    for rank, spans in enumerate(timeline.spans):
        y = PAD + 24 + rank * (BAR + GAP)
        idle = f"{100 * timeline.idle_seconds(rank) / timeline.seconds:.0f} % idle"
        shapes += _row(f"Rank {rank}", idle, y, room)
        for span in spans:
            shapes += _action(span, y, scale, with_stage=timeline.schedule.stages > timeline.schedule.ranks)
    kinds = [kind for kind in ActionKind if any(action.kind is kind for action in timeline.schedule)]
    shapes += legend(PAD, PAD + 10, [(COLOURS[kind], NAMES[kind]) for kind in kinds])
    schedule, ranks = timeline.schedule, timeline.schedule.ranks
    step = f"a step of {schedule.microbatches} microbatches on {ranks} ranks"
    title = f"{schedule.name}: {step}, {seconds_text(timeline.seconds)}"
    return drawing(title, 24 + ranks * (BAR + GAP) - GAP, shapes)


def draw_forward(plan: PartitionPlan) -> Drawing:
    """Draw one forward pass as a single request sees it: stage after stage, compute and collectives in their order."""
    room, total = WIDTH - 2 * PAD - NAME - SAID, plan.predicted_seconds
    shapes: list[Element] = []
    at = 0.0
    for stage in plan.stages:
        y = PAD + 24 + stage.index * (BAR + GAP)
        ranks = ranks_text(plan.mesh.tp, stage.index)
        shapes += _row(f"Stage {stage.index}", seconds_text(stage.seconds), y, room, ranks)
        for kind, seconds in pieces_of(plan, stage, total / PIECES_ACROSS):
            if seconds > 0:
                x = PAD + NAME + at / total * room
                least = 1.0 if kind == "comm" else 0.0  # no collective vanishes
                width = max(seconds / total * room, least)
                shapes.append(box(x, y, width, BAR, fill=PIECES[kind][0], round_by=0))
            at += seconds
    kinds = ["compute", *(["comm"] if plan.mesh.tp > 1 else []), *(["receive"] if plan.mesh.pp > 1 else [])]
    shapes += legend(PAD, PAD + 10, [PIECES[kind] for kind in kinds])
    title = f"One forward pass of {plan.model} on {plan.mesh}, {seconds_text(total)}"
    return drawing(title, 24 + len(plan.stages) * (BAR + GAP) - GAP, shapes)


def _row(name: str, said: str, y: float, room: float, about: str = "") -> list[Element]:
    return [
        words(PAD, y + (14 if about else 20), name, "strong"),
        *([words(PAD, y + 28, about, "soft")] if about else []),
        box(PAD + NAME, y, room, BAR, fill="var(--track)"),
        words(WIDTH - PAD, y + 20, said, "soft", anchor="end"),
    ]


def _action(span: Span, y: float, scale: float, *, with_stage: bool) -> list[Element]:
    action, x, width = span.action, PAD + NAME + span.start * scale, (span.stop - span.start) * scale
    label = str(action) if with_stage else f"{action.kind.value}{action.microbatch}"
    said = f"{NAMES[action.kind]} of microbatch {action.microbatch}, stage {action.stage}"
    opacity = 0.75 if action.microbatch % 2 else None
    ink = "#fff" if action.kind is ActionKind.FORWARD else INK
    shapes = [box(x + 0.5, y, width - 1, BAR, fill=COLOURS[action.kind], round_by=3, title=said, opacity=opacity)]
    if width > 8 * len(label):
        shapes.append(words(x + width / 2, y + 19, label, "onto", anchor="middle", fill=ink))
    return shapes


__all__ = ["draw_forward", "draw_step"]
