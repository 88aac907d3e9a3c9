"""Compares two plans of one model, whatever their meshes: cuts, roles, bytes, memory, seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from math import prod
from typing import Any

from cost_model.errors import PlanError
from cost_model.format import bytes_text, compress_names, count_text, name_pattern, seconds_text
from cost_model.plan.data import OpPlan, PlanData
from cost_model.plan.warnings import whole_device
from cost_model.text_tables import Section, sections_text

ONE_DEVICE = "one device"


@dataclass(frozen=True, slots=True)
class Changed:
    """A value that differs between two plans; None where a plan has none."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A change of role, of ops in one place of all layers. "" stands for an op without a role, or for no such op."""

    place: str
    modules: tuple[str, ...]
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class PlanDiff:
    """The differences of two plans, as `PartitionPlan.diff` returns them: empty where they are equal.

    `str()` is a report on all differences, "" for equal plans.
    """

    model: str
    settings: tuple[Changed, ...] = ()  # mesh, hardware, objective, sizes, graph
    cuts: tuple[Changed, ...] = ()  # (border, first op of the stage behind it and its module)
    roles: tuple[RoleChange, ...] = ()
    placements: int = 0  # number of ops with the same role, but other placements or gathers; or in one plan only
    stages_moved: int = 0  # number of ops that other stages compute
    counts: tuple[Changed, ...] = ()  # numbers of collectives and sends in one forward
    nbytes: tuple[Changed, ...] = ()  # their bytes: whole tensors of collectives; sends from one tp rank
    memory: tuple[Changed, ...] = ()  # bytes on a rank of the fullest stage
    seconds: tuple[Changed, ...] = ()
    other: tuple[str, ...] = ()  # further fields of the plan that differ: layouts, choices, warnings, ...

    def __bool__(self) -> bool:
        """True if the plans differ."""
        return any(getattr(self, f.name) for f in fields(self) if f.name != "model")

    def __str__(self) -> str:
        return sections_text([f"{self.model}: the plans differ"], _sections(self)) if self else ""

    def to_dict(self) -> dict[str, Any]:
        """Returns the differences as JSON-ready values."""
        return asdict(self)


def diff_plans(before: PlanData, after: PlanData) -> PlanDiff:
    """Compares two plans. Raises PlanError when they are of different models."""
    if before.model != after.model:
        models = f"{before.model} and {after.model}"
        raise PlanError(f"the plans are of different models, {models}: compare plans of one model")
    if before == after:
        return PlanDiff(before.model)
    roles, placements, moved = _ops(before, after)
    ours, theirs = _communication(before), _communication(after)
    kinds = dict.fromkeys([*ours, *theirs])
    diff = PlanDiff(
        model=before.model,
        settings=_changes({k: (v, _settings(after)[k]) for k, v in _settings(before).items()}),
        cuts=_changes({k: (_cuts(before).get(k), _cuts(after).get(k)) for k in _cuts(before) | _cuts(after)}),
        roles=tuple(roles),
        placements=placements,
        stages_moved=moved,
        counts=_changes({k: (ours.get(k, (0, 0))[0], theirs.get(k, (0, 0))[0]) for k in kinds}),
        nbytes=_changes({k: (ours.get(k, (0, 0))[1], theirs.get(k, (0, 0))[1]) for k in kinds}),
        memory=_changes({k: (v, _memory(after)[k]) for k, v in _memory(before).items()}),
        seconds=_changes({_named(k, before, after): (v, _seconds(after)[k]) for k, v in _seconds(before).items()}),
    )
    return diff if diff else PlanDiff(before.model, other=_other(before, after))


def _changes(values: dict[str, tuple[Any, Any]]) -> tuple[Changed, ...]:
    return tuple(Changed(name, before, after) for name, (before, after) in values.items() if before != after)


def _other(before: PlanData, after: PlanData) -> tuple[str, ...]:
    return tuple(f.name for f in fields(before) if f.compare and getattr(before, f.name) != getattr(after, f.name))


def _settings(plan: PlanData) -> dict[str, Any]:
    return {
        "mesh": str(plan.mesh),
        "hardware": plan.hardware,
        "objective": plan.objective,
        "sizes": ", ".join(f"{symbol}={n}" for symbol, n in plan.sizes),
        "graph": plan.fingerprint[:12],
        "parameters": count_text(sum(prod(p.shape) for p in plan.params)),
        "a device's memory": bytes_text(plan.device_memory_bytes),
    }


def _cuts(plan: PlanData) -> dict[str, str]:
    """Returns the first op of each stage but the first, by the border in front of it."""
    first: dict[int, OpPlan] = {}
    for op in plan.ops:
        first.setdefault(op.home, op)
    return {
        f"stage {stage - 1} | {stage}": f"{op.module} ({op.name})" if op.module else op.name
        for stage, op in sorted(first.items())
        if stage
    }


