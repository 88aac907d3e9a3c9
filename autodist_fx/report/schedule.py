"""Draws the simulated timeline of a training step: each rank's forward and backward passes, as text and on the page."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import STAGES_SHOWN, left_out, note, section
from autodist_fx.report.timeline import axis
from cost_model.explain.html import element
from cost_model.format import seconds_text
from cost_model.schedule.schedule import ActionKind
from cost_model.schedule.timeline import Span, Timeline

COLUMNS = 100  # of a step as text
NAMES = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward, gradients of inputs",
    ActionKind.BACKWARD_WEIGHT: "backward, gradients of weights",
}
CLASSES = {
    ActionKind.FORWARD: "forward",
    ActionKind.BACKWARD: "backward",
    ActionKind.BACKWARD_INPUT: "backward-input",
    ActionKind.BACKWARD_WEIGHT: "backward-weight",
}


def schedule_text(timeline: Timeline, columns: int = COLUMNS) -> str:
    """Format a step as a line a rank, to scale, in `columns` columns: "F0--F1--....B0------", with dots for idle time.

    Where ranks have several stages, an action's stage stands before it: "2F0". Where there is no room for that, "F".
    """
    scale = columns / timeline.seconds if timeline.seconds else 0.0
    rows = [_summary(timeline)]
    for rank, spans in enumerate(timeline.spans):
        row, width = "", len(str(len(timeline.spans) - 1))
        for span in spans:
            start, stop = round(span.start * scale), round(span.stop * scale)
            label, width_of_span = _label(timeline, span), stop - start
            if width_of_span < len(label):  # too many actions for their names: their kinds alone
                label = span.action.kind.value[:width_of_span]
            row = row.ljust(start, ".") + label.ljust(width_of_span, "-")
        rows.append(f"rank {rank:>{width}}  {row.ljust(columns, '.')}")
    return "\n".join(rows)


def schedule_section(timeline: Timeline) -> Element:
    """Build the section "One training step over ranks": a bar a rank, with a piece for each action."""
    kinds = [kind for kind in ActionKind if any(action.kind is kind for action in timeline.schedule)]
    rows = [_row(timeline, rank) for rank in range(min(len(timeline.spans), STAGES_SHOWN))]
    end = [axis(timeline.seconds)] if timeline.seconds else []
    return section(
        "schedule",
        "Schedule",
        "One training step over ranks",
        element("p", _summary(timeline)),
        element("ul", *(element("li", element("i", cls=f"key {CLASSES[k]}"), NAMES[k]) for k in kinds), cls="legend"),
        element("div", *end, *rows, cls="timeline", role="list"),
        left_out(len(timeline.spans), STAGES_SHOWN, "ranks"),
        note("Pipeline ranks, each with its actions in their order; every second microbatch is lighter."),
    )


def _summary(timeline: Timeline) -> str:
    schedule = timeline.schedule
    counts = [(schedule.ranks, "rank"), (schedule.stages, "stage"), (schedule.microbatches, "microbatch")]
    said = ", ".join(f"{n} {word}{'' if n == 1 else 'es' if word.endswith('h') else 's'}" for n, word in counts)
    live = ", ".join(map(str, timeline.live_microbatches))
    return (
        f"{schedule.name}: {said}, {seconds_text(timeline.seconds)} a step, {100 * timeline.idle_share:.0f} % of it "
        f"idle; stages keep up to {live} microbatches"
    )


def _label(timeline: Timeline, span: Span) -> str:
    several = timeline.schedule.stages > timeline.schedule.ranks
    action = span.action
    return str(action) if several else f"{action.kind.value}{action.microbatch}"


def _row(timeline: Timeline, rank: int) -> Element:
    """Build a rank's bar."""
    end, stages = timeline.seconds, timeline.schedule.stages_of(rank)
    drawn = [_rectangle(span, end) for span in timeline.spans[rank] if span.stop > span.start]
    idle = f"{100 * timeline.idle_seconds(rank) / end:.0f} % idle" if end else ""
    who = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
    label = f"Rank {rank}, {who}: {idle}"
    picture = element("svg", *drawn, viewBox="0 0 100 1", preserveAspectRatio="none", role="img", aria_label=label)
    return element(
        "div",
        element("div", element("span", f"Rank {rank}", cls="strong"), element("small", who), cls="who"),
        element("div", picture, cls="track"),
        element("div", idle, cls="num"),
        cls="line",
        role="listitem",
    )


def _rectangle(span: Span, end: float) -> Element:
    action = span.action
    said = (
        f"{action}: {NAMES[action.kind]}, stage {action.stage}, microbatch {action.microbatch}, from "
        f"{seconds_text(span.start)} to {seconds_text(span.stop)}"
    )
    return element(
        "rect",
        element("title", said),
        x=f"{100 * span.start / end:.4f}",
        y="0",
        width=f"{100 * (span.stop - span.start) / end:.4f}",
        height="1",
        fill_opacity="0.7" if action.microbatch % 2 else None,
        cls=CLASSES[action.kind],
    )
