"""Draws the pipeline as columns: each stage with its layers and
its costs, and between two stages the tensors that cross."""

from __future__ import annotations

from collections import Counter
from xml.etree.ElementTree import Element

from autodist_fx.report.html_parts import STAGES_SHOWN, badge, left_out, name, note, ranks_text, section, show_name
from autodist_fx.report.memory import memory_bar, parts_of
from autodist_fx.report.stage_transfers import Sent, bytes_of, crossing, sent_tensors
from cost_model.explain.html import element
from cost_model.format import bytes_text, compress_names, count_text, name_pattern, ranges_text, seconds_text
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import OpPlan, StageSummary

BLOCKS_SHOWN = 12  # groups of layers in a stage
TENSORS_SHOWN = 4  # tensors at an arrow


def stages_section(plan: PartitionPlan) -> Element:
    """Build the section "Stages and their layers"."""
    roles = _roles(plan)
    also = _also_in(plan)
    sent = sent_tensors(plan)
    columns: list[Element] = []
    for s in plan.stages[:STAGES_SHOWN]:
        if s.index:
            columns.append(_arrow(plan, sent, s.index - 1))
        columns.append(_stage(plan, s, roles, also))
    return section(
        "stages",
        "Stages",
        "Stages and their layers" if plan.mesh.pp > 1 else "Layers",
        element("div", *columns, cls="pipeline", tabindex="0", role="region", aria_label="Pipeline stages"),
        left_out(len(plan.stages), STAGES_SHOWN, "stages"),
        note("Seconds and bytes of one forward pass on a stage's slowest and fullest tp rank; what one tp rank sends."),
    )


def layer_of(module: str) -> str:
    """Return a module's path up to its first number, as "model.layers.3"; all of it where it has none."""
    atoms = module.split(".")
    number = next((i for i, atom in enumerate(atoms) if atom.isdecimal()), len(atoms))
    return ".".join(atoms[: number + 1])


def _roles(plan: PartitionPlan) -> dict[tuple[int, str], Counter[str]]:
    """Count the roles of each stage's linears, by (stage, pattern of the layer)."""
    found: dict[tuple[int, str], Counter[str]] = {}
    for op in plan.ops:
        if op.role:
            found.setdefault((op.home, name_pattern(layer_of(_module(op)))), Counter())[op.role] += 1
    return found


def _module(op: OpPlan) -> str:
    return op.module or op.name


def _also_in(plan: PartitionPlan) -> dict[str, list[int]]:
    """Map each layer of which several stages run parts to these stages."""
    found: dict[str, list[int]] = {}
    for s in plan.stages:
        for layer in s.layers:
            found.setdefault(layer, []).append(s.index)
    return {layer: stages for layer, stages in found.items() if len(stages) > 1}


def _stage(
    plan: PartitionPlan, s: StageSummary, roles: dict[tuple[int, str], Counter[str]], also: dict[str, list[int]]
) -> Element:
    """Build the column of one stage."""
    groups: dict[str, list[str]] = {}
    for layer in s.layers:
        groups.setdefault(name_pattern(layer), []).append(layer)
    blocks = [
        _block(layers, roles.get((s.index, pattern), Counter()), s.index, also)
        for pattern, layers in list(groups.items())[:BLOCKS_SHOWN]
    ]
    facts = [
        ("compute", seconds_text(s.compute_seconds)),
        ("communication", seconds_text(s.comm_seconds)),
        ("FLOPs", count_text(s.flops)),
        ("memory", bytes_text(s.memory_bytes)),
    ]
    most = max(x.memory_bytes for x in plan.stages)
    return element(
        "article",
        element("h3", f"Stage {s.index}", element("small", ranks_text(plan.mesh.tp, s.index) + _device(plan, s.index))),
        element("ol", *(blocks or [element("li", "no weights", cls="block")]), cls="layers"),
        left_out(len(groups), BLOCKS_SHOWN, "groups of layers"),
        element("dl", *(element("div", element("dt", k), element("dd", v)) for k, v in facts), cls="facts"),
        memory_bar(parts_of(s), most, None),
        cls="stage",
    )


def _device(plan: PartitionPlan, stage: int) -> str:
    """Name the stage's device, where stages differ in theirs."""
    devices = plan.request.device_map
    return f" of {show_name(devices[stage].hardware, 24)}" if stage < len(devices) else ""


def _block(layers: list[str], roles: Counter[str], stage: int, also: dict[str, list[int]]) -> Element:
    """Build the box of layers that are alike: their names, their roles, and the other stages that run parts of them."""
    times = element("span", f"×{len(layers)}", cls="times") if len(layers) > 1 else None
    shared = [
        f"{show_name(layer.rpartition('.')[2])} also in stage {ranges_text(k for k in also[layer] if k != stage)}"
        for layer in layers
        if layer in also
    ]
    return element(
        "li",
        element("div", name(", ".join(compress_names(layers))), times, cls="block-name"),
        element("div", *(badge(role, n if n > 1 else 0) for role, n in roles.items()), cls="badges") if roles else None,
        element("div", "layer " + ", ".join(shared[:3]), cls="note") if shared else None,
        cls="block repeated" if len(layers) > 1 else "block",
    )


def _arrow(plan: PartitionPlan, everything: list[Sent], before: int) -> Element:
    """Build the arrow between stage `before` and the next, with the tensors that cross there."""
    sent = crossing(everything, before)
    items = [element("li", name(x.label), element("span", bytes_text(x.nbytes), cls="amount"), _targets(x, before))
             for x in sent[:TENSORS_SHOWN]]  # fmt: skip
    again = len(plan.stages[before + 1].recomputed)
    return element(
        "div",
        element("div", bytes_text(bytes_of(sent)) if sent else "nothing", cls="arrow"),
        element("ul", *items) if items else None,
        left_out(len(sent), TENSORS_SHOWN, f"({bytes_text(bytes_of(sent[TENSORS_SHOWN:]))})"),
        element("p", f"{again} {'op' if again == 1 else 'ops'} computed again", cls="again") if again else None,
        cls="border",
        role="group",
        aria_label=f"from stage {before} to stage {before + 1}",
    )


def _targets(sent: Sent, before: int) -> Element | None:
    """Name the stages at both ends of a transfer, where these are not the two neighbours."""
    if sent.targets == (before + 1,):
        return None
    source = f"from stage {sent.source} " if sent.source < before else ""
    plural = "s" if len(sent.targets) > 1 else ""
    return element("span", f"{source}to stage{plural} {ranges_text(sent.targets)}", cls="to")
