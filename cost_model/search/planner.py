"""`plan` runs both searches for a request, and writes their result as a PartitionPlan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cost_model.costs.communication import send_seconds
from cost_model.errors import NoPlanFits
from cost_model.graph.op_graph import OpGraph, TensorRef
from cost_model.graph.placement import REPLICATE
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import PlanData
from cost_model.plan.missing_rules import refuse_missing_rules
from cost_model.request.pins import pin_text, to_blame
from cost_model.request.plan_request import PlanRequest
from cost_model.search.plan_search import Infeasible, PlanSearch, SharedSearches
from cost_model.search.plan_writer import PlanWriter
from cost_model.search.strategy import Strategy


def plan(
    graph: OpGraph,
    request: PlanRequest,
    *,
    model: str,
    fingerprint: str,
    shared: SharedSearches | None = None,
    explained: bool = True,
) -> PartitionPlan:
    """Chooses every op's placement and every cut. `shared` is filled with searches, for another plan of the same graph.
    Without `explained` the plan does not say what else could have been chosen, which takes half of the time.

    Raises MeshError (no such cut), NoPlanFits (an explicit memory limit cannot be met), PlanError (bad request: a pin
    or a cut that names nothing, is impossible, or contradicts another; strict, and ops without a sharding rule).
    """
    shared = {} if shared is None else shared
    try:
        search = PlanSearch(graph, request, shared)
        stages = search.choose()
    except (NoPlanFits, Infeasible) as error:
        blamed = to_blame(request.pin, lambda some: _fails(graph, replace(request, pin=tuple(some)), shared))
        if blamed:
            together = "the pin" if len(blamed) == 1 else "together the pins"
            raise type(error)(f"{together} {pin_text(blamed)} cannot be met: {error}") from error
        raise
    made = PlanWriter(search, explained=explained).write(model, fingerprint, stages)
    if request.strict:
        refuse_missing_rules(graph, made)
    return made


def forward_seconds(
    graph: OpGraph, plan: PartitionPlan, request: PlanRequest, sizes: Mapping[str, int], shared: SharedSearches
) -> float:
    """Predicts the seconds of one forward through all stages of a plan, at other sizes than its own.

    `plan` was made of `graph` for `request`; `sizes` maps size symbols to lengths.
    """
    return sum(stage_seconds(graph, plan, request, sizes, shared))


def stage_seconds(
    graph: OpGraph, plan: PlanData, request: PlanRequest, sizes: Mapping[str, int], shared: SharedSearches
) -> list[float]:
    """Predicts the seconds of each stage in that forward, with what it receives."""
    planned = PlanSearch(graph, replace(request, sizes=tuple(sizes.items())), shared)
    found = [planned.step_seconds(stage) for stage in range(plan.mesh.pp)]
    for op in plan.ops:
        s = Strategy(op.factor, op.inputs, op.outputs, op.gather)
        for stage in op.stages:
            search = planned.of_stage[stage]
            found[stage] += search.compute_seconds(graph[op.name], s) + search.gather_seconds(graph[op.name], s)
    for hop in plan.hops:
        placement = REPLICATE if hop.whole else plan.op(hop.op).outputs[hop.index]
        nbytes = planned.search.local(TensorRef(hop.op, hop.index), placement).nbytes
        found[hop.target] += send_seconds(nbytes, planned.hop_link(hop.source, hop.target))
    return found


def _fails(graph: OpGraph, request: PlanRequest, shared: SharedSearches) -> bool:
    """True if no plan meets the request."""
    try:
        PlanSearch(graph, request, shared).choose()
    except (NoPlanFits, Infeasible):
        return True
    return False
