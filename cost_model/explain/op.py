"""Explains why an op runs as it does: its role, the costs of the roles it could have, the collectives it causes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cost_model.format import bytes_text, compress_names, name_pattern, ranges_text, seconds_text
from cost_model.graph.roles import MEANING
from cost_model.plan.data import Alternative, OpPlan, PlanData
from cost_model.plan.weights import local_shape, weight_of
from cost_model.rules.losses import EXCHANGED
from cost_model.rules.table import has_rule, plain_kind
from cost_model.text_tables import Section

_NO_ROLES = "Roles are of linears, embeddings, convolutions and layers of experts"


def alike(plan: PlanData, ops: Sequence[OpPlan]) -> list[list[OpPlan]]:
    """Groups ops that the plan treats alike, whatever their layer and stage."""
    groups: dict[object, list[OpPlan]] = {}
    for op in ops:
        costs = (op.compute_seconds, op.comm_seconds, op.comm_bytes)
        key = (op.kind, op.role, op.factor, op.inputs, op.outputs, op.gather, op.input_layouts, op.output_layouts)
        place = name_pattern(op.module) if op.module else op.name
        groups.setdefault((key, costs, plan.alternatives(op), place), []).append(op)
    return list(groups.values())


def collectives_of(op: OpPlan) -> list[str]:
    """Returns the names of the op's collectives: what ranks tell each other while it runs (rules/losses.py), and one
    for each output that is made whole."""
    inside = ["all_gather"] if op.factor and EXCHANGED.get(op.kind) == op.factor else []
    return inside + ["all_reduce" if p.is_partial else "all_gather" for p, whole in zip(op.outputs, op.gather) if whole]


def op_facts(plan: PlanData, ops: Sequence[OpPlan]) -> dict[str, Any]:
    """Returns what `op_sections` says of ops that are alike, as JSON-ready values."""
    op = ops[0]
    weight = weight_of(op, {p.name: p for p in plan.params}) if op.role else None
    return {
        "ops": [o.name for o in ops],
        "modules": [o.module for o in ops],
        "kind": op.kind,
        "role": op.role,
        "factor": op.factor,
        "rule": has_rule(op.kind),
        "stages": sorted({stage for o in ops for stage in o.stages}),
        "inputs": [str(p) for p in op.inputs],
        "outputs": [str(p) for p in op.outputs],
        "weight_shape": list(weight.shape) if weight else None,
        "local_shape": local_shape(plan, op, weight) if weight else None,
        "compute_seconds": op.compute_seconds,
        "collectives": collectives_of(op),
        "comm_seconds": op.comm_seconds,
        "comm_bytes": op.comm_bytes,
        "alternatives": [
            {
                "role": a.role, "chosen": a.role == op.role, "seconds": a.seconds, "weight_bytes": a.weight_bytes,
                "impossible": a.impossible,
            }
            for a in plan.alternatives(op)
        ],
    }  # fmt: skip


def sections_of(plan: PlanData, groups: Sequence[Sequence[OpPlan]]) -> list[Section]:
    """Returns the sections of groups of alike ops: each with its roles, or one table of all where none has roles."""
    if len(groups) > 1 and not any(ops[0].role for ops in groups):
        return [_table(plan, groups)]
    return [section for ops in groups for section in op_sections(plan, ops)]


def op_sections(plan: PlanData, ops: Sequence[OpPlan]) -> list[Section]:
    """Returns two sections: what the op does, and which roles it could have. `ops` are alike."""
    op, facts = ops[0], op_facts(plan, ops)
    place = ", ".join(compress_names(o.module for o in ops)) if op.module else op.name
    title = f"{place}: {op.kind}" + (f", x{len(ops)} (figures of each)" if len(ops) > 1 else f" ({op.name})")
    lines = []
    if op.role:
        lines.append(f"role         {op.role}" + (f": {MEANING[op.role]}" if op.role in MEANING else ""))
    else:
        lines.append(f"cut          {_cut_text(op)}")
    if not facts["rule"] and plan.mesh.tp > 1:
        lines.append(f"rule         none for {plain_kind(op.kind)}, so that no rank can have a part of it")
    if facts["weight_shape"]:
        shape = "x".join(map(str, facts["weight_shape"]))
        whole = op.owner is not None
        lies = f"whole on tp rank {op.owner} alone" if whole else f"on each tp rank {facts['local_shape']}"
        lines.append(f"weight       {shape}, {lies}")
    lines.append(f"stages       {ranges_text(facts['stages'])}")
    lines.append(f"tensors      reads {', '.join(facts['inputs']) or 'none'}; leaves {', '.join(facts['outputs'])}")
    fused = "none of its own: fused with the ops that read it"
    lines.append(f"seconds      {seconds_text(op.compute_seconds) if op.compute_seconds else fused}")
    names = ", ".join(facts["collectives"])
    collectives = f"{names} of {bytes_text(op.comm_bytes)}, {seconds_text(op.comm_seconds)}" if names else "none"
    lines.append(f"collectives  {collectives}")
    return [Section(title, lines=tuple(lines), indent=" " * 13), _alternatives(plan, op)]


def _table(plan: PlanData, groups: Sequence[Sequence[OpPlan]]) -> Section:
    rows = [("op", "times", "stages", "cut", "reads", "leaves", "compute", "collectives")]
    for ops in groups:
        op, facts = ops[0], op_facts(plan, ops)
        cut = _cut_text(op).partition(":")[0].removesuffix(" of what it leaves")
        rows.append((
            op.kind,
            f"x{len(ops)}",
            ranges_text(facts["stages"]),
            cut if op.owner is None else f"rank {op.owner}",
            ", ".join(facts["inputs"]) or "-",
            ", ".join(facts["outputs"]),
            seconds_text(op.compute_seconds) if op.compute_seconds else "fused",
            f"{', '.join(facts['collectives'])}, {seconds_text(op.comm_seconds)}" if facts["collectives"] else "-",
        ))  # fmt: skip
    place = ", ".join(compress_names(op.module for ops in groups for op in ops if op.module)) or "-"
    lines = (f"{_NO_ROLES}: these are cut as suits those around them. Seconds are of each; fused: with what reads it.",)
    return Section(f"{place}: its own ops", tuple(rows), lines, left=(0, 3, 4, 5, 7), flexible=4, indent="  ")


def _cut_text(op: OpPlan) -> str:
    """Describes how an op without a role is cut, by the placements of its outputs."""
    if op.owner is not None:
        return f"not: tp rank {op.owner} alone does it"
    if not op.factor:
        return "not: every tp rank does all of it"
    dims = list(dict.fromkeys(p.dim for p in op.outputs if p.is_shard))
    if dims:
        return f"along dim {', '.join(map(str, dims))} of what it leaves"
    return "along what it sums over" if any(p.is_partial for p in op.outputs) else f"along {op.factor}"


def _alternatives(plan: PlanData, op: OpPlan) -> Section:
    title = "Roles it could have, everything else then chosen anew"
    found = plan.alternatives(op)
    if not found:
        if op.role:
            why = "one tp rank has all of it" if plan.mesh.tp == 1 else "there is nothing to choose"
        else:
            why = f"{_NO_ROLES.lower()}; this op is cut as suits those around it"
        return Section(title, lines=(f"none: {why}",))
    rows = [("role", "one forward", "weights a rank", "")]
    for a in sorted(found, key=lambda a: (a.role != op.role, bool(a.impossible), a.seconds)):
        if a.impossible:
            rows.append((a.role, "-", "-", f"not possible: {a.impossible}"))
        elif a.role == op.role:
            rows.append((a.role, seconds_text(plan.predicted_seconds), "as planned", "chosen"))
        else:
            costs = (_signed(a.seconds, seconds_text), _signed(a.weight_bytes, bytes_text))
            rows.append((a.role, *costs, _verdict(plan, a)))
    return Section(title, tuple(rows), left=(0, 3), flexible=3)


def _signed(value: float, text: Any) -> str:
    return f"{'-' if value < 0 else '+'}{text(abs(value))}" if value else "the same"


def _verdict(plan: PlanData, a: Alternative) -> str:
    if a.seconds > 0:
        return "dearer"
    if a.weight_bytes > 0:
        return f"{'faster' if a.seconds else 'as fast'}, but ranks hold more: not with objective {plan.objective}"
    return "faster by so little that rounding decides" if a.seconds else "as good"
