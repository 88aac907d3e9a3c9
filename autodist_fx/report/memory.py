"""Draws the memory of every rank as stacked bars: weights,
KV cache, activations, workspace. Equal ranks share a bar."""

from __future__ import annotations

from itertools import groupby
from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import cell, left_out, note, section, span, table
from cost_model.explain.html import element
from cost_model.format import bytes_text, ranges_text
from cost_model.graph.placement import Placement
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import StageSummary
from cost_model.plan.weights import param_bytes

BARS_SHOWN = 256
CACHE_KIND = "cache_update"
KINDS = {"weights": "weights", "kv": "KV cache", "activations": "activations", "workspace": "workspace"}
Parts = tuple[tuple[str, int], ...]  # (kind, bytes)


def parts_of(stage: StageSummary) -> Parts:
    """Return the bytes of the stage's fullest rank, by kind."""
    return _parts(stage, stage.weight_bytes, stage.kv_cache_bytes)


def _parts(stage: StageSummary, weights: int, cache: int) -> Parts:
    return (
        ("weights", weights),
        ("kv", cache),
        ("activations", stage.activation_bytes),
        ("workspace", stage.workspace_bytes),
    )


def rank_parts(plan: PartitionPlan, stage: int) -> list[Parts]:
    """Return the bytes of each tp rank of a stage, by kind.

    Weights and caches are the rank's own. Activations and workspace are the fullest rank's: a plan has no others.
    """
    summary = plan.stages[stage]
    ranks = range(plan.mesh.tp)
    by_layout: dict[int, int] = {}
    owned = [0] * plan.mesh.tp
    for param in plan.params:
        owner = owner_of(param.placement)
        if stage in param.stages and owner < 0:
            by_layout[param.layout] = by_layout.get(param.layout, 0) + param_bytes(param)
        elif stage in param.stages and owner < plan.mesh.tp:
            owned[owner] += param_bytes(param)
    held = [[_held(plan, layout, nbytes, rank) for rank in ranks] for layout, nbytes in by_layout.items()] + [owned]
    # A plan counts buffers as weights without listing them. The bytes of a stage are, summed over its weights, the most
    # that any rank holds of each; the part that no listed weight explains are the buffers.
    buffers = max(0, summary.weight_bytes - sum(map(max, held)))
    caches = {i for op in plan.ops if op.kind == CACHE_KIND and stage in op.stages for i in op.output_layouts}
    parts_of_ranks = []
    for rank in ranks:
        # A plan does not list caches singly. Where all have one layout, the rank's share of the fullest rank is known.
        shares = {_share(plan, layout, rank) for layout in caches}
        cache = summary.kv_cache_bytes * (shares.pop() if len(shares) == 1 else 1.0)
        parts_of_ranks.append(_parts(summary, sum(row[rank] for row in held) + buffers, round(cache)))
    return parts_of_ranks


def memory_rows(plan: PartitionPlan) -> list[tuple[int, list[int], Parts]]:
    """Return (stage, global ranks, bytes by kind) of each bar:
    neighbouring ranks with equal bytes of every kind share one."""
    rows = []
    for s in plan.stages[:BARS_SHOWN]:
        for parts, members in groupby(enumerate(rank_parts(plan, s.index)), key=lambda pair: pair[1]):
            rows.append((s.index, [plan.mesh.rank(s.index, t) for t, _ in members], parts))
    return rows


def owner_of(placement: Placement) -> int:
    """Return the tp rank that alone holds a weight whole, as an
    expert's that was dealt to it; -1 where several ranks hold it."""
    return placement.dim if placement.kind == "O" else -1


def _held(plan: PartitionPlan, index: int, nbytes: int, rank: int) -> int:
    """Return the bytes that one tp rank holds of `nbytes` in a layout; all of them where there is no layout."""
    layout = plan.layout(index)
    return nbytes if layout is None or not layout.size else nbytes * layout.local_size(rank) // layout.size


def _share(plan: PartitionPlan, index: int, rank: int) -> float:
    """Return the fraction that a tp rank holds of what the fullest rank holds."""
    layout = plan.layout(index)
    return 1.0 if layout is None or not layout.size else layout.local_size(rank) / layout.max_local_size


def memory_bar(parts: Parts, scale: int, limit: int | None) -> Element:
    """Build a stacked bar that is `scale` bytes wide, with a mark at `limit`, the device's memory in bytes."""
    pieces, at = [], 0
    for kind, nbytes in parts:
        if nbytes and scale:
            title = f"{KINDS[kind]}: {bytes_text(nbytes)}"
            pieces.append(element("i", cls=kind, style=span(at / scale, nbytes / scale), title=title))
            at += nbytes
    if limit and limit <= scale:
        style = f"left:{100 * limit / scale:.3f}%"
        pieces.append(element("b", cls="limit", style=style, title=f"a device: {bytes_text(limit)}"))
    said = ", ".join(f"{KINDS[kind]} {bytes_text(nbytes)}" for kind, nbytes in parts if nbytes)
    return element("div", *pieces, cls="stack", role="img", aria_label=said or "nothing")


def share_of_device(plan: PartitionPlan, stage: int, nbytes: int) -> str:
    """Format bytes as "6% of 74.5 GiB" of a stage's device; "" where the device's memory is not known."""
    device = plan.memory_of_stage(stage)
    return f"{nbytes / device:.0%} of {bytes_text(device)}" if device else ""


def memory_section(plan: PartitionPlan) -> Element:
    """Build the section "Memory of each rank"."""
    rows = memory_rows(plan)
    most = max((sum(n for _, n in parts) for _, _, parts in rows), default=0)
    largest = max((plan.memory_of_stage(stage) for stage, _, _ in rows), default=0)
    # Bars are to the scale of the largest device, or of the fullest rank where they would be too short to see.
    scale = max(most, largest) if most > 0.3 * largest else most
    kinds = [kind for kind in KINDS if any(dict(parts)[kind] for _, _, parts in rows)]
    legend = [element("li", element("i", cls=f"key {kind}"), KINDS[kind]) for kind in kinds]
    of_device = [("Of its device", "num")] if largest else []
    header = [("Stage", ""), ("Ranks", ""), ("To scale", "wide"), ("Total", "num"), *of_device,
              *((KINDS[kind].capitalize() if kind != "kv" else KINDS[kind], "num") for kind in kinds)]  # fmt: skip
    body = []
    for stage, ranks, parts in rows[:BARS_SHOWN]:
        total = sum(n for _, n in parts)
        each = ", each" if len(ranks) > 1 else ""
        body.append(
            element(
                "tr",
                cell(str(stage)),
                cell(ranges_text(ranks).replace("-", "–") + each, cls="nowrap"),
                cell(memory_bar(parts, scale, plan.memory_of_stage(stage)), cls="wide"),
                cell(bytes_text(total), cls="num strong"),
                cell(share_of_device(plan, stage, total), cls="num") if largest else None,
                *(cell(bytes_text(dict(parts)[kind]), cls="num") for kind in kinds),
            )
        )
    return section(
        "memory",
        "Memory",
        "Memory of each rank",
        element("ul", *legend, cls="legend"),
        table(header, body, "Memory of each rank"),
        left_out(len(rows), BARS_SHOWN, "bars"),
        note("The longest bar is the fullest rank." if scale == most else "As wide as the column: a full device."),
    )
