"""Lists every weight and draws its split to scale: linears and
embeddings to search and sort, then all other parameters."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import (
    badge,
    bytes_change,
    cell,
    left_out,
    name,
    note,
    seconds_change,
    section,
    show_name,
    table,
)
from autodist_fx.report.memory import owner_of
from autodist_fx.report.split_bar import SplitBars, matrix
from cost_model.explain.html import element, shorten
from cost_model.format import bytes_text, name_pattern, ranges_text
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import ParamPlan
from cost_model.plan.weights import LinearGroup, linear_groups, param_bytes

ROWS_SHOWN = 400
ROLES_SHOWN = 4  # other roles of a linear


def weights_section(plan: PartitionPlan) -> list[Element | None]:
    """Build the sections of linears and of other parameters."""
    bars = SplitBars(plan.layouts, plan.mesh.tp)
    groups = linear_groups(plan)
    return [_linears(plan, groups, bars), _others(plan, groups, bars)]


def _linears(plan: PartitionPlan, groups: list[LinearGroup], bars: SplitBars) -> Element | None:
    """Build the table of linears and embeddings; None for a model without them."""
    if not groups:
        return None
    header = [("Module", ""), ("Role", ""), ("Times", "num"), ("Weight", ""), ("Split over tp ranks", "wide"),
              ("On each tp rank", ""), ("Instead", ""), ("Largest", "num"), ("All layers", "num"),
              ("Stages", "num")]  # fmt: skip
    rows = [_linear(plan, group, bars) for group in groups[:ROWS_SHOWN]]
    search = element(
        "p",
        element("label", "Search ", element("input", type="search", placeholder="layers.3.mlp, column, 8192 …",
                autocomplete="off", spellcheck="false", data_search="linears-table")),
        element("output", cls="found", aria_live="polite"),
        cls="search",
        hidden="hidden",
    )  # fmt: skip
    return section(
        "linears",
        "Linears",
        "Linears and embeddings",
        note("Each weight in its proportions, and beside it the dim that is cut, to scale; colours and numbers are tp "
             "ranks. Layers that are treated alike share a row. Instead: other roles, and what a forward pass would "
             "take longer with one of the layers in that role. A faster role was not taken where more would be held."),
        search,
        table(header, rows, "Linears and embeddings", id="linears-table", data_sortable="yes"),
        left_out(len(groups), ROWS_SHOWN, "rows"),
    )  # fmt: skip


def _linear(plan: PartitionPlan, group: LinearGroup, bars: SplitBars) -> Element:
    """Build the row of linears that are alike."""
    weight, layout = (group.weights or (None,))[0], plan.layout(group.layout)
    whole = param_bytes(weight) if weight else 0
    in_all = sum(map(param_bytes, group.weights))
    share = layout.max_local_size / layout.size if layout and layout.size else 1.0
    return element(
        "tr",
        element("th", name(group.label), scope="row"),
        cell(badge(group.role)),
        cell(f"×{len(group.modules)}", len(group.modules), "num"),
        cell(show_name(group.shape, 60).replace("x", "×"), prod(weight.shape) if weight else 0, "nowrap"),
        cell(_drawn(plan, group.weights, group.layout, bars), share, "wide"),
        cell(show_name(group.local, 60).replace("x", "×"), share * whole, "nowrap"),
        cell(_instead(group), cls="nowrap aside"),
        cell(bytes_text(share * whole) if weight else "–", share * whole, "num"),
        cell(bytes_text(in_all) if weight else "–", in_all, "num"),
        cell(ranges_text(group.stages), group.stages[0], "num"),
        data_layers=_numbers(group.modules),
    )


def _instead(group: LinearGroup) -> Element | str:
    """List the other roles that the linears could have, and how much slower one forward would be with each."""
    lines = []
    for other in group.alternatives:
        if other.role == group.role:
            continue
        role = show_name(other.role, 16)
        if other.impossible:
            lines.append(element("div", element("s", role), title=shorten(other.impossible, 200)))
            continue
        about = f"{seconds_change(other.seconds)} a forward, {bytes_change(other.weight_bytes)} of weights held"
        lines.append(element("div", f"{role} {seconds_change(other.seconds)}", title=about))
    return element("small", *lines[:ROLES_SHOWN]) if lines else "–"


def _drawn(plan: PartitionPlan, weights: Sequence[ParamPlan], index: int, bars: SplitBars) -> Element:
    """Draw the split of a row's first weight; for weights that
    each lie whole on one rank, draw how many each rank has."""
    owners = [owner_of(weight.placement) for weight in weights]
    if owners and min(owners) >= 0:
        counts = [owners.count(rank) for rank in range(plan.mesh.tp)]
        return element("div", bars.counts(counts), element("small", f"{len(owners)} whole weights", cls="dim"))
    bar = bars.bar(index)
    layout = plan.layout(index)
    if bar is None:
        return element("span", "too many pieces to draw", cls="note")
    if not weights:
        return bar
    shape, dim, words = weights[0].shape, weights[0].placement.dim, None
    if layout is not None and not layout.is_whole and plan.mesh.tp > 1:
        kind = {(0, 2): "rows", (1, 2): "columns"}.get((dim, len(shape)), f"elements of dim {dim}")
        words = element("small", f"{layout.size} {kind}", cls="dim")
    small = matrix(shape, layout, dim)
    return element("div", small, element("div", bar, words), cls="drawing" if small is not None else None)


def _numbers(modules: tuple[str, ...]) -> str | None:
    """Return the layers' numbers as "0-79", by which the page's search finds a row that stands for many layers."""
    layers = [int(atom) for m in modules for atom in [next((a for a in m.split(".") if a.isdecimal()), "")] if atom]
    return ranges_text(layers) if layers else None


def _others(plan: PartitionPlan, groups: list[LinearGroup], bars: SplitBars) -> Element | None:
    """Build the table of parameters of no linear (norms, biases,
    position tables); equal shape and split share a row."""
    listed = {weight.name for group in groups for weight in group.weights}
    params_by_row: dict[tuple[str, tuple[int, ...], str, int, bool], list[ParamPlan]] = {}
    for param in plan.params:
        if param.name not in listed:
            key = (name_pattern(param.name), param.shape, param.dtype, param.layout, owner_of(param.placement) >= 0)
            params_by_row.setdefault(key, []).append(param)
    if not params_by_row:
        return None
    rows = []
    for (pattern, shape, dtype, layout, _), params in list(params_by_row.items())[:ROWS_SHOWN]:
        nbytes = sum(map(param_bytes, params))
        label = pattern if len(params) > 1 else params[0].name
        stages = {stage for p in params for stage in p.stages}
        rows.append(
            element(
                "tr",
                element("th", name(label), scope="row"),
                cell(f"×{len(params)}", len(params), "num"),
                cell("×".join(map(str, shape[:8])) or "scalar", prod(shape), "nowrap"),
                cell(show_name(dtype, 20)),
                cell(_drawn(plan, params, layout, bars), None, "wide"),
                cell(bytes_text(nbytes), nbytes, "num"),
                cell(ranges_text(stages), min(stages), "num"),
            )
        )
    header = [("Parameter", ""), ("Times", "num"), ("Shape", ""), ("Dtype", ""), ("Split over tp ranks", "wide"),
              ("In all", "num"), ("Stages", "num")]  # fmt: skip
    count = sum(len(params) for params in params_by_row.values())
    row_count = len(params_by_row)
    return section(
        "others",
        "Other parameters",
        "Norms, biases and other parameters",
        element(
            "details",
            element("summary", f"{count} parameters, {row_count} row{'s' if row_count > 1 else ''}"),
            table(header, rows, "Other parameters", data_sortable="yes"),
            left_out(row_count, ROWS_SHOWN, "rows"),
        ),
    )


__all__ = ["weights_section"]
