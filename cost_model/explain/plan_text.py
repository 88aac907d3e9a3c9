"""Formats a plan as plain text of at most 120 columns: what each stage computes, holds, sends and costs.

Layers that are treated alike share a row, so that 80 layers read like one.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from cost_model.format import bytes_text, compress_names, count_text, ops_text, ranges_text, seconds_text
from cost_model.plan.data import Hop, ParamPlan, PlanData
from cost_model.plan.warnings import all_warnings, whole_device
from cost_model.plan.weights import is_sharded, linear_groups, param_bytes, whole_param_bytes
from cost_model.text_tables import Section, sections_text

HOPS_SHOWN = 6  # tensors named for each border


def plan_text(plan: PlanData) -> str:
    """Returns the whole plan as text: header, then `plan_sections`."""
    return sections_text(plan_header(plan), plan_sections(plan))


def plan_sections(plan: PlanData) -> list[Section]:
    """Returns the sections with content: stages, linears, collectives, hops, parameters, prediction, warnings."""
    warnings = tuple("! " + warning for warning in all_warnings(plan))
    sections = [
        _stage_section(plan),
        _linear_section(plan),
        _collective_section(plan),
        Section("Sent between stages, bytes from one tp rank", lines=_hop_lines(plan), indent=" " * 8),
        _param_section(plan),
        Section("Prediction", lines=prediction_lines(plan)),
        Section("Warnings", lines=warnings, indent="  "),
    ]
    return [section for section in sections if section.rows or section.lines]


def plan_header(plan: PlanData) -> list[str]:
    """Returns two lines: model, mesh and objective; and the model's size."""
    ranks = f"{plan.mesh.size} rank{'s' if plan.mesh.size > 1 else ''}"
    sizes = ", ".join(f"{symbol}={length}" for symbol, length in plan.sizes)
    count = sum(prod(p.shape) for p in plan.params)
    return [
        f"{plan.model} on {plan.mesh} ({ranks} of {plan.hardware}), objective {plan.objective}",
        f"{count_text(count)} parameters, {bytes_text(whole_param_bytes(plan))}; {ops_text(len(plan.ops))}; "
        f"predicted at {sizes or 'the traced sizes'}; graph {plan.fingerprint[:12]}",
    ]


def _stage_section(plan: PlanData) -> Section:
    memory = ("weights", "KV", "activ.", "work", "total")
    rows = [("stage", "ranks", "layers", "compute", "comm", "FLOPs", *memory, "recomputes")]
    for s in plan.stages:
        first, last = s.index * plan.mesh.tp, (s.index + 1) * plan.mesh.tp - 1
        rows.append((
            str(s.index),
            f"{first}-{last}" if last > first else str(first),
            ", ".join(compress_names(s.layers)) or "-",
            seconds_text(s.compute_seconds),
            seconds_text(s.comm_seconds),
            count_text(s.flops),
            bytes_text(s.weight_bytes),
            bytes_text(s.kv_cache_bytes),
            bytes_text(s.activation_bytes),
            bytes_text(s.workspace_bytes),
            bytes_text(s.memory_bytes),
            ops_text(len(s.recomputed)) if s.recomputed else "-",
        ))  # fmt: skip
    title = "Stages, one forward, each on its slowest tp rank"
    return Section(title, tuple(rows), left=(0, 1, 2), flexible=2)


def _linear_section(plan: PlanData) -> Section:
    rows = [("module", "role", "times", "weight", "on each tp rank")]
    for group in linear_groups(plan):
        rows.append((group.label, group.role, f"x{len(group.modules)}", group.shape, group.local))
    return Section("Linears and embeddings", tuple(rows) if len(rows) > 1 else (), left=(0, 1, 3, 4), flexible=0)


def _collective_section(plan: PlanData) -> Section:
    title = "Collectives in one forward, bytes of whole tensors"
    groups: dict[tuple[tuple[str, int, int], ...], list[int]] = {}
    for s in plan.stages:
        groups.setdefault(s.collectives, []).append(s.index)
    if not any(groups):
        return Section(title, lines=("none",))
    rows = [("stage", "collective", "times", "bytes")]
    total: dict[str, tuple[int, int]] = {}
    for collectives, stages in groups.items():
        label = "stages " + ranges_text(stages) + ", each" if len(stages) > 1 else f"stage {stages[0]}"
        for name, count, nbytes in collectives:
            rows.append((label, name, str(count), bytes_text(nbytes)))
            n, b = total.get(name, (0, 0))
            total[name] = n + count * len(stages), b + nbytes * len(stages)
    if len(plan.stages) > 1:
        rows += [("all stages", name, str(n), bytes_text(b)) for name, (n, b) in total.items()]
    return Section(title, tuple(rows), left=(0, 1))


