"""The weights of a plan: groups that are treated alike, shapes on each tp rank, and the share that is sharded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from cost_model.format import compress_names, name_pattern
from cost_model.graph.op_graph import DTYPE_BYTES
from cost_model.graph.placement import Layout
from cost_model.plan.data import Alternative, OpPlan, ParamPlan, PlanData

RANGES_SHOWN = 4  # ranges of layers named in one cell


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linears or embeddings that differ in their layer's number only: alike in role, weight shape and layout."""

    label: str  # "model.layers.*.mlp.up_proj"
    role: str
    modules: tuple[str, ...]
    weights: tuple[ParamPlan, ...]  # the weights that are known
    layout: int  # the weight's position in PlanData.layouts; -1 where each rank holds it whole
    local: str  # shape on each tp rank, "[384|192]x576"
    stages: tuple[int, ...]
    alternatives: tuple[Alternative, ...]  # those of the first op

    @property
    def shape(self) -> str:
        """Shape of a whole weight, "1536x576"; "-" where it is not known."""
        return "x".join(map(str, self.weights[0].shape)) if self.weights else "-"


def sharded_share(plan: PlanData) -> float:
    """Returns the share, 0.0 to 1.0, of the bytes of matmul weights that no rank holds whole; 1.0 for none at all."""
    total = sum(param_bytes(p) for p in plan.params if p.matmul)
    return sum(param_bytes(p) for p in plan.params if p.matmul and is_sharded(plan, p)) / total if total else 1.0


def whole_param_bytes(plan: PlanData) -> int:
    """Returns the bytes of all parameters, each counted once and whole."""
    return sum(param_bytes(p) for p in plan.params)


def linear_groups(plan: PlanData) -> list[LinearGroup]:
    """Groups all ops with a role, in the plan's order; layers that are treated alike share a group."""
    params = {p.name: p for p in plan.params}
    groups: dict[tuple[str, str, str, int, str], list[tuple[OpPlan, ParamPlan | None]]] = {}
    for op in plan.ops:
        if not op.role:
            continue
        weight = weight_of(op, params)
        shape = "x".join(map(str, weight.shape)) if weight else "-"
        layout = weight.layout if weight else (*op.input_layouts, -1, -1)[1]
        key = (name_pattern(op.module or op.name), op.role, shape, layout, local_shape(plan, op, weight))
        groups.setdefault(key, []).append((op, weight))
    rows_of = Counter(pattern for pattern, *_ in groups)
    linears = []
    for (pattern, role, _, layout, local), ops in groups.items():
        names = tuple(op.module or op.name for op, _ in ops)
        # Rows with one pattern could not be told apart: there, layers are named.
        ranges = compress_names(names)
        label = names[0] if len(names) == 1 else pattern
        if rows_of[pattern] > 1 and len(ranges) <= RANGES_SHOWN:
            label = ", ".join(ranges)
        stages = tuple(sorted({stage for op, _ in ops for stage in op.stages}))
        weights = tuple(weight for _, weight in ops if weight)
        linears.append(LinearGroup(label, role, names, weights, layout, local, stages, plan.alternatives(ops[0][0])))
    return linears


def weight_of(op: OpPlan, params: dict[str, ParamPlan]) -> ParamPlan | None:
    """Returns the op's weight: the one that the plan names, else its module's `weight`; None if there is neither."""
    if op.weight:
        return params.get(op.weight)
    return params.get(f"{op.module}.weight")


def local_shape(plan: PlanData, op: OpPlan, weight: ParamPlan | None) -> str:
    """Formats the weight's shape on each tp rank: "[320|256]x576", "288x576" where all are alike."""
    if weight is None:  # then the placement in which the op wants it: it is the second input in every role
        placement, index = (op.inputs[1], op.input_layouts[1]) if len(op.input_layouts) > 1 else (None, -1)
        if placement is None or index < 0:
            return "-"
        return f"{placement} {_lengths(plan.layouts[index])}"
    dims = [str(n) for n in weight.shape]
    if weight.placement.is_owned:
        return "whole, on one rank each"
    if weight.layout >= 0:
        dims[weight.placement.dim] = _lengths(plan.layouts[weight.layout])
    return "x".join(dims)


def _lengths(layout: Layout) -> str:
    """Formats local lengths by rank, runs of equal ones as "3*320"."""
    runs: list[list[int]] = []
    for length in (layout.local_size(r) for r in range(len(layout.parts))):
        if runs and runs[-1][1] == length:
            runs[-1][0] += 1
        else:
            runs.append([1, length])
    if len(runs) == 1:
        return str(runs[0][1])
    return "[" + "|".join(f"{n}*{length}" if n > 2 else "|".join([str(length)] * n) for n, length in runs) + "]"


def param_bytes(param: ParamPlan) -> int:
    """Returns the bytes of the whole parameter."""
    return prod(param.shape) * DTYPE_BYTES.get(param.dtype, 4)


def is_sharded(plan: PlanData, param: ParamPlan) -> bool:
    """True if no rank holds the whole parameter, or one rank alone does (an expert's)."""
    if param.placement.is_owned:
        return True
    return param.layout >= 0 and plan.layouts[param.layout].max_local_size < plan.layouts[param.layout].size
