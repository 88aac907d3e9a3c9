"""Checks that a graph can run a plan that was read from a file: plans edited by hand may contradict themselves."""

from __future__ import annotations

from cost_model.costs.hardware import GENERIC
from cost_model.errors import PlanError
from cost_model.graph.op_graph import SOURCES, Op, OpGraph, TensorRef
from cost_model.graph.placement import REPLICATE, Placement
from cost_model.graph.roles import role_of
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import HOP_CHANNELS, OpPlan
from cost_model.search.strategy import Strategy
from cost_model.search.tensor_parallel import TensorParallelSearch

_WAY_OUT = "undo the edit, or edit `request` in the plan and make it anew with `autodist-fx plan --from`"


def check_plan(plan: PartitionPlan, graph: OpGraph) -> None:
    """Checks a plan against its graph. Raises PlanError naming the op or parameter and the contradiction, unless

    - the plan's ops and parameters are those of `graph`, each in a way that its op's rule allows, with the layouts that
      the graph's ties between dims give;
    - every op reads tensors in the placements that it wants, or whole; outputs of the model are whole;
    - stages follow each other in execution order, and what a stage reads is computed there or sent there, once; ops
      that read or write one buffer which is written are on one stage;
    - every parameter is on the stages that read it, in the placement that its readers want, or whole.
    """
    _Checked(plan, graph).check()


