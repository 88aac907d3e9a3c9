"""Finds ops without a sharding rule, and what they cost a plan: every tp rank computes them whole, on whole inputs.

Only ops that a rule could change are counted: those that depend on weights. Not counted are kinds that are whole on
purpose (`cost_model.rules.replicated`), routers (`cost_model.layouts.routing`), and ops that follow from the inputs
alone (masks, positions, shape arithmetic), which are whole on every rank whether they have a rule or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.errors import PlanError
from cost_model.format import bytes_text, compress_names, ops_text, seconds_text
from cost_model.graph.op_graph import SOURCES, Op, OpGraph, TensorRef
from cost_model.layouts.routing import deciding_ops
from cost_model.plan.data import OpPlan, PlanData
from cost_model.rules.replicated import FILLS
from cost_model.rules.table import has_rule, plain_kind

WAY_OUT = "add a row to cost_model/rules"


@dataclass(frozen=True, slots=True)
class MissingRule:
    """The ops of one kind, from one line of the model, that have no rule, and what they cost in one forward.

    Costs are of all these ops together, on each stage that computes them: `compute_seconds`, which every tp rank
    repeats; and `comm_seconds` and `comm_bytes` of the collectives, `collectives` in number, that make tensors whole
    which nothing else reads whole.
    """

    kind: str  # as torch calls it
    source: str  # "modeling_x.py:41"; "" where it is not known
    ops: tuple[str, ...]
    modules: tuple[str, ...]
    compute_seconds: float
    collectives: int
    comm_seconds: float
    comm_bytes: int

    def __str__(self) -> str:
        """Formats it as "einsum (modeling_x.py:41, 24 ops): every tp rank repeats its 3.2 ms"."""
        place = self.source or ", ".join(compress_names(filter(None, self.modules))) or self.ops[0]
        count = "" if len(self.ops) == 1 else f", {ops_text(len(self.ops))}"
        text = f"{self.kind} ({place}{count}): every tp rank repeats its {seconds_text(self.compute_seconds)}"
        if self.collectives:
            times = "a collective" if self.collectives == 1 else f"{self.collectives} collectives"
            makes = "makes" if self.collectives == 1 else "make"
            size = f"{bytes_text(self.comm_bytes)}, {seconds_text(self.comm_seconds)}"
            text += f", and {times} ({size}) {makes} whole what it reads"
        return text


def missing_rules(graph: OpGraph, plan: PlanData) -> tuple[MissingRule, ...]:
    """Returns the ops without a rule in groups, the dearest first; () at tp=1, where nothing is sharded.

    `plan` is a plan of `graph`.
    """
    if plan.mesh.tp == 1:
        return ()
    from_weights, deciding = _made_of_weights(graph), deciding_ops(graph)
    without = [
        op
        for op in graph
        if op.name in from_weights and op.name not in deciding and op.outputs and _is_repeated(graph, op, plan)
    ]
    caused = _collectives_for(graph, plan, {op.name for op in without})
    groups: dict[tuple[str, str], list[Op]] = {}
    for op in without:
        groups.setdefault((plain_kind(op.kind), op.source), []).append(op)
    found = [_missing(kind, source, ops, plan, caused) for (kind, source), ops in groups.items()]
    return tuple(sorted(found, key=lambda missing: -(missing.compute_seconds + missing.comm_seconds)))


def missing_rule_warnings(missing: Sequence[MissingRule]) -> list[str]:
    """Returns a warning, one sentence, for each."""
    return [f"no sharding rule for {each}; {WAY_OUT}" for each in missing]


def refuse_missing_rules(graph: OpGraph, plan: PlanData) -> None:
    """Raises PlanError naming the kinds, their lines and the way out, if ops of `plan` have no rule."""
    missing = missing_rules(graph, plan)
    if missing:
        listed = "; ".join(map(str, missing))
        raise PlanError(f"strict: no sharding rule for {listed}; {WAY_OUT} for each, or leave strict out")


def _made_of_weights(graph: OpGraph) -> set[str]:
    """Returns the parameters, and the ops that values of one reach."""
    found: set[str] = set()
    for op in graph:
        if op.kind == "param" or (op.kind not in FILLS and any(ref.op in found for ref in op.inputs)):
            found.add(op.name)
    return found


def _is_repeated(graph: OpGraph, op: Op, plan: PlanData) -> bool:
    """True if every tp rank computes the op for want of a rule. An op of an expert that lies on one rank alone is not
    repeated, and an op that is fused with its reader costs nothing."""
    if op.kind in SOURCES or has_rule(op.kind) or op.name in graph.fused:
        return False
    return plan.op(op.name).owner is None


def _collectives_for(graph: OpGraph, plan: PlanData, without: set[str]) -> dict[str, list[tuple[float, int]]]:
    """Maps ops without a rule to (seconds, bytes) of each collective that only such ops need; of several readers of a
    tensor the first is charged."""
    found: dict[str, list[tuple[float, int]]] = {}
    for planned in plan.ops:
        for index, gathered in enumerate(planned.gather):
            ref = TensorRef(planned.name, index)
            if not gathered or ref in graph.outputs:
                continue
            have = planned.outputs[index]
            whole = [user for user, slot in graph.users.get(ref, ()) if plan.op(user).inputs[slot] != have]
            if whole and all(user in without for user in whole):
                found.setdefault(whole[0], []).append(_collective(graph, planned, index))
    return found


def _collective(graph: OpGraph, planned: OpPlan, index: int) -> tuple[float, int]:
    """Returns (seconds, bytes) of the collective of one output, over all stages that run it: the output's part, by
    bytes, of what the plan says of all of the op's collectives."""
    sizes = [graph.spec(TensorRef(planned.name, j)).nbytes if g else 0 for j, g in enumerate(planned.gather)]
    part = sizes[index] / sum(sizes) if sum(sizes) else 0.0
    return planned.comm_seconds * part * len(planned.stages), round(planned.comm_bytes * part * len(planned.stages))


def _missing(
    kind: str, source: str, ops: Sequence[Op], plan: PlanData, caused: dict[str, list[tuple[float, int]]]
) -> MissingRule:
    planned = [plan.op(op.name) for op in ops]
    collectives = [collective for op in ops for collective in caused.get(op.name, ())]
    return MissingRule(
        kind=kind,
        source=source,
        ops=tuple(op.name for op in ops),
        modules=tuple(dict.fromkeys(op.module for op in ops)),
        compute_seconds=sum(op.compute_seconds * len(op.stages) for op in planned),
        collectives=len(collectives),
        comm_seconds=sum(seconds for seconds, _ in collectives),
        comm_bytes=sum(nbytes for _, nbytes in collectives),
    )
