"""The state of interpreting one rank's graph, and what it notes for the checks of groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import Op, OpGraph, TensorRef
from cost_model.graph.placement import Interval
from cost_model.plan.data import Hop, PlanData
from cost_model.rules.rule import OpRule
from cost_model.rules.table import RuleTable
from passes.op_graph.build import Classifier
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram
from passes.verify.core.held import WHOLE, Held, Judge, Shape, as_planned, held
from passes.verify.core.messages import Message
from passes.verify.core.meta_shapes import MetaRunner, Tensor
from passes.verify.core.report import fail


class Value(NamedTuple):
    """A tensor of the model, and what the rank has of it."""

    ref: TensorRef
    held: Held


class Sent(NamedTuple):
    """A tensor that a send puts on its way."""

    value: Value
    local: Tensor
    node: Node


@dataclass
class Tools:
    """The op rules, judgements and shapes that all ranks of one verification share."""

    plan: PlanData
    graph: OpGraph
    whole: Mapping[str, Node] = field(default_factory=dict)  # nodes of the model's own graph, where it is given
    judge: Judge = field(default_factory=Judge)
    runner: MetaRunner = field(default_factory=MetaRunner)
    sent: dict[Message, Sent] = field(default_factory=dict)
    _table: RuleTable = field(default_factory=RuleTable)
    _rules: dict[str, tuple[OpRule, tuple[Shape, ...], tuple[Shape, ...]]] = field(default_factory=dict)

    def rule(self, op: Op) -> tuple[OpRule, tuple[Shape, ...], tuple[Shape, ...]]:
        """Returns (rule, shapes of the whole inputs, of the whole outputs) of an op."""
        found = self._rules.get(op.name)
        if found is None:
            specs = self.graph.input_specs(op)
            ins, outs = tuple(s.shape for s in specs), tuple(s.shape for s in op.outputs)
            found = self._rules[op.name] = (self._table(op, specs), ins, outs)
        return found

    def hop(self, channel: int) -> Hop:
        """Returns the plan's hop of a channel."""
        return next(h for h in self.plan.hops if h.channel == channel)


@dataclass
class RankFacts:
    """The findings in a rank's graph that concern its group."""

    program: RankProgram
    values: dict[Node, Value | tuple[Value, ...]] = field(default_factory=dict)  # what each node stands for
    # op -> (node, size of what is summed over, this rank's piece of it)
    sums: dict[str, tuple[Node, int, tuple[Interval, ...]]] = field(default_factory=dict)
    biases: dict[str, tuple[Node, bool]] = field(default_factory=dict)  # op that owes a sum -> does it add its bias
    collectives: list[tuple[Node, TensorRef]] = field(default_factory=list)
    outputs: dict[str, TensorRef] = field(default_factory=dict)
    updates: list[tuple[str, int, Node]] = field(default_factory=list)  # (op, local cache layer)


class RankState:
    """The values of the nodes met so far: which tensor of the model each is, how it lies, its local shape."""

    def __init__(self, program: RankProgram, tools: Tools) -> None:
        self.program, self.tools = program, tools
        self.plan, self.graph = tools.plan, tools.graph
        self.module = program.graph_module
        self.facts = RankFacts(program)
        self.values = self.facts.values
        self.known: dict[Node, Any] = {}  # local shapes and numbers, for the meta runner
        self._refs: dict[Node, TensorRef] = {}
        self.classify = Classifier(self.module, self._refs)
        self._locals: dict[Value, Tensor] = {}

    def set(self, node: Node, value: Value) -> None:
        """Sets the value of a node that gives one tensor."""
        self.values[node] = value
        self._refs[node] = value.ref
        self.known[node] = self.local(value)

    def set_all(self, node: Node, values: tuple[Value, ...]) -> None:
        """Sets the values of an op that returns a tuple."""
        self.values[node] = values
        self._refs[node] = TensorRef(values[0].ref.op)
        self.known[node] = tuple(self.local(v) for v in values)

    def local(self, value: Value) -> Tensor:
        """Returns the shape and dtype that a value has on this rank, at the example sizes."""
        found = self._locals.get(value)
        if found is None:
            spec = self.graph.spec(value.ref)
            found = Tensor((value.held.local_shape(spec.shape), getattr(torch, spec.dtype)))
            self._locals[value] = found
        return found

    def value(self, node: Node, of: Any) -> Value:
        """Returns the value of `of`, an argument of `node`."""
        value = self.values.get(of) if isinstance(of, Node) else None
        if not isinstance(value, Value):
            said = f"takes {of}, which is no tensor of the model"
            fail(self.program, node, said, inputs=True)
        if value.held.owner not in (-1, self.program.tp_rank):
            fail(self.program, node, f"takes {of}, which is {value.held}", inputs=True)
        return value

    def has_whole(self, held: Held) -> bool:
        """Returns whether this rank has the whole tensor, alone or not."""
        return held == WHOLE or held.owner == self.program.tp_rank

    def may_count_as(self, found: Held, planned: Held) -> bool:
        """Returns whether `found` may count as `planned`: what a rank has whole may count as what it alone has; what
        another has is nothing that this one may use."""
        return found == planned or (planned.owner >= 0 and (planned.owner != self.program.tp_rank or found == WHOLE))

    def shard_value(self, shard: ParamShard) -> Value:
        """Returns the value of a parameter or buffer that the rank holds."""
        lies = WHOLE if shard.dim is None else held(shard.dim, shard.intervals, shard.shape[shard.dim])
        return Value(TensorRef(shard.source), lies)

    def planned(self, op: Op) -> tuple[Held, ...]:
        """Returns how the plan says that the op's outputs lie on this rank."""
        plan = self.plan.op(op.name)
        return tuple(
            as_planned(p, self.plan.layout(i), self.program.tp_rank)
            for p, i in zip(plan.outputs, plan.output_layouts, strict=True)
        )


def named(ref: TensorRef) -> str:
    """Formats a tensor of the model: "split" or, of its later outputs, "split[1]"."""
    return ref.op if ref.index == 0 else f"{ref.op}[{ref.index}]"
