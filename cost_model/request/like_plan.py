"""Plans a variant like another variant of the same model: all share weights and caches, which must lie on the ranks
alike in every plan."""

from __future__ import annotations

from collections.abc import Sequence

from cost_model.errors import PlanError
from cost_model.graph.op_graph import Op, OpGraph
from cost_model.graph.roles import ROLES, role_of
from cost_model.plan.data import PlanData


def roles_like(graph: OpGraph, like: PlanData) -> dict[str, str]:
    """Returns op name -> role for the ops of `graph` whose weight has a role in `like`, and one role only."""
    known: dict[tuple[str, str], set[str]] = {}
    for planned in like.ops:
        if planned.role and planned.weight:
            known.setdefault((planned.kind, planned.weight), set()).add(planned.role)
    found = {}
    for op in graph:
        if role_of(op, ""):
            roles = {role for weight in _weights(graph, op) for role in known.get((op.kind, weight), ())}
            if len(roles) == 1 and (role := roles.pop()) in (*ROLES[op.kind], "replicate"):
                found[op.name] = role
    return found


def cuts_like(graph: OpGraph, sequence: Sequence[str], like: PlanData) -> list[int]:
    """Returns the positions in `sequence` at which stages 1, 2, ... begin: each before the first op that reads a weight
    which its stage, or a later one, holds in `like`. Raises PlanError where the weights come in another order."""
    # weights that several stages hold (tied ones) tell nothing about where a stage begins
    home = {param.name: param.stages[0] for param in like.params if len(param.stages) == 1}
    stages = [max((home[w] for w in _weights(graph, graph[name]) if w in home), default=-1) for name in sequence]
    positions = [next((i for i, k in enumerate(stages) if k >= stage), 0) for stage in range(1, like.mesh.pp)]
    if sorted(set(positions)) != positions or 0 in positions:
        raise PlanError(f"{like.model}'s layers come in another order than in the plan to be followed: use pp=1")
    return positions


def _weights(graph: OpGraph, op: Op) -> list[str]:
    return [ref.op for ref in op.inputs if graph[ref.op].kind == "param"]