def _hop_lines(plan: PlanData) -> tuple[str, ...]:
    if plan.mesh.pp == 1:
        return ()
    borders: dict[tuple[int, int], list[Hop]] = {}
    for hop in plan.hops:
        borders.setdefault((hop.source, hop.target), []).append(hop)
    lines = []
    for (source, target), hops in sorted(borders.items()):
        hops = sorted(hops, key=lambda h: -h.nbytes)
        named = [_hop_text(plan, h) for h in hops[:HOPS_SHOWN]]
        if len(hops) > HOPS_SHOWN:
            rest = hops[HOPS_SHOWN:]
            named.append(f"and {len(rest)} more ({bytes_text(sum(h.nbytes for h in rest))})")
        lines.append(f"{source} -> {target}  {', '.join(named)}")
    return tuple(lines) or ("nothing",)


def _hop_text(plan: PlanData, hop: Hop) -> str:
    name = hop.op if len(plan.op(hop.op).outputs) == 1 else f"{hop.op}[{hop.index}]"
    placement = plan.op(hop.op).outputs[hop.index]
    return f"{name} ({bytes_text(hop.nbytes)}{'' if hop.whole or placement.is_replicate else f', {placement}'})"


def _param_section(plan: PlanData) -> Section:
    rows = [("", "whole", "sharded", "replicated", "share sharded")]
    for label, params in (
        ("weights of matmuls and embeddings", [p for p in plan.params if p.matmul]),
        ("norms, biases and others", [p for p in plan.params if not p.matmul]),
    ):
        total = sum(param_bytes(p) for p in params)
        sharded = sum(param_bytes(p) for p in params if is_sharded(plan, p))
        share = f"{sharded / total:.1%}" if total else "-"
        rows.append((label, bytes_text(total), bytes_text(sharded), bytes_text(total - sharded), share))
    lines: tuple[str, ...] = ()
    tied = [p for p in plan.params if len(p.stages) > 1]
    if tied:
        names = ", ".join(f"{label} (stages {ranges_text(stages)})" for label, stages in _by_stages(tied))
        lines = (f"held by several stages: {names}",)
    return Section("Parameters", tuple(rows) if plan.mesh.tp > 1 else (), lines, left=(0,), indent="  ")


def prediction_lines(plan: PlanData) -> tuple[str, ...]:
    """Returns lines on the predicted time, on one device's, on the slowest and on the fullest stage."""
    compute, comm = sum(s.compute_seconds for s in plan.stages), sum(s.comm_seconds for s in plan.stages)
    total = plan.predicted_seconds
    share = f", {comm / total:.0%} of it communication" if total > 0 and plan.mesh.size > 1 else ""
    parts = f"compute {seconds_text(compute)}, communication {seconds_text(comm)}"
    lines = [f"one forward {seconds_text(total)} ({parts}){share}"]
    if plan.mesh.size > 1 and plan.one_device_seconds > 0 and total > 0:
        lines.append(
            f"one device  {seconds_text(plan.one_device_seconds)}{whole_device(plan)}: predicted speed-up "
            f"{plan.one_device_seconds / total:.2f} on {plan.mesh.size} ranks"
        )
    if plan.mesh.pp > 1 and total > 0:
        slowest = max(plan.stages, key=lambda s: s.seconds)
        lines.append(
            f"slowest stage {slowest.index} with {seconds_text(slowest.seconds)}: what bounds a pipeline kept full, "
            f"{total / slowest.seconds:.1f}x the pace of one microbatch at a time"
        )
    if plan.device_memory_bytes and plan.stages:
        fullest = max(plan.stages, key=lambda s: s.memory_bytes)
        lines.append(
            f"fullest stage {fullest.index} with {bytes_text(fullest.memory_bytes)} "
            f"of {bytes_text(plan.memory_of_stage(fullest.index))} a device"
        )
    return tuple(lines)


def _by_stages(params: Iterable[ParamPlan]) -> list[tuple[str, tuple[int, ...]]]:
    groups: dict[tuple[int, ...], list[str]] = {}
    for p in params:
        groups.setdefault(p.stages, []).append(p.name)
    return [(", ".join(compress_names(names)), stages) for stages, names in groups.items()]

