"""The partition plan as JSON: exact both ways, strict on the way in.

    {"version": 1, "mesh": {"tp": 2, "pp": 1}, "model": "XForCausalLM", ..., "sizes": {"B": 1, "S": 128},
     "ops": [{"name": "linear", "kind": "linear", "home": 0, "inputs": ["R", "S(0)"], "outputs": ["S(2)"], ...}],
     "params": [{"name": "lm_head.weight", "shape": [32000, 768], "placement": "S(0)", "layout": 3, ...}],
     "layouts": [{"size": 9, "parts": [[[0, 5]], [[5, 9]]]}],
     "hops": [...], "stages": [...], "one_device_seconds": 0.39, "device_memory_bytes": 8589934592, "warnings": []}

Fields have the names of plan.py. To keep large plans small, some are left out where they say nothing:

    ops     stages          when the home stage alone computes it
            gather          when no output is gathered
            letter, role, module, weight                when empty
            input_layouts, output_layouts               when all are -1
    params  layout -1, stages of one: written out; there are few
    all     an empty list or text may not be left out elsewhere

A value that makes no sense raises PlanError with the path of the field: `ops[12].inputs[0]: not a placement: 'S(x)'`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from math import isfinite
from typing import Any, TypeVar

from cost_model.errors import PlanError
from cost_model.mesh import Mesh
from cost_model.placement import PLACEMENTS, Interval, Layout, Placement
from cost_model.plan import PLAN_VERSION, Hop, OpPlan, ParamPlan, PartitionPlan, StageSummary

T = TypeVar("T")
N = TypeVar("N", OpPlan, ParamPlan)
# Larger whole numbers than any real count or byte size; they would overflow where the plan is computed with.
INT_LIMIT = 2**63 - 1


# --- writing ---------------------------------------------------------------------------------------------------------


def plan_to_dict(plan: PartitionPlan) -> dict[str, Any]:
    """Plain dicts, lists, texts and numbers, for json.dumps. `plan_from_dict` gives back an equal plan."""
    return {
        "version": plan.version,
        "mesh": {"tp": plan.mesh.tp, "pp": plan.mesh.pp},
        "model": plan.model,
        "fingerprint": plan.fingerprint,
        "hardware": plan.hardware,
        "objective": plan.objective,
        "sizes": dict(plan.sizes),
        "ops": [_op_to_dict(op) for op in plan.ops],
        "params": [
            {
                "name": p.name, "shape": list(p.shape), "dtype": p.dtype, "placement": str(p.placement),
                "layout": p.layout, "stages": list(p.stages), "matmul": p.matmul,
            }
            for p in plan.params
        ],
        "layouts": [
            {"size": lay.size, "parts": [[list(interval) for interval in part] for part in lay.parts]}
            for lay in plan.layouts
        ],
        "hops": [
            {
                "op": h.op, "index": h.index, "source": h.source, "target": h.target, "channel": h.channel,
                "whole": h.whole, "nbytes": h.nbytes,
            }
            for h in plan.hops
        ],
        "stages": [
            {
                "index": s.index, "layers": list(s.layers), "compute_seconds": s.compute_seconds,
                "comm_seconds": s.comm_seconds, "recomputed": list(s.recomputed), "flops": s.flops,
                "weight_bytes": s.weight_bytes, "kv_cache_bytes": s.kv_cache_bytes,
                "activation_bytes": s.activation_bytes, "collectives": [list(c) for c in s.collectives],
            }
            for s in plan.stages
        ],
        "one_device_seconds": plan.one_device_seconds,
        "device_memory_bytes": plan.device_memory_bytes,
        "warnings": list(plan.warnings),
    }  # fmt: skip


def _op_to_dict(op: OpPlan) -> dict[str, Any]:
    data: dict[str, Any] = {"name": op.name, "kind": op.kind, "home": op.home}
    if op.stages != (op.home,):
        data["stages"] = list(op.stages)
    data["inputs"] = [str(p) for p in op.inputs]
    data["outputs"] = [str(p) for p in op.outputs]
    if op.gather != (False,) * len(op.outputs):
        data["gather"] = list(op.gather)
    for key, text in (("letter", op.letter), ("role", op.role), ("module", op.module), ("weight", op.weight)):
        if text:
            data[key] = text
    if op.input_layouts != (-1,) * len(op.inputs):
        data["input_layouts"] = list(op.input_layouts)
    if op.output_layouts != (-1,) * len(op.outputs):
        data["output_layouts"] = list(op.output_layouts)
    return data


def plan_to_text(plan: PartitionPlan) -> str:
    """The JSON text of a plan file: one line for each op, parameter, layout, hop and stage, so that files compare well.

    Raises PlanError when a number in the plan is infinite or not a number, which JSON cannot say.
    """

    def compact(value: Any) -> str:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)

    lines = []
    try:
        for key, value in plan_to_dict(plan).items():
            if isinstance(value, list) and value:
                body = ",\n".join("  " + compact(item) for item in value)
                lines.append(f' "{key}": [\n{body}\n ]')
            else:
                lines.append(f' "{key}": {compact(value)}')
    except ValueError as error:
        raise PlanError(f"the plan cannot be written: {error}") from error
    return "{\n" + ",\n".join(lines) + "\n}\n"


# --- reading ---------------------------------------------------------------------------------------------------------


def plan_from_text(text: str) -> PartitionPlan:
    """Inverse of `plan_to_text`, for any JSON layout. Raises PlanError for what is not a plan."""
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise PlanError("not a plan: nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise PlanError(f"not JSON: {error}") from error
    return plan_from_dict(data)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise PlanError(f"field {twice!r} is given twice in one object")
    return data


def plan_from_dict(data: Mapping[str, Any]) -> PartitionPlan:
    """The plan that `plan_to_dict` wrote. Raises PlanError naming the field that is missing, unknown or malformed."""
    if not isinstance(data, Mapping):
        raise PlanError(f"a plan is a JSON object, not {_type_name(data)}")
    top = _Fields(data, "")
    version = top.integer("version", low=-INT_LIMIT)
    if version != PLAN_VERSION:
        raise PlanError(
            f"version: this autodist_fx reads plans of version {PLAN_VERSION}, not {version}; make the plan again"
        )
    mesh_fields = top.object("mesh")
    mesh = Mesh(tp=mesh_fields.integer("tp", low=1), pp=mesh_fields.integer("pp", low=1))
    mesh_fields.done()
    sizes_fields = top.object("sizes")
    sizes = tuple((_text(key, "sizes"), sizes_fields.integer(key)) for key in sizes_fields.data)

    layouts = tuple(top.objects("layouts", lambda f: _layout(f, mesh)))
    ops: dict[str, OpPlan] = {}
    top.objects("ops", lambda f: _add(ops, _op(f, mesh, layouts), f))
    params: dict[str, ParamPlan] = {}
    top.objects("params", lambda f: _add(params, _param(f, mesh, layouts), f))
    hops = tuple(top.objects("hops", lambda f: _hop(f, mesh, ops)))
    stages = tuple(top.objects("stages", lambda f: _stage(f, ops)))
    if [stage.index for stage in stages] != list(range(mesh.pp)):
        raise PlanError(f"stages: a mesh of {mesh} needs stages 0 to {mesh.pp - 1}, each once and in order")
    plan = PartitionPlan(
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
        warnings=top.texts("warnings"),
        version=version,
    )
    top.done()
    return plan


def _op(f: _Fields, mesh: Mesh, layouts: tuple[Layout, ...]) -> OpPlan:
    home = f.integer("home", high=mesh.pp - 1)
    stages = f.stages("stages", mesh, default=(home,))
    if home not in stages:
        raise f.error("stages", f"the home stage {home} is not among them")
    inputs, outputs = f.placements("inputs"), f.placements("outputs")
    _check_owners(f, "inputs", inputs, mesh)
    _check_owners(f, "outputs", outputs, mesh)
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
        letter=f.text("letter", default=""),
        role=f.text("role", default=""),
        module=f.text("module", default=""),
        weight=f.text("weight", default=""),
        input_layouts=f.layout_indices("input_layouts", inputs, layouts),
        output_layouts=f.layout_indices("output_layouts", outputs, layouts),
    )
    f.done()
    return op


def _param(f: _Fields, mesh: Mesh, layouts: tuple[Layout, ...]) -> ParamPlan:
    shape = f.integers("shape")
    placement = f.placement("placement")
    layout = f.integer("layout", low=-1, high=len(layouts) - 1)
    if placement.is_partial:
        raise f.error("placement", "a parameter is R, S(<dim>), D(<dim>) or O(<rank>), never P")
    _check_owners(f, "placement", (placement,), mesh)
    _check_layout(f, "layout", placement, layout)
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


def _layout(f: _Fields, mesh: Mesh) -> Layout:
    size = f.integer("size")
    parts: list[tuple[Interval, ...]] = []
    for r, part in enumerate(f.items("parts")):
        path = f.path(f"parts[{r}]")
        intervals: list[Interval] = []
        for i, interval in enumerate(_list(part, path)):
            at = f"{path}[{i}]"
            ends = [_integer(x, f"{at}[{k}]", 0, size) for k, x in enumerate(_list(interval, at))]
            if len(ends) != 2 or ends[0] >= ends[1]:
                raise PlanError(f"{at}: not an interval [start, stop] with start < stop: {_show(interval)}")
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


def _hop(f: _Fields, mesh: Mesh, ops: Mapping[str, OpPlan]) -> Hop:
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
    if hop.source >= hop.target:
        raise f.error("target", f"a hop goes to a later stage, not from {hop.source} to {hop.target}")
    f.done()
    return hop


def _stage(f: _Fields, ops: Mapping[str, OpPlan]) -> StageSummary:
    recomputed = f.texts("recomputed")
    for i, name in enumerate(recomputed):
        if name not in ops:
            raise f.error(f"recomputed[{i}]", f"no op named {name!r}")
    collectives = []
    for i, item in enumerate(f.items("collectives")):
        path = f.path(f"collectives[{i}]")
        triple = _list(item, path)
        if len(triple) != 3:
            raise PlanError(f"{path}: not [name, count, bytes]: {_show(item)}")
        count, nbytes = (_integer(triple[k], f"{path}[{k}]", 0, INT_LIMIT) for k in (1, 2))
        collectives.append((_text(triple[0], f"{path}[0]"), count, nbytes))
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
        collectives=tuple(collectives),
    )
    f.done()
    return stage


def _add(found: dict[str, N], item: N, f: _Fields) -> None:
    if item.name in found:
        raise f.error("name", f"{item.name!r} is listed twice")
    found[item.name] = item


def _check_owners(f: _Fields, key: str, placements: tuple[Placement, ...], mesh: Mesh) -> None:
    for placement in placements:
        if placement.is_owned and placement.dim >= mesh.tp:
            raise f.error(key, f"{placement} names no tp rank of {mesh}")


def _check_layout(f: _Fields, key: str, placement: Placement, layout: int) -> None:
    if placement.is_shard and layout < 0:
        raise f.error(key, f"a tensor in {placement} needs a layout, not -1")
    if not placement.is_shard and layout >= 0:
        raise f.error(key, f"a tensor in {placement} has no layout; expected -1")


# --- one field -------------------------------------------------------------------------------------------------------


class _Fields:
    """One JSON object: typed access by key, an error for every key that nobody asked for.

    Every method raises PlanError with the field's path. A `default` makes the field optional.
    """

    __slots__ = ("_asked", "_path", "data")

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data = data
        self._path = path
        self._asked: set[str] = set()

    def path(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def error(self, key: str, message: str) -> PlanError:
        return PlanError(f"{self.path(key)}: {message}")

    def done(self) -> None:
        unknown = [key for key in self.data if key not in self._asked]
        if unknown:
            raise self.error(
                _show(unknown[0], quote=False), f"unknown field; known are {', '.join(sorted(self._asked))}"
            )

    def _get(self, key: str) -> Any:
        self._asked.add(key)
        if key not in self.data:
            raise self.error(key, "missing")
        return self.data[key]

    def _read(self, key: str, default: T | None, convert: Callable[[Any, str], T]) -> T:
        if default is not None and key not in self.data:
            self._asked.add(key)
            return default
        return convert(self._get(key), self.path(key))

    def integer(self, key: str, low: int = 0, high: int = INT_LIMIT) -> int:
        return _integer(self._get(key), self.path(key), low, high)

    def number(self, key: str) -> float:
        return _number(self._get(key), self.path(key))

    def text(self, key: str, default: str | None = None) -> str:
        return self._read(key, default, _text)

    def flag(self, key: str) -> bool:
        return _flag(self._get(key), self.path(key))

    def items(self, key: str) -> list[Any]:
        return _list(self._get(key), self.path(key))

    def object(self, key: str) -> _Fields:
        value = self._get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, f"expected an object, got {_type_name(value)}")
        return _Fields(value, self.path(key))

    def objects(self, key: str, convert: Callable[[_Fields], T]) -> list[T]:
        found = []
        for i, value in enumerate(self.items(key)):
            if not isinstance(value, Mapping):
                raise self.error(f"{key}[{i}]", f"expected an object, got {_type_name(value)}")
            found.append(convert(_Fields(value, f"{key}[{i}]")))
        return found

    def _each(self, key: str, default: tuple[T, ...] | None, convert: Callable[[Any, str], T]) -> tuple[T, ...]:
        return self._read(
            key,
            default,
            lambda value, path: tuple(convert(x, f"{path}[{i}]") for i, x in enumerate(_list(value, path))),
        )

    def texts(self, key: str) -> tuple[str, ...]:
        return self._each(key, None, _text)

    def integers(self, key: str, low: int = 0, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        return self._each(key, default, lambda x, path: _integer(x, path, low, INT_LIMIT))

    def flags(self, key: str, default: tuple[bool, ...]) -> tuple[bool, ...]:
        return self._each(key, default, _flag)

    def placement(self, key: str) -> Placement:
        return _placement(self._get(key), self.path(key))

    def placements(self, key: str) -> tuple[Placement, ...]:
        return self._each(key, None, _placement)

    def stages(self, key: str, mesh: Mesh, default: tuple[int, ...] | None = None) -> tuple[int, ...]:
        stages = self._each(key, default, lambda x, path: _integer(x, path, 0, mesh.pp - 1))
        if not stages or any(a >= b for a, b in pairwise(stages)):
            raise self.error(key, f"expected one or more stages in ascending order, got {list(stages)}")
        return stages

    def layout_indices(
        self, key: str, placements: tuple[Placement, ...], layouts: tuple[Layout, ...]
    ) -> tuple[int, ...]:
        low_high = (-1, len(layouts) - 1)
        indices = self._each(key, (-1,) * len(placements), lambda x, path: _integer(x, path, *low_high))
        sharded = any(placement.is_shard for placement in placements)
        if not sharded and not indices:  # OpPlan's default
            return indices
        if sharded and key not in self.data:
            raise self.error(key, "missing, and a tensor is sharded")
        if len(indices) != len(placements):
            raise self.error(key, f"{len(indices)} layouts for {len(placements)} tensors")
        for i, (placement, index) in enumerate(zip(placements, indices)):
            _check_layout(self, f"{key}[{i}]", placement, index)
        return indices


def _integer(value: Any, path: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{path}: expected a whole number, got {_show(value)}")
    if not low <= value <= high:
        bounds = f"{low} or more" if high == INT_LIMIT else f"{low} to {high}"
        raise PlanError(f"{path}: {_show(value)} is out of range ({bounds})")
    return value


def _number(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{path}: expected a number, got {_show(value)}")
    if not (abs(value) <= INT_LIMIT if isinstance(value, int) else isfinite(value)) or value < 0:
        raise PlanError(f"{path}: expected a finite number, 0 or more, got {_show(value)}")
    return float(value)


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{path}: expected a text, got {_type_name(value)}")
    if not value.isprintable():  # would break lines, or drive the terminal, where the plan is printed
        raise PlanError(f"{path}: has characters that cannot be printed: {_show(value)}")
    return value


def _flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{path}: expected true or false, got {_show(value)}")
    return value


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise PlanError(f"{path}: expected a list, got {_type_name(value)}")
    return list(value)


_PLACEMENTS: dict[str, Placement] = {}  # a plan names the same few ten thousands of times


def _placement(value: Any, path: str) -> Placement:
    if not isinstance(value, str):
        raise PlanError(f"{path}: not a placement: {_show(value)} (expected {PLACEMENTS})")
    found = _PLACEMENTS.get(value)
    if found is None:
        try:
            found = Placement.parse(value)
        except ValueError as error:
            raise PlanError(f"{path}: not a placement: {_show(value)} (expected {PLACEMENTS})") from error
        # S(01), digits of other scripts; torch has at most 64 dims
        if str(found) != value or (found.is_shard and found.dim > 63):
            raise PlanError(f"{path}: not a placement: {_show(value)} (expected {PLACEMENTS})")
        _PLACEMENTS[value] = found
    return found


def _type_name(value: Any) -> str:
    """The JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _show(value: Any, quote: bool = True) -> str:
    """A value for an error message: one short printable line, whatever it is."""
    if isinstance(value, dict | list) and len(value) > 4:
        return _type_name(value)
    try:
        text = ascii(value)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists in lists
        return _type_name(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    return text if quote else text.strip("'\"")
