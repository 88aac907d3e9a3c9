"""Breaks a plan's costs down: the dearest ops, the bytes that move between ranks, the share of communication."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cost_model.explain.cut import cut_reason
from cost_model.explain.plan_text import prediction_lines
from cost_model.format import bytes_text, compress_names, name_pattern, seconds_text
from cost_model.plan.data import OpPlan, PlanData
from cost_model.plan.warnings import all_warnings
from cost_model.text_tables import Section

DEAREST = 10  # groups of ops listed


@dataclass(frozen=True, slots=True)
class OpGroup:
    """Ops of one kind and role in one place of a layer, over all layers; seconds of one forward, all ops together."""

    place: str  # "model.layers.*.mlp.up_proj"
    kind: str
    role: str
    times: int  # a recomputed op counts once for each stage that computes it
    compute_seconds: float
    comm_seconds: float

    @property
    def seconds(self) -> float:
        """Compute and collectives of one forward."""
        return self.compute_seconds + self.comm_seconds


def dearest(plan: PlanData) -> list[OpGroup]:
    """Returns all groups of ops, the dearest first."""
    groups: dict[tuple[str, str, str], list[OpPlan]] = {}
    for op in plan.ops:
        groups.setdefault((name_pattern(op.module), op.kind, op.role), []).append(op)
    found = []
    for (place, kind, role), ops in groups.items():
        times = sum(len(op.stages) for op in ops)
        compute = sum(op.compute_seconds * len(op.stages) for op in ops)
        comm = sum(op.comm_seconds * len(op.stages) for op in ops)
        label = ops[0].module if len({op.module for op in ops}) == 1 else place
        found.append(OpGroup(label, kind, role, times, compute, comm))
    return sorted(found, key=lambda group: -group.seconds)


def moved_bytes(plan: PlanData) -> dict[str, int]:
    """Returns the bytes over all links in one forward, all ranks together, by all_reduce, all_gather and send.

    Collectives are counted as rings (costs/communication.py): for a tensor that is whole on n ranks in the end,
    all_reduce moves 2 (n-1) times its bytes and all_gather n-1 times. A send moves what each tp rank sends.
    """
    n = plan.mesh.tp
    moved: dict[str, int] = {}
    for stage in plan.stages:
        for name, _, nbytes in stage.collectives:
            moved[name] = moved.get(name, 0) + nbytes * (n - 1) * (2 if name == "all_reduce" else 1)
    if plan.hops:
        moved["send"] = sum(hop.nbytes for hop in plan.hops) * n
    return moved


def tokens(plan: PlanData) -> int:
    """Returns the tokens of one forward, over all sequences; 1 for models without such lengths."""
    sizes = dict(plan.sizes)
    return max(1, sizes.get("B", 1) * sizes.get("S", 1))


def whole_facts(plan: PlanData) -> dict[str, Any]:
    """Returns what `whole_sections` says, as JSON-ready values."""
    total, moved = plan.predicted_seconds, moved_bytes(plan)
    comm = sum(stage.comm_seconds for stage in plan.stages)
    return {
        "model": plan.model,
        "mesh": {"tp": plan.mesh.tp, "pp": plan.mesh.pp},
        "hardware": plan.hardware,
        "objective": plan.objective,
        "sizes": dict(plan.sizes),
        "predicted_seconds": total,
        "comm_seconds": comm,
        "comm_share": comm / total if total > 0 else 0.0,
        "one_device_seconds": plan.one_device_seconds,
        "speed_up": plan.one_device_seconds / total if total > 0 else None,
        "moved_bytes": moved,
        "tokens": tokens(plan),
        "dearest": [
            {
                "place": g.place, "kind": g.kind, "role": g.role, "times": g.times,
                "compute_seconds": g.compute_seconds, "comm_seconds": g.comm_seconds,
            }
            for g in dearest(plan)[:DEAREST]
        ],
        "cuts": [
            {"cut": k, "op": cut.options[cut.chosen].op, "why": cut_reason(plan, k)} for k, cut in enumerate(plan.cuts)
        ],
        "warnings": all_warnings(plan),
    }  # fmt: skip


def whole_sections(plan: PlanData) -> list[Section]:
    """Returns the sections with content: prediction, bytes moved, the dearest ops, the cuts, warnings."""
    sections = [
        Section("Prediction", lines=prediction_lines(plan)),
        _moved_section(plan),
        _dearest_section(plan),
        Section("Cuts", lines=tuple(_cut_line(plan, k) for k in range(len(plan.cuts))), indent=" " * 8),
        Section("Warnings", lines=tuple("! " + warning for warning in all_warnings(plan)), indent="  "),
    ]
    return [section for section in sections if section.rows or section.lines]


def _moved_section(plan: PlanData) -> Section:
    moved = moved_bytes(plan)
    if not moved:
        return Section("")
    per_forward = {**moved, "all": sum(moved.values())} if len(moved) > 1 else moved
    count = tokens(plan)
    rows = [("by", "a forward", "a token")]
    rows += [(name, bytes_text(nbytes), bytes_text(nbytes / count)) for name, nbytes in per_forward.items()]
    title = f"Bytes moved, over all links together; {count} token{'s' if count > 1 else ''} a forward"
    return Section(title, tuple(rows), left=(0,))


def _dearest_section(plan: PlanData) -> Section:
    groups = [group for group in dearest(plan) if group.seconds > 0]
    total = plan.predicted_seconds
    rows = [("ops", "kind", "role", "times", "compute", "collectives", "share")]
    for g in groups[:DEAREST]:
        share = f"{g.seconds / total:.1%}" if total > 0 else "-"
        costs = (seconds_text(g.compute_seconds), seconds_text(g.comm_seconds) if g.comm_seconds else "-", share)
        rows.append((g.place or "-", g.kind, g.role or "-", f"x{g.times}", *costs))
    rest = groups[DEAREST:]
    lines: tuple[str, ...] = ()
    if rest and total > 0:
        lines = (f"and {len(rest)} more, {sum(g.seconds for g in rest) / total:.1%} together",)
    title = f"The dearest ops of {len(groups)}, same places of all layers together"
    return Section(title, tuple(rows) if len(rows) > 1 else (), lines, left=(0, 1, 2), flexible=0)


def _cut_line(plan: PlanData, k: int) -> str:
    option = plan.cuts[k].options[plan.cuts[k].chosen]
    place = compress_names([option.module])[0] if option.module else option.op
    return f"{k} -> {k + 1}  before {place}: {cut_reason(plan, k)}"
