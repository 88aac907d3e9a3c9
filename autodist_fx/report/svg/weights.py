"""Draws the weights of one layer to scale, each cut as the plan deals it to tp ranks."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from autodist_fx.report.overview import colour
from autodist_fx.report.svg.drawing import INK, LINE, PAD, WIDTH, Drawing, box, drawing, legend, words
from cost_model.explain.html import shorten
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import OpPlan, ParamPlan

SIDE = 104.0  # pixels of the longest side of any weight
IN_A_ROW = 7


def draw_weights(plan: PartitionPlan, layer: str) -> Drawing:
    """Draw the linears of one layer ("model.layers.0") as they are dealt to tp ranks. A weight is [outputs, inputs], so
    that outputs run from top to bottom. Raises ValueError for a layer without linears."""
    params = {param.name: param for param in plan.params}
    found = [(op, params[op.weight]) for op in plan.ops if op.role and f"{op.module}.".startswith(f"{layer}.")]
    if not found:
        raise ValueError(f"{plan.model} has no linears in {layer!r}")
    longest = max(max(param.shape) for _, param in found)
    cell = (WIDTH - 2 * PAD) / min(len(found), IN_A_ROW)
    shapes: list[Element] = []
    for i, (op, param) in enumerate(found):
        x = PAD + (i % IN_A_ROW) * cell + cell / 2
        y = PAD + (i // IN_A_ROW) * (SIDE + 5 * LINE)
        shapes += _weight(plan, op, param, x, y, SIDE / longest)
    rows = -(-len(found) // IN_A_ROW)
    height = rows * (SIDE + 5 * LINE) + 8
    ranks = [(colour(rank), f"tp rank {rank}") for rank in range(min(plan.mesh.tp, 8))]
    shapes += legend(PAD, PAD + height, ranks, by_class=True)
    return drawing(f"The linears of {layer} on {plan.mesh.tp} tp ranks, to scale", height, shapes)


def _weight(plan: PartitionPlan, op: OpPlan, param: ParamPlan, x: float, y: float, scale: float) -> list[Element]:
    """Draw one weight, its name, role and shapes under each other, around the middle x."""
    height, width = (max(n * scale, 4.0) for n in param.shape)
    left, top = x - width / 2, y + (SIDE - height) / 2
    layout = plan.layout(param.layout)
    shapes = []
    if layout is None or layout.is_whole:
        shapes.append(box(left, top, width, height, fill="var(--whole)", round_by=2, title="whole on each rank"))
        held = "whole"
    else:
        dim = param.placement.dim
        for rank, part in enumerate(layout.parts):
            for start, stop in part:
                a, b = start / layout.size, stop / layout.size
                where = (
                    (left, top + a * height, width, (b - a) * height)
                    if dim == 0
                    else (left + a * width, top, (b - a) * width, height)
                )
                said = f"tp rank {rank}: {'outputs' if dim == 0 else 'inputs'} {start} to {stop - 1}"
                shapes.append(box(*where, cls=colour(rank), round_by=0, title=said))
                if min(where[2:]) > 12:
                    middle = (where[0] + where[2] / 2, where[1] + where[3] / 2 + 4)
                    shapes.append(words(*middle, str(rank), "onto", anchor="middle", fill=INK))
        held = "|".join(str(layout.local_size(rank)) for rank in range(len(layout.parts)))
    name = op.module.rpartition(".")[2]
    lines = ((name, "strong"), (op.role, ""), ("×".join(map(str, param.shape)), "soft"), (shorten(held, 16), "soft"))
    for i, (text, cls) in enumerate(lines):
        shapes.append(words(x, y + SIDE + (i + 0.9) * LINE, text, cls or None, anchor="middle"))
    return shapes


__all__ = ["draw_weights"]
