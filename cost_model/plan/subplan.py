"""Derives a plan for a part of the graph that a plan was made for: the same decisions, about fewer ops."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from cost_model.graph.op_graph import SOURCES, Op, OpGraph, TensorRef
from cost_model.plan.data import Hop, OpPlan, PlanData

P = TypeVar("P", bound=PlanData)


def subplan(plan: P, graph: OpGraph, fingerprint: str) -> P:
    """Returns `plan` for `graph`, which has some ops of the plan's graph, under their names.

    Ops run on the stages where they are still wanted, and only wanted tensors are sent. An op may have fewer inputs
    than in the plan: the first of them. Predictions are left as they are.
    """
    wanted = _wanted(plan, graph)
    ops = tuple(_op(plan.op(op.name), op.kind, len(op.inputs), wanted[op.name]) for op in _computed(graph))
    params = []
    for param in plan.params:
        users = [user for user, _ in graph.users.get(TensorRef(param.name), ())]
        stages = tuple(sorted({stage for user in users for stage in wanted[user]}))
        if users:
            params.append(replace(param, stages=stages))
    by_name = {op.name: op for op in ops}
    hops = tuple(hop for hop in plan.hops if _is_wanted(hop, plan, graph, by_name))
    # the costs of other cuts are of the whole graph
    return replace(plan, fingerprint=fingerprint, ops=ops, params=tuple(params), hops=hops, cuts=())


def _computed(graph: OpGraph) -> list[Op]:
    return [op for op in graph if op.kind not in SOURCES]


def _op(op: OpPlan, kind: str, inputs: int, stages: set[int]) -> OpPlan:
    home = op.home if op.home in stages else min(stages)
    return replace(
        op, kind=kind, home=home, stages=tuple(sorted(stages)), inputs=op.inputs[:inputs],
        input_layouts=op.input_layouts[:inputs],
    )  # fmt: skip


def _wanted(plan: PlanData, graph: OpGraph) -> dict[str, set[int]]:
    """Returns, by op, the stages that have to compute it: for themselves or, at its home, for others."""
    outputs = {ref.op for ref in graph.outputs}
    wanted: dict[str, set[int]] = {}
    for op in reversed(_computed(graph)):
        planned = plan.op(op.name)
        stages = {planned.home} if op.mutates or op.name in outputs else set()
        for j in range(max(len(op.outputs), 1)):
            for user, _ in graph.users.get(TensorRef(op.name, j), ()):
                stages |= {k if k in planned.stages else planned.home for k in wanted.get(user, ())}
        wanted[op.name] = stages or {planned.home}  # no tensor, but a number: each stage that needs it computes it
    return wanted


def _is_wanted(hop: Hop, plan: PlanData, graph: OpGraph, ops: dict[str, OpPlan]) -> bool:
    """True if an op in the hop's target stage reads the tensor in the placement in which it is sent."""
    if hop.op not in ops or hop.target in ops[hop.op].stages:
        return False
    have = ops[hop.op].outputs[hop.index]
    forms = {h.whole for h in plan.hops if (h.op, h.index, h.target) == (hop.op, hop.index, hop.target)}
    for user, slot in graph.users.get(TensorRef(hop.op, hop.index), ()):
        if hop.target in ops[user].stages:
            placement = ops[user].inputs[slot]
            if len(forms) == 1 or (placement.is_replicate or placement != have) == hop.whole:
                return True
    return False
