"""Draws a plan's stages as columns, each with its layers and costs, and what crosses between them."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import ranks_text
from autodist_fx.report.stage_transfers import bytes_of, crossing, sent_tensors
from autodist_fx.report.svg.drawing import CHARACTER, LINE, PAD, WIDTH, Drawing, arrow, box, drawing, words
from cost_model.explain.html import shorten
from cost_model.format import bytes_text, compress_names, name_pattern, seconds_text
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import StageSummary

MOST_STAGES = 4  # that have room for their words
BETWEEN = 92.0  # pixels between two stages, or, of more than two,
BETWEEN_MANY = 66.0
BLOCK = 26.0  # height of a group of layers


def draw_stages(plan: PartitionPlan) -> Drawing:
    """Draw the stages of a plan, four at most, each with its layers, seconds and bytes of one forward pass."""
    stages, sent = plan.stages[:MOST_STAGES], sent_tensors(plan)
    between = BETWEEN if len(stages) < 3 else BETWEEN_MANY
    column = (WIDTH - 2 * PAD - between * (len(stages) - 1)) / len(stages)
    blocks = [_groups(stage, int((column - 34) / CHARACTER)) for stage in stages]
    facts_at = PAD + 34 + max(map(len, blocks)) * (BLOCK + 6) + 14
    height = facts_at + 4 * LINE + 16 - PAD
    shapes: list[Element] = []
    for stage, names in zip(stages, blocks):
        x = PAD + stage.index * (column + between)
        shapes += _column(plan, stage, names, x, column, facts_at, height)
        if stage.index + 1 < len(stages):
            tensors = crossing(sent, stage.index)
            middle = x + column + between / 2
            what = tensors[0].label if len(tensors) == 1 else f"{len(tensors)} tensors"
            shapes += [
                words(middle, PAD + 44, bytes_text(bytes_of(tensors)), "strong", anchor="middle"),
                arrow(x + column + 8, PAD + 54, between - 16),
                words(middle, PAD + 74, shorten(what, int(between / CHARACTER)), "code", anchor="middle"),
            ]
    left = f", the first {MOST_STAGES} of {len(plan.stages)}" if len(plan.stages) > MOST_STAGES else ""
    return drawing(f"The stages of {plan.model} on {plan.mesh}{left}", height, shapes)


def _groups(stage: StageSummary, most: int) -> list[str]:
    """Name the stage's layers, those that are alike together, in `most` characters each."""
    groups: dict[str, list[str]] = {}
    for layer in stage.layers:
        groups.setdefault(name_pattern(layer), []).append(layer)
    names = []
    for layers in groups.values():
        name, times = ", ".join(compress_names(layers)), f"  ×{len(layers)}" if len(layers) > 1 else ""
        last = name.rpartition(".")
        short = f"{last[0].rpartition('.')[2]}.{last[2]}" if last[2][:1].isdigit() else last[2]
        names.append(next((text for text in (name + times, name, short) if len(text) <= most), shorten(short, most)))
    return names


def _column(
    plan: PartitionPlan, stage: StageSummary, names: list[str], x: float, width: float, facts_at: float, height: float
) -> list[Element]:
    shapes = [
        box(x, PAD, width, height, fill="var(--page)", stroke="var(--line)", round_by=9),
        words(x + 12, PAD + 22, f"Stage {stage.index}", "strong"),
        words(x + width - 12, PAD + 22, ranks_text(plan.mesh.tp, stage.index), "soft", anchor="end"),
    ]
    for i, name in enumerate(names):
        y = PAD + 34 + i * (BLOCK + 6)
        shapes += [
            box(x + 10, y, width - 20, BLOCK, fill="var(--card)", stroke="var(--line)", round_by=5),
            box(x + 10, y, 3, BLOCK, fill="var(--accent)", round_by=1),
            words(x + 20, y + 17, name, "code"),
        ]
    facts = (
        ("compute", seconds_text(stage.compute_seconds)),
        ("messages", seconds_text(stage.comm_seconds) if stage.comm_seconds else "–"),
        ("weights", bytes_text(stage.weight_bytes)),
        ("memory", bytes_text(stage.memory_bytes)),
    )
    for i, (what, value) in enumerate(facts):
        y = facts_at + (i + 0.7) * LINE
        shapes += [words(x + 12, y, what, "soft"), words(x + width - 12, y, value, anchor="end")]
    fullest = max(each.memory_bytes for each in plan.stages)
    y, room = facts_at + 4 * LINE + 3, width - 24
    shapes.append(box(x + 12, y, room, 6, fill="var(--track)", round_by=3))
    shapes.append(box(x + 12, y, room * stage.memory_bytes / fullest, 6, fill="var(--weights)", round_by=3))
    return shapes


__all__ = ["draw_stages"]
