"""Reads a plan from JSON: every field is checked by itself and against the others, and every error has its path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from cost_model.errors import PlanError
from cost_model.graph.placement import Interval, Layout
from cost_model.mesh import Mesh
from cost_model.plan.data import (
    HOP_CHANNELS,
    PLAN_VERSION,
    Alternative,
    CutOption,
    CutPlan,
    Device,
    Hop,
    OpPlan,
    ParamPlan,
    PlanData,
    Request,
    StageSummary,
)
from cost_model.plan.json_fields import (
    INT_LIMIT,
    Fields,
    check_layout,
    check_owners,
    integer_of,
    list_of,
    show,
    text_of,
    type_name,
)

P = TypeVar("P", bound=PlanData)
N = TypeVar("N", OpPlan, ParamPlan)
Choices = tuple[tuple[Alternative, ...], ...]


def plan_from_dict(data: Mapping[str, Any], cls: type[P]) -> P:
    """Returns the plan that `plan_to_dict` wrote, as a `cls`. Raises PlanError naming the field that is missing,
    unknown or malformed."""
    if not isinstance(data, Mapping):
        raise PlanError(f"a plan is a JSON object, not {type_name(data)}")
    top = Fields(data, "")
    version = top.integer("version", low=-INT_LIMIT)
    if version != PLAN_VERSION:
        way_out = "make the plan again" if version < PLAN_VERSION else "make it again, or use a newer autodist_fx"
        raise PlanError(f"version: this autodist_fx reads plans of version {PLAN_VERSION}, not {version}; {way_out}")
    mesh_fields = top.object("mesh")
    mesh = Mesh(tp=mesh_fields.integer("tp", low=1), pp=mesh_fields.integer("pp", low=1))
    mesh_fields.done()
    sizes_fields = top.object("sizes")
    sizes = tuple((text_of(key, "sizes"), sizes_fields.integer(key)) for key in sizes_fields.data)

    layouts = tuple(top.objects("layouts", lambda f: _layout(f, mesh)))
    choices = tuple(_choice(item, f"choices[{i}]") for i, item in enumerate(top.items("choices")))
    ops: dict[str, OpPlan] = {}
    top.objects("ops", lambda f: _add(ops, _op(f, mesh, layouts, choices), f))
    params: dict[str, ParamPlan] = {}
    top.objects("params", lambda f: _add(params, _param(f, mesh, layouts), f))
    hops = tuple(top.objects("hops", lambda f: _hop(f, mesh, ops)))
    stages = tuple(top.objects("stages", lambda f: _stage(f, ops)))
    if [stage.index for stage in stages] != list(range(mesh.pp)):
        raise PlanError(f"stages: a mesh of {mesh} needs stages 0 to {mesh.pp - 1}, each once and in order")
    cuts = tuple(top.objects("cuts", lambda f: _cut(f, ops)))
    if len(cuts) not in (0, mesh.pp - 1):
        raise PlanError(f"cuts: {len(cuts)} for {mesh.pp} stages; expected {mesh.pp - 1}, or none")
    plan = cls(
        mesh=mesh,
        model=top.text("model"),
        fingerprint=top.text("fingerprint"),
        hardware=top.text("hardware"),
        objective=top.text("objective"),
        sizes=sizes,
        ops=tuple(ops.values()),
        params=tuple(params.values()),
        layouts=layouts,
        hops=hops,
        stages=stages,
        one_device_seconds=top.number("one_device_seconds"),
        device_memory_bytes=top.integer("device_memory_bytes"),
        choices=choices,
        cuts=cuts,
        warnings=top.texts("warnings"),
        request=_request(top.object("request"), mesh),
        version=version,
    )
    top.done()
    return plan


def _request(f: Fields, mesh: Mesh) -> Request:
    """Reads the request, checking types and counts only; its content is checked when a plan is made from it."""
    roles = f.object("pins")
    pin = tuple((text_of(pattern, f.path("pins")), roles.text(pattern)) for pattern in roles.data)
    cuts = tuple(_place(x, f.path(f"cuts[{i}]")) for i, x in enumerate(f.items("cuts")))
    max_memory = f.integers("max_memory", low=1)
    devices = tuple(f.objects("device_map", _device))
    for name, given in (("max_memory", max_memory), ("device_map", devices)):
        if len(given) not in (0, mesh.pp):
            raise f.error(name, f"{len(given)} entries for {mesh.pp} stages; expected {mesh.pp}, or none")
    f.done()
    return Request(pin, cuts, max_memory, devices)


def _place(value: Any, path: str) -> int | str:
    if isinstance(value, int) and not isinstance(value, bool):
        return integer_of(value, path, 0, INT_LIMIT)
    return text_of(value, path)


def _device(f: Fields) -> Device:
    found = Device(f.text("hardware"), f.integer("memory", low=1))
    f.done()
    return found


def _op(f: Fields, mesh: Mesh, layouts: tuple[Layout, ...], choices: Choices) -> OpPlan:
    home = f.integer("home", high=mesh.pp - 1)
    stages = f.stages("stages", mesh, default=(home,))
    if home not in stages:
        raise f.error("stages", f"the home stage {home} is not among them")
    inputs, outputs = f.placements("inputs"), f.placements("outputs")
    check_owners(f, "inputs", inputs, mesh)
    check_owners(f, "outputs", outputs, mesh)
    gather = f.flags("gather", default=(False,) * len(outputs))
    if len(gather) != len(outputs):
        raise f.error("gather", f"{len(gather)} flags for {len(outputs)} outputs")
    for j, flag in enumerate(gather):
        if flag and outputs[j].is_replicate:
            raise f.error(f"gather[{j}]", "the output is R, whole on every rank as it is")
        if flag and outputs[j].is_owned:
            raise f.error(f"gather[{j}]", f"the output is {outputs[j]}: no collective makes it whole on every rank")
    op = OpPlan(
        name=f.text("name"),
        kind=f.text("kind"),
        home=home,
        stages=stages,
        inputs=inputs,
        outputs=outputs,
        gather=gather,
        factor=f.text("factor", default=""),
        role=f.text("role", default=""),
        module=f.text("module", default=""),
        weight=f.text("weight", default=""),
        input_layouts=f.layout_indices("input_layouts", inputs, layouts),
        output_layouts=f.layout_indices("output_layouts", outputs, layouts),
        compute_seconds=f.number("compute_seconds", default=0.0),
        comm_seconds=f.number("comm_seconds", default=0.0),
        comm_bytes=f.integer("comm_bytes", default=0),
        choice=f.integer("choice", low=-1, high=len(choices) - 1, default=-1),
    )
    if op.choice >= 0 and not any(a.role == op.role and not a.impossible for a in choices[op.choice]):
        raise f.error("choice", f"choices[{op.choice}] has no role {show(op.role)} that is possible")
    f.done()
    return op


def _choice(value: Any, path: str) -> tuple[Alternative, ...]:
    """Reads the roles that an op could have, each once."""
    found: dict[str, Alternative] = {}
    for i, item in enumerate(list_of(value, path)):
        if not isinstance(item, Mapping):
            raise PlanError(f"{path}[{i}]: expected an object, got {type_name(item)}")
        f = Fields(item, f"{path}[{i}]")
        alternative = Alternative(
            role=f.text("role"),
            seconds=f.number("seconds", signed=True, default=0.0),
            weight_bytes=f.integer("weight_bytes", low=-INT_LIMIT, default=0),
            impossible=f.text("impossible", default=""),
        )
        f.done()
        if alternative.impossible and (alternative.seconds or alternative.weight_bytes):
            raise f.error("impossible", "what is not possible has no costs")
        if alternative.role in found:
            raise f.error("role", f"{show(alternative.role)} is listed twice")
        found[alternative.role] = alternative
    return tuple(found.values())


def _cut(f: Fields, ops: Mapping[str, OpPlan]) -> CutPlan:
    options = tuple(f.objects("options", lambda option: _cut_option(option, ops)))
    cut = CutPlan(options, f.integer("chosen", high=len(options) - 1))
    f.done()
    return cut


def _cut_option(f: Fields, ops: Mapping[str, OpPlan]) -> CutOption:
    option = CutOption(
        op=f.text("op"),
        module=f.text("module"),
        before_seconds=f.number("before_seconds"),
        after_seconds=f.number("after_seconds"),
        nbytes=f.integer("nbytes"),
    )
    if option.op not in ops:
        raise f.error("op", f"no op named {show(option.op)}")
    f.done()
    return option


def _param(f: Fields, mesh: Mesh, layouts: tuple[Layout, ...]) -> ParamPlan:
    shape = f.integers("shape")
    placement = f.placement("placement")
    layout = f.integer("layout", low=-1, high=len(layouts) - 1)
    if placement.is_partial:
        raise f.error("placement", "a parameter is R, S(<dim>), D(<dim>) or O(<rank>), never P")
    check_owners(f, "placement", (placement,), mesh)
    check_layout(f, "layout", placement, layout)
    if placement.is_shard:
        if placement.dim >= len(shape):
            raise f.error("placement", f"{placement} of a tensor with {len(shape)} dims")
        if layouts[layout].size != shape[placement.dim]:
            size = shape[placement.dim]
            raise f.error("layout", f"layout {layout} is of {layouts[layout].size} elements, the dim has {size}")
    param = ParamPlan(
        name=f.text("name"),
        shape=shape,
        dtype=f.text("dtype"),
        placement=placement,
        layout=layout,
        stages=f.stages("stages", mesh),
        matmul=f.flag("matmul"),
    )
    f.done()
    return param


def _layout(f: Fields, mesh: Mesh) -> Layout:
    """Reads a layout: for each tp rank intervals in ascending order, which together cover the dim."""
    size = f.integer("size")
    parts: list[tuple[Interval, ...]] = []
    for r, part in enumerate(f.items("parts")):
        path = f.path(f"parts[{r}]")
        intervals: list[Interval] = []
        for i, interval in enumerate(list_of(part, path)):
            at = f"{path}[{i}]"
            ends = [integer_of(x, f"{at}[{k}]", 0, size) for k, x in enumerate(list_of(interval, at))]
            if len(ends) != 2 or ends[0] >= ends[1]:
                raise PlanError(f"{at}: not an interval [start, stop] with start < stop: {show(interval)}")
            if intervals and ends[0] < intervals[-1][1]:
                raise PlanError(f"{at}: starts before the interval in front of it stops")
            intervals.append((ends[0], ends[1]))
        parts.append(tuple(intervals))
    if len(parts) != mesh.tp:
        raise f.error("parts", f"{len(parts)} parts for {mesh.tp} tp ranks")
    covered = 0
    for start, stop in sorted(interval for part in parts for interval in part):
        if start > covered:
            break
        covered = max(covered, stop)
    if covered < size:
        raise f.error("parts", f"no rank holds element {covered} of {size}")
    f.done()
    return Layout(size, tuple(parts))


def _hop(f: Fields, mesh: Mesh, ops: Mapping[str, OpPlan]) -> Hop:
    name = f.text("op")
    if name not in ops:
        raise f.error("op", f"no op named {name!r}")
    hop = Hop(
        op=name,
        index=f.integer("index", high=len(ops[name].outputs) - 1),
        source=f.integer("source", high=mesh.pp - 1),
        target=f.integer("target", high=mesh.pp - 1),
        channel=f.integer("channel"),
        whole=f.flag("whole"),
        nbytes=f.integer("nbytes"),
    )
    if hop.channel >= HOP_CHANNELS:
        raise f.error("channel", f"{hop.channel} is reserved for the runtime; a hop's is below {HOP_CHANNELS}")
    if hop.source >= hop.target:
        raise f.error("target", f"a hop goes to a later stage, not from {hop.source} to {hop.target}")
    f.done()
    return hop


def _stage(f: Fields, ops: Mapping[str, OpPlan]) -> StageSummary:
    recomputed = f.texts("recomputed")
    for i, name in enumerate(recomputed):
        if name not in ops:
            raise f.error(f"recomputed[{i}]", f"no op named {name!r}")
    collectives = []
    for i, item in enumerate(f.items("collectives")):
        path = f.path(f"collectives[{i}]")
        triple = list_of(item, path)
        if len(triple) != 3:
            raise PlanError(f"{path}: not [name, count, bytes]: {show(item)}")
        count, nbytes = (integer_of(triple[k], f"{path}[{k}]", 0, INT_LIMIT) for k in (1, 2))
        collectives.append((text_of(triple[0], f"{path}[0]"), count, nbytes))
    stage = StageSummary(
        index=f.integer("index"),
        layers=f.texts("layers"),
        compute_seconds=f.number("compute_seconds"),
        comm_seconds=f.number("comm_seconds"),
        recomputed=recomputed,
        flops=f.number("flops"),
        weight_bytes=f.integer("weight_bytes"),
        kv_cache_bytes=f.integer("kv_cache_bytes"),
        activation_bytes=f.integer("activation_bytes"),
        workspace_bytes=f.integer("workspace_bytes"),
        collectives=tuple(collectives),
    )
    f.done()
    return stage


def _add(found: dict[str, N], item: N, f: Fields) -> None:
    if item.name in found:
        raise f.error("name", f"{item.name!r} is listed twice")
    found[item.name] = item


def plan_from_text(text: str, cls: type[P]) -> P:
    """Reads a plan file's text, however it is laid out, as a `cls`. Raises PlanError for what is not a plan."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise PlanError("not a plan: nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise PlanError(f"not JSON: {error}") from error
    return plan_from_dict(data, cls)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise PlanError(f"field {twice!r} is given twice in one object")
    return data