def _ops(before: PlanData, after: PlanData) -> tuple[list[RoleChange], int, int]:
    """Returns the changed roles, the number of other ops with changed placements, and that of ops on other stages."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    placements = moved = 0
    for name in dict.fromkeys([*(op.name for op in before.ops), *(op.name for op in after.ops)]):
        was = before.op(name) if before.has_op(name) else None
        now = after.op(name) if after.has_op(name) else None
        roles = (was.role if was else "", now.role if now else "")
        module = next(op.module or op.name for op in (was, now) if op)
        if roles[0] != roles[1]:
            groups.setdefault((name_pattern(module), *roles), []).append(module)
        elif was and now:
            placements += (was.inputs, was.outputs, was.gather) != (now.inputs, now.outputs, now.gather)
        else:
            placements += 1
        if was and now:
            moved += was.stages != now.stages
    changes = [RoleChange(place, tuple(modules), *roles) for (place, *roles), modules in groups.items()]
    return changes, placements, moved


def _communication(plan: PlanData) -> dict[str, tuple[int, int]]:
    """Returns (count, bytes) in one forward of each collective, and of sends."""
    found: dict[str, tuple[int, int]] = {}
    for stage in plan.stages:
        for name, count, nbytes in stage.collectives:
            n, b = found.get(name, (0, 0))
            found[name] = n + count, b + nbytes
    if plan.hops:
        found["send"] = len(plan.hops), sum(hop.nbytes for hop in plan.hops)
    return found


def _memory(plan: PlanData) -> dict[str, int]:
    fullest = max(plan.stages, key=lambda s: s.memory_bytes)
    return {
        "weights": fullest.weight_bytes,
        "KV cache": fullest.kv_cache_bytes,
        "activations": fullest.activation_bytes,
        "workspace": fullest.workspace_bytes,
        "in all": fullest.memory_bytes,
    }


def _seconds(plan: PlanData) -> dict[str, float]:
    return {
        "one forward": plan.predicted_seconds,
        "compute": sum(s.compute_seconds for s in plan.stages),
        "communication": sum(s.comm_seconds for s in plan.stages),
        "slowest stage": max(s.seconds for s in plan.stages),
        ONE_DEVICE: plan.one_device_seconds,
    }


def _named(what: str, before: PlanData, after: PlanData) -> str:
    """Returns the name of a figure; that of "one device" with its cores, where these change with the ranks of a CPU."""
    same = before.hardware != after.hardware or whole_device(before) == whole_device(after)
    if what != ONE_DEVICE or same:
        return what
    return f"{what} ({before.mesh.size} -> {after.mesh.size} cores)"


# --- as text ---------------------------------------------------------------------------------------------------------


def _sections(diff: PlanDiff) -> list[Section]:
    counts = {c.name: c for c in diff.counts}
    rows = [("collective", "times", "bytes", "after", "")]
    sizes = {c.name: c for c in diff.nbytes}
    for name in dict.fromkeys([*counts, *sizes]):
        times = f"{counts[name].before} -> {counts[name].after}" if name in counts else "the same"
        rows.append((name, times, *(_figures(sizes[name], bytes_text) if name in sizes else ("the same", "", ""))))
    sections = [
        _table("Made for", diff.settings, lambda value: str(value)),
        _table("Cuts, by what the stage behind begins with", diff.cuts, lambda value: value or "no such cut"),
        _role_section(diff),
        Section("Collectives and sends in one forward", tuple(rows) if len(rows) > 1 else (), left=(0,)),
        _figure_table("Memory of the fullest rank", diff.memory, bytes_text),
        _figure_table("Seconds", diff.seconds, seconds_text),
        Section("Also different", lines=(", ".join(diff.other),) if diff.other else ()),
    ]
    return [section for section in sections if section.rows or section.lines]


def _table(title: str, changes: tuple[Changed, ...], text: Any) -> Section:
    rows = [("", "before", "after"), *((c.name, text(c.before), text(c.after)) for c in changes)]
    return Section(title, tuple(rows) if changes else (), left=(0, 1, 2), flexible=2)


def _figure_table(title: str, changes: tuple[Changed, ...], text: Any) -> Section:
    rows = [("", "before", "after", ""), *((c.name, *_figures(c, text)) for c in changes)]
    return Section(title, tuple(rows) if changes else (), left=(0,))


def _figures(change: Changed, text: Any) -> tuple[str, str, str]:
    share = f"{change.after / change.before - 1:+.0%}" if change.before else ""
    return text(change.before), text(change.after), share


def _role_section(diff: PlanDiff) -> Section:
    rows = [("ops", "times", "before", "after")]
    places = [change.place for change in diff.roles]
    for change in diff.roles:
        is_alone = places.count(change.place) == 1
        label = change.place if is_alone and len(change.modules) > 1 else ", ".join(compress_names(change.modules))
        rows.append((label, f"x{len(change.modules)}", change.before or "-", change.after or "-"))
    lines = []
    if diff.placements:
        lines.append(f"{_count(diff.placements)} keep their role, but their tensors lie otherwise, or are new or gone")
    if diff.stages_moved:
        lines.append(f"{_count(diff.stages_moved)} are computed by other stages")
    return Section("Roles", tuple(rows) if diff.roles else (), tuple(lines), left=(0, 2, 3), flexible=0, indent="  ")


def _count(n: int) -> str:
    return f"{n} op{'s' if n > 1 else ''}"
