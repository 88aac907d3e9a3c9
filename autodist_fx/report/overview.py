"""The head of the page: the model and its split, a picture of the mesh, and the numbers that readers look for first."""

from __future__ import annotations

from math import prod
from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import show_name
from autodist_fx.report.memory import share_of_device
from cost_model.explain.html import element, shorten
from cost_model.format import bytes_text, count_text, seconds_text
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.warnings import all_warnings, whole_device
from cost_model.plan.weights import sharded_share, whole_param_bytes

RANKS_DRAWN = 256
COLOURS = 8  # colours of tp ranks in page.css; the ninth rank has the first's again
WARNINGS_SHOWN = 40
FIXED_SHOWN = 12  # pins shown, and cuts shown


def overview(plan: PartitionPlan) -> list[Element]:
    """Build the title, the mesh, the tiles and the warnings."""
    ranks = "1 rank" if plan.mesh.size == 1 else f"{plan.mesh.size} ranks"
    count = sum(prod(p.shape) for p in plan.params)
    title = element(
        "div",
        element("p", "autodist_fx plan", cls="eyebrow"),
        element("h1", show_name(plan.model)),
        element(
            "p",
            f"tp={plan.mesh.tp} × pp={plan.mesh.pp}: {ranks} of {show_name(plan.hardware)}, "
            f"objective {show_name(plan.objective)}",
            cls="lead",
        ),
        element(
            "p",
            f"{count_text(count)} parameters, {bytes_text(whole_param_bytes(plan))}, {len(plan.ops)} ops",
            cls="note",
        ),
        *(element("p", text, cls="note") for text in _fixed(plan)),
    )
    return [
        element("div", title, _mesh(plan), cls="headline"),
        element("dl", *_tiles(plan), cls="tiles"),
        *_warnings(plan),
    ]


def _fixed(plan: PartitionPlan) -> list[str]:
    """Describe the pins and cuts that the user fixed before the search."""
    pins = [f"{show_name(pattern)} {show_name(role, 24)}" for pattern, role in plan.request.pin]
    cuts = [show_name(str(cut)) for cut in plan.request.cuts]
    lines = []
    for label, items in (("pinned", pins), ("cut before", cuts)):
        if items:
            more = [f"and {len(items) - FIXED_SHOWN} more"] if len(items) > FIXED_SHOWN else []
            lines.append(f"{label}: {', '.join([*items[:FIXED_SHOWN], *more])}")
    return lines


def colour(tp_rank: int) -> str:
    """Return the CSS class that gives a tp rank its colour."""
    return f"r{tp_rank % COLOURS}"


def _mesh(plan: PartitionPlan) -> Element | None:
    """Draw ranks as squares: a column per stage, a colour per tp rank. It is the legend of all other pictures, too."""
    mesh = plan.mesh
    if mesh.size > RANKS_DRAWN or max(mesh.pp, mesh.tp) > 32:
        return None
    squares = [
        element("span", str(mesh.rank(stage, t)), cls=f"rank {colour(t)}", title=f"stage {stage}, tp rank {t}")
        for t in range(mesh.tp)
        for stage in range(mesh.pp)
    ]
    grid = element(
        "div",
        *squares,
        cls="mesh",
        style=f"grid-template-columns:repeat({mesh.pp},1fr)",
        role="img",
        aria_label=f"{mesh.pp} pipeline stages of {mesh.tp} tensor-parallel ranks; rank = stage * {mesh.tp} + tp rank",
    )
    return element("figure", grid, element("figcaption", "a column a stage, a colour a tp rank"), cls="mesh-figure")


def _tiles(plan: PartitionPlan) -> list[Element]:
    """Build the tiles with the plan's main figures."""
    total = plan.predicted_seconds
    comm = sum(s.comm_seconds for s in plan.stages)
    slowest = max(plan.stages, key=lambda s: s.seconds)
    fullest = max(plan.stages, key=lambda s: s.memory_bytes)
    tiles = [_tile("One forward pass", seconds_text(total), f"predicted for {show_name(plan.hardware)}")]
    if plan.mesh.size > 1 and plan.one_device_seconds > 0 and total > 0:
        alone = f"one device{whole_device(plan)}: {seconds_text(plan.one_device_seconds)}"
        tiles.append(_tile("Speed-up", f"{plan.one_device_seconds / total:.2f}×", alone))
    if plan.mesh.size > 1 and total > 0:
        tiles.append(_tile("Communication", f"{comm / total:.0%}", f"{seconds_text(comm)} of a forward pass"))
    if plan.mesh.pp > 1:
        about = f"stage {slowest.index} bounds a full pipeline"
        tiles.append(_tile("Slowest stage", seconds_text(slowest.seconds), about))
    about = share_of_device(plan, fullest.index, fullest.memory_bytes)
    tiles.append(_tile("Fullest rank", bytes_text(fullest.memory_bytes), about))
    if plan.mesh.tp > 1:
        tiles.append(_tile("Weights sharded", f"{sharded_share(plan):.0%}", "of the bytes of matmul weights"))
    return tiles


def _tile(label: str, value: str, about: str) -> Element:
    return element("div", element("dt", label), element("dd", value), element("dd", about, cls="about"))


def _warnings(plan: PartitionPlan) -> list[Element]:
    """Build the box of warnings; [] where there are none."""
    warnings = all_warnings(plan)
    if not warnings:
        return []
    items = [element("li", shorten(warning, 600)) for warning in warnings[:WARNINGS_SHOWN]]
    if len(warnings) > WARNINGS_SHOWN:
        items.append(element("li", f"and {len(warnings) - WARNINGS_SHOWN} more"))
    return [element("div", element("h2", "Warnings"), element("ul", *items), cls="warnings", role="note")]
