"""Checks parameters: each element on the ranks that the plan gives it to, in the right shape, ties kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cost_model.graph.op_graph import OpGraph
from cost_model.graph.placement import Interval
from cost_model.plan.data import ParamPlan, PlanData
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram
from passes.verify.core.report import Duty, fail_plainly, on_rank

Parts = tuple[tuple[Interval, ...], ...]


def check_weights(programs: Sequence[RankProgram], plan: PlanData, graph: OpGraph) -> None:
    """Checks the parameters of all programs. Raises VerificationError. Which slice an op needs is rank.py's to
    prove."""
    params = {p.name: p for p in plan.params}
    lost = [op.name for op in graph if op.kind == "param" and op.name not in params]
    if lost:
        fail_plainly(f"parameter {lost[0]} is missing in the plan", Duty.PLAN)
    for program in programs:
        _check_tensors(program)
        _check_shards(program, params)
        _check_ties(program)
    layouts = _planned_layouts(plan, graph)
    row_biases = _row_biases(plan, graph)
    for stage in range(plan.mesh.pp):
        group = [programs[r] for r in plan.mesh.tp_group(stage)]
        held = {s.source for p in group for s in p.param_shards.values()}
        for param in plan.params:
            if stage in param.stages and param.name not in held:
                fail_plainly(f"no rank of stage {stage} holds {param.name}, which the stage uses", Duty.WEIGHTS)
            if stage not in param.stages and param.name in held:
                fail_plainly(f"stage {stage} holds {param.name}, which none of its ops uses", Duty.WEIGHTS)
        for path in dict.fromkeys(path for p in group for path in p.param_shards):
            _check_dealt(group, path, params, layouts, row_biases)


# -- one rank ----------------------------------------------------------------------------------------------------------


def _check_tensors(program: RankProgram) -> None:
    """Checks that every parameter says where it comes from, and has the shape of its share."""
    module = program.graph_module
    parameters = dict(module.named_parameters(remove_duplicate=False))
    tensors = {**parameters, **dict(module.named_buffers(remove_duplicate=False))}
    for name, tensor in tensors.items():
        shard = program.param_shards.get(name)
        if shard is None:
            if name in parameters:
                fail_plainly(
                    f"{on_rank(program)}: nothing says what {name} is loaded from (no ParamShard)",
                    Duty.WEIGHTS,
                )
            continue
        if tuple(tensor.shape) != shard.local_shape:
            fail_plainly(
                f"{on_rank(program)}: {name} is {list(tensor.shape)}, and its share of {shard.source} "
                f"{list(shard.shape)} is {list(shard.local_shape)}",
                Duty.WEIGHTS,
            )
        if tensor.is_meta and str(tensor.dtype) != f"torch.{shard.dtype}":
            fail_plainly(
                f"{on_rank(program)}: {name} is {tensor.dtype}, and its ParamShard says {shard.dtype}",
                Duty.WEIGHTS,
            )
    for name in program.param_shards:
        if name not in tensors:
            fail_plainly(f"{on_rank(program)}: a ParamShard names {name}, which the module has not", Duty.WEIGHTS)


def _check_shards(program: RankProgram, params: Mapping[str, ParamPlan]) -> None:
    for name, shard in program.param_shards.items():
        if shard.name != name:
            fail_plainly(f"{on_rank(program)}: the ParamShard of {name} is of {shard.name}", Duty.WEIGHTS)
        param = params.get(shard.source)
        if param is not None and (param.shape, param.dtype) != (shard.shape, shard.dtype):
            fail_plainly(
                f"{on_rank(program)}: {name} is a share of {shard.source} {shard.dtype}{list(shard.shape)}, which is "
                f"{param.dtype}{list(param.shape)} in the plan",
                Duty.WEIGHTS,
            )
        if shard.dim is None:
            continue
        if not 0 <= shard.dim < len(shard.shape):
            fail_plainly(
                f"{on_rank(program)}: {name} is cut along dim {shard.dim} of {list(shard.shape)}",
                Duty.WEIGHTS,
            )
        end = 0
        for start, stop in shard.intervals:
            if not end <= start <= stop <= shard.shape[shard.dim]:
                fail_plainly(
                    f"{on_rank(program)}: {name} holds {list(shard.intervals)} along dim {shard.dim} of {shard.source} "
                    f"{list(shard.shape)}: not ascending pieces of it",
                    Duty.WEIGHTS,
                )
            end = stop


def _check_ties(program: RankProgram) -> None:
    """Checks that one slice of one source is one Parameter."""
    parameters = dict(program.graph_module.named_parameters(remove_duplicate=False))
    first: dict[tuple[object, ...], str] = {}
    for name, shard in program.param_shards.items():
        if name not in parameters:
            continue
        other = first.setdefault((shard.source, shard.dim, shard.intervals), name)
        if parameters[other] is not parameters[name]:
            fail_plainly(
                f"{on_rank(program)}: {other} and {name} are both the same piece of {shard.source}, and not one "
                f"tensor: a tied weight would be held, and trained, twice",
                Duty.WEIGHTS,
            )


# -- a tp group --------------------------------------------------------------------------------------------------------


def _planned_layouts(plan: PlanData, graph: OpGraph) -> dict[str, set[tuple[int, Parts]]]:
    """Returns, for each parameter, the (dim, parts) in which the plan lays it, or an op takes it."""
    found: dict[str, set[tuple[int, Parts]]] = {}

    def note(name: str, dim: int, index: int) -> None:
        layout = plan.layout(index)
        if layout is not None:
            found.setdefault(name, set()).add((dim, layout.parts))

    for param in plan.params:
        note(param.name, param.placement.dim, param.layout)
    for op in plan.ops:
        for ref, placement, index in zip(graph[op.name].inputs, op.inputs, op.input_layouts, strict=True):
            if index >= 0 and graph[ref.op].kind == "param":
                note(ref.op, placement.dim, index)
    return found


def _row_biases(plan: PlanData, graph: OpGraph) -> set[str]:
    return {graph[op.name].inputs[op.lone_bias].op for op in plan.ops if op.lone_bias is not None}


def _check_dealt(
    group: Sequence[RankProgram],
    path: str,
    params: Mapping[str, ParamPlan],
    layouts: Mapping[str, set[tuple[int, Parts]]],
    row_biases: set[str],
) -> None:
    """Checks that what the ranks hold at one path is, together, the parameter."""
    shards: dict[int, ParamShard] = {p.rank: p.param_shards[path] for p in group if path in p.param_shards}
    first = next(iter(shards.values()))
    source, stage = first.source, group[0].stage
    without = [p.rank for p in group if p.rank not in shards]
    if len({s.source for s in shards.values()}) > 1:
        fail_plainly(f"{path} is another parameter on each rank of stage {stage}: {_sources(shards)}", Duty.WEIGHTS)
    if len({s.dim for s in shards.values()}) > 1:
        fail_plainly(
            f"{path} is cut along different dims on the ranks of stage {stage}: {_slices(shards)}",
            Duty.WEIGHTS,
        )
    placement = params[source].placement if source in params else None
    if placement is not None and placement.is_owned:
        if list(shards) != [group[placement.dim].rank] or first.dim is not None:
            fail_plainly(
                f"{source} ({path}) belongs whole to tp rank {placement.dim} of stage {stage} alone: {_slices(shards)}",
                Duty.NODES,
            )
        return
    if first.dim is None:
        # one rank alone may hold a bias that a sum over ranks adds (groups.py: exactly one adds it)
        if without and not (source in row_biases and len(shards) == 1):
            fail_plainly(f"{source} ({path}) is whole on ranks {sorted(shards)} and missing on {without}", Duty.WEIGHTS)
        return
    if without:
        fail_plainly(
            f"{source} ({path}) is dealt out on stage {stage}, and ranks {without} have no share",
            Duty.WEIGHTS,
        )
    parts = tuple(shards[p.rank].intervals for p in group)
    owners = np.zeros(first.shape[first.dim], dtype=np.int64)
    for part in parts:
        for start, stop in part:
            owners[start:stop] += 1
    gap = np.flatnonzero(owners == 0)
    if len(gap):
        fail_plainly(
            f"{source} {list(first.shape)}: element {gap[0]} of dim {first.dim} is on no rank of stage {stage} "
            f"({len(gap)} are missing): {_slices(shards)}",
            Duty.WEIGHTS,
        )
    planned = (first.dim, parts) in layouts.get(source, ())
    twice = np.flatnonzero(owners > 1)
    if len(twice) and not planned:
        fail_plainly(
            f"{source} {list(first.shape)}: element {twice[0]} of dim {first.dim} is on {owners[twice[0]]} ranks of "
            f"stage {stage}, which the plan does not say: {_slices(shards)}",
            Duty.WEIGHTS,
        )
    if not planned:
        fail_plainly(f"{source} is not dealt as the plan says: {_slices(shards)}", Duty.WEIGHTS)


def _slices(shards: Mapping[int, ParamShard]) -> str:
    return ", ".join(f"rank {r} has {list(s.intervals)} of dim {s.dim}" for r, s in shards.items())


def _sources(shards: Mapping[int, ParamShard]) -> str:
    return ", ".join(f"{s.source} on rank {r}" for r, s in shards.items())