class _Checked:
    """A plan and the graph that it is checked against."""

    def __init__(self, plan: PartitionPlan, graph: OpGraph) -> None:
        self.plan = plan
        self.graph = graph
        self.search = TensorParallelSearch(graph, plan.mesh.tp, GENERIC, {})  # for domains, not for costs
        self.params = {p.name: p for p in plan.params}
        self.sent = {(h.op, h.index, h.target, h.whole) for h in plan.hops}

    def check(self) -> None:
        """Raises PlanError for the first contradiction (see `check_plan`)."""
        computed = [op for op in self.graph if op.kind not in SOURCES]
        _same_names("op", [op.name for op in computed], [op.name for op in self.plan.ops])
        params = [op.name for op in self.graph if op.kind == "param"]
        _same_names("parameter", params, list(self.params))
        if [op.name for op in self.plan.ops] != [op.name for op in computed]:
            raise PlanError(f"the plan's ops do not stand in execution order: {_WAY_OUT}")
        self._stages()
        for op in computed:
            planned = self.plan.op(op.name)
            self._strategy(op, planned)
            self._layouts(op.name, op.inputs, planned.inputs, planned.input_layouts)
            outputs = tuple(TensorRef(op.name, j) for j in range(len(op.outputs)))
            self._layouts(op.name, outputs, planned.outputs, planned.output_layouts)
            for ref, wanted in zip(op.inputs, planned.inputs, strict=True):
                self._reads(op, planned, ref, wanted)
        for ref in self.graph.outputs:
            self._is_whole_at_the_end(ref)
        for op in self.graph:
            if op.kind == "param":
                self._param(op)
        self._hops()

    # -- one op ------------------------------------------------------------------------------------------------------

    def _strategy(self, op: Op, planned: OpPlan) -> None:
        as_planned = (planned.factor, planned.inputs, planned.outputs, planned.gather)
        domain = self.search.domain(op)
        if not any((s.factor, s.inputs, s.outputs, s.gather) == as_planned for s in domain):
            own = Strategy(*as_planned)
            raise PlanError(
                f"op {op.name} ({op.kind}) cannot run as {_said(own)}; it can as "
                f"{' or '.join(dict.fromkeys(_said(s) for s in domain))}: {_WAY_OUT}"
            )
        if planned.kind != op.kind or planned.module != op.module:
            raise PlanError(f"op {op.name} is {op.kind} in {op.module!r}, not {planned.kind} in {planned.module!r}")
        role = role_of(op, planned.factor)
        if planned.role != role:
            raise PlanError(
                f"op {op.name} has role {planned.role!r}, and its placements are those of {role!r}: to change a role, "
                "pin it in `request` and make the plan anew with `autodist-fx plan --from`"
            )
        if op.mutates and len(planned.stages) > 1:
            raise PlanError(f"op {op.name} has side effects, and stages {list(planned.stages)} all run it: {_WAY_OUT}")

    def _layouts(
        self, name: str, refs: tuple[TensorRef, ...], placements: tuple[Placement, ...], layouts: tuple[int, ...]
    ) -> None:
        for k, (ref, placement) in enumerate(zip(refs, placements, strict=True)):
            if not placement.is_shard:
                continue
            if self.plan.layout(layouts[k]) != self.search.layout(ref, placement):
                raise PlanError(
                    f"{name}: the layout of {ref.op} along dim {placement.dim} is not the one that its ties to other "
                    f"tensors give (heads stay whole): {_WAY_OUT}"
                )

    def _reads(self, op: Op, planned: OpPlan, ref: TensorRef, wanted: Placement) -> None:
        have, gathered = self._have(ref)
        if have != wanted and not (have.is_replicate or gathered):
            raise PlanError(
                f"op {op.name} wants {ref.op} {_lies(wanted)}, and it lies {_lies(have)} and is not gathered: "
                f"{_WAY_OUT}"
            )
        source = self.graph[ref.op]
        if source.kind in SOURCES:
            return
        needs_whole = wanted.is_replicate or wanted != have
        for stage in planned.stages:
            received = (ref.op, ref.index, stage, needs_whole) in self.sent or (
                not needs_whole and not have.is_partial and (ref.op, ref.index, stage, True) in self.sent
            )
            if stage not in self.plan.op(ref.op).stages and not received:
                raise PlanError(
                    f"op {op.name} reads {ref.op} in stage {stage}, where it is neither computed nor received"
                    f"{' whole' if needs_whole and not have.is_replicate else ''}: {_WAY_OUT}"
                )

    def _have(self, ref: TensorRef) -> tuple[Placement, bool]:
        """Returns the placement in which a tensor is made, and whether it is also gathered."""
        source = self.graph[ref.op]
        if source.kind == "param":
            return self.params[ref.op].placement, False
        if source.kind in SOURCES:
            return REPLICATE, False
        planned = self.plan.op(ref.op)
        return planned.outputs[ref.index], planned.gather[ref.index]

    def _is_whole_at_the_end(self, ref: TensorRef) -> None:
        have, gathered = self._have(ref)
        if not (have.is_replicate or gathered):
            raise PlanError(f"{ref.op} leaves the model, and lies {_lies(have)}: it must be gathered; {_WAY_OUT}")

    def _param(self, op: Op) -> None:
        planned, spec = self.params[op.name], op.outputs[0]
        if (planned.shape, planned.dtype) != (spec.shape, spec.dtype):
            raise PlanError(f"parameter {op.name} is {spec.dtype}{list(spec.shape)}, not as the plan says: {_WAY_OUT}")
        if not any(s.outputs[0] == planned.placement for s in self.search.domain(op)):
            raise PlanError(f"parameter {op.name} cannot lie {_lies(planned.placement)}: {_WAY_OUT}")
        self._layouts(op.name, (TensorRef(op.name),), (planned.placement,), (planned.layout,))
        users = {user for user, _ in self.graph.users.get(TensorRef(op.name), ())}
        wanted = tuple(sorted({k for user in users for k in self.plan.op(user).stages}))
        if planned.stages != wanted:
            raise PlanError(
                f"parameter {op.name} is on stages {list(planned.stages)}, and is read on {list(wanted)}: {_WAY_OUT}"
            )

    # -- stages and what crosses between them --------------------------------------------------------------------------

    def _stages(self) -> None:
        last = 0
        for op in self.plan.ops:
            if op.home < last:
                raise PlanError(
                    f"op {op.name} is in stage {op.home}, after ops of stage {last} in execution order: stages must "
                    f"follow each other; {_WAY_OUT}"
                )
            if op.stages[0] < op.home:
                raise PlanError(f"op {op.name} of stage {op.home} is computed in stage {op.stages[0]}: {_WAY_OUT}")
            last = op.home
        for buffer, users in self.graph.state.items():
            stages = {stage for user in users for stage in self.plan.op(user).stages}
            if len(stages) > 1:
                raise PlanError(f"stages {sorted(stages)} all read or write {buffer}, which one keeps: {_WAY_OUT}")
        empty = sorted(set(range(self.plan.mesh.pp)) - {op.home for op in self.plan.ops})
        if empty:
            raise PlanError(f"stage {empty[0]} has no op: {_WAY_OUT}")

    def _hops(self) -> None:
        seen: set[tuple[object, ...]] = set()
        channels: set[int] = set()
        for hop in self.plan.hops:
            subject = f"{hop.op}, sent from stage {hop.source} to {hop.target}"
            if self.graph[hop.op].kind in SOURCES or hop.index >= len(self.graph[hop.op].outputs):
                raise PlanError(f"{subject}: there is no such tensor to send; {_WAY_OUT}")
            planned = self.plan.op(hop.op)
            key = (hop.op, hop.index, hop.target, hop.whole)
            if hop.source != planned.home or hop.target <= hop.source or hop.target in planned.stages:
                raise PlanError(f"{subject}: stage {planned.home} has it, and stages {list(planned.stages)} compute it")
            if key in seen or hop.channel in channels:
                raise PlanError(f"{subject}: it, or its channel {hop.channel}, is there twice; {_WAY_OUT}")
            if not 0 <= hop.channel < HOP_CHANNELS:
                raise PlanError(f"{subject}: channel {hop.channel} is reserved for the runtime; {_WAY_OUT}")
            if hop.whole and not (planned.outputs[hop.index].is_replicate or planned.gather[hop.index]):
                raise PlanError(f"{subject} whole: it is not gathered there; {_WAY_OUT}")
            users = [user for user, _ in self.graph.users.get(TensorRef(hop.op, hop.index), ())]
            if not any(hop.target in self.plan.op(user).stages for user in users):
                raise PlanError(f"{subject}: nothing reads it there; {_WAY_OUT}")
            seen.add(key)
            channels.add(hop.channel)


def _same_names(what: str, expected: list[str], found: list[str]) -> None:
    known, there = set(expected), set(found)
    missing = [name for name in expected if name not in there]
    extra = [name for name in found if name not in known]
    if missing or extra:
        name, problem = (missing[0], "is missing") if missing else (extra[0], "is not in the model's graph")
        raise PlanError(f"{what} {name} {problem}: {_WAY_OUT}")


def _said(s: Strategy) -> str:
    """Formats a strategy for an error: "column [R, S(0) -> S(2) gathered]"."""
    gathered = " gathered" if any(s.gather) else ""
    ins, outs = ", ".join(map(str, s.inputs)), ", ".join(map(str, s.outputs))
    return f"{s.factor or 'whole'} [{ins} -> {outs}{gathered}]"


def _lies(placement: Placement) -> str:
    """Formats a placement for an error."""
    if placement.is_shard:
        return f"cut along dim {placement.dim}"
    return "whole" if placement.is_replicate else "as a sum still owed"
