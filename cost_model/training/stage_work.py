"""Predicts a microbatch's forward and backward pass on each stage of a plan, and what the stage keeps for it.

Seconds and bytes are of the stage's slowest and fullest tp rank. The forward pass is the plan's own prediction; the
backward pass follows from it (costs/backward.py), with the all_reduces that gradients are owed: one where a whole value
is read by ops that compute in parts (passes/partition/insert_gradient_sums.py). Kept are the tensors that autograd
saves, each storage once; with recomputation by layer, what enters the layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from cost_model.costs.backward import backward_work, kept_tensors, outputs_of
from cost_model.costs.communication import all_reduce_seconds, send_seconds
from cost_model.costs.compute import VIEWS
from cost_model.costs.hardware import Hardware
from cost_model.costs.memory import workspace_bytes
from cost_model.format import layer_of
from cost_model.graph.op_graph import SOURCES, Op, OpGraph, TensorRef, is_norm
from cost_model.graph.placement import REPLICATE
from cost_model.graph.roles import EXPERT
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import OpPlan
from cost_model.request.plan_request import PlanRequest
from cost_model.schedule.timeline import StageCosts, Transfer
from cost_model.search.plan_search import PlanSearch, SharedSearches
from cost_model.search.strategy import Strategy

_FLOATING = ("float", "complex")  # "bfloat16" and "float8_e5m2" among them


@dataclass(frozen=True, slots=True)
class StageWork:
    """One stage's work on one microbatch, and its parameters, on one tp rank."""

    costs: StageCosts
    parameter_bytes: int  # of parameters, each of which has a gradient and optimizer states
    buffer_bytes: int
    transient_bytes: int  # beside what is kept: gradients while an op goes backward, or a layer that is recomputed
    owed_bytes: int  # of parameters whose gradients are terms of a sum over the tp ranks


class WorkAnalysis:
    """Analyses the stages of one plan, at the sizes of one microbatch.

    `plan` was made of `graph` for `request`; `rows` sequences a microbatch. `shared` are the searches behind the plan.
    """

    def __init__(
        self, graph: OpGraph, plan: PartitionPlan, request: PlanRequest, rows: int, shared: SharedSearches
    ) -> None:
        sizes = {**dict(plan.sizes), **dict(request.sizes), "B": rows}
        self.graph, self.plan = graph, plan
        self.planned = PlanSearch(graph, replace(request, mesh=plan.mesh, sizes=tuple(sizes.items())), shared)
        self.search = self.planned.search
        self._stages: dict[tuple[int, bool], StageWork] = {}
        self._strategies = {op.name: Strategy(op.factor, op.inputs, op.outputs, op.gather) for op in plan.ops}
        for param in plan.params:
            factor = EXPERT if param.placement.is_dealt or param.placement.is_owned else ""
            self._strategies[param.name] = Strategy(factor, (), (param.placement,), (False,))

    def stage(self, k: int, *, recompute: bool) -> StageWork:
        """Returns the work of stage k; with `recompute` the layers' forward passes are run again in backward."""
        if (k, recompute) not in self._stages:
            self._stages[k, recompute] = self._stage(k, recompute)
        return self._stages[k, recompute]

    def _stage(self, k: int, recompute: bool) -> StageWork:
        ops = [op for op in self.plan.ops if k in op.stages]
        search = self.planned.of_stage[k]
        forward = again = back_inputs = back_weights = 0.0
        for planned in ops:
            op, s = self.graph[planned.name], self._strategies[planned.name]
            computing = search.compute_seconds(op, s)
            seconds = computing + search.gather_seconds(op, s)
            needed = self._inputs_needed(op, op.inputs)
            work = backward_work(op, needed, [self.graph[ref.op].kind == "param" for ref in op.inputs])
            forward += seconds
            back_inputs += computing * work.inputs
            back_weights += computing * work.weights
            if recompute and layer_of(op.module):
                again += seconds
        link, tp = search.hardware.tp_link, self.plan.mesh.tp
        sums = sum(all_reduce_seconds(self.search.spec(ref).nbytes, tp, link) for ref in self._summed(ops))
        parameters = {name: self._held(name) for name in self._read(ops, "param")}
        # to the other microbatches' gradients
        adding = search.hardware.stream_seconds(3 * sum(parameters.values()))
        kept, transient = self._kept(ops, recompute)
        for_weights = min(kept, self._kept_for_weights(ops))
        return StageWork(
            costs=StageCosts(forward, back_inputs + again + sums, back_weights + adding, kept, for_weights),
            parameter_bytes=sum(parameters.values()),
            buffer_bytes=sum(self.search.spec(TensorRef(name)).nbytes for name in self._read(ops, "buffer")),
            transient_bytes=transient,
            owed_bytes=sum(parameters[name] for name in self._owed(ops)),
        )

    def transfers(self, mesh: Mesh) -> list[Transfer]:
        """Returns what the stages hand on of each microbatch, over the links of `mesh`, which has the replicas, too."""
        found = []
        for hop in self.plan.hops:
            ref = TensorRef(hop.op, hop.index)
            placement = REPLICATE if hop.whole else self._strategies[hop.op].outputs[hop.index]
            link = self.hardware[hop.source].hop_link(mesh, hop.source % mesh.pp, hop.target % mesh.pp)
            seconds = send_seconds(self.search.local(ref, placement).nbytes, link)
            found.append(Transfer(hop.source, hop.target, seconds, seconds if self._needs(ref) else None))
        return found

    @property
    def hardware(self) -> tuple[Hardware, ...]:
        """The hardware of each stage, while all ranks compute that do so at once."""
        request = self.planned.request
        return tuple(d.computing(request.ranks_at_once or request.mesh.tp) for d in request.stage_devices)

    # -- gradients -----------------------------------------------------------------------------------------------------

    def _needs(self, ref: TensorRef) -> bool:
        """Returns whether a tensor has a gradient."""
        return ref.op in self.graph.from_weights and any(name in self.graph.spec(ref).dtype for name in _FLOATING)

    def _inputs_needed(self, op: Op, inputs: Iterable[TensorRef]) -> list[bool]:
        """Returns, for each of an op's inputs, whether the op's backward pass computes a gradient of it."""
        leads = any(map(self._needs, outputs_of(op)))
        return [leads and self._needs(ref) for ref in inputs]

    def _summed(self, ops: Iterable[OpPlan]) -> list[TensorRef]:
        """Returns the whole values whose gradients come back as terms, which one all_reduce each adds up."""
        found: dict[TensorRef, None] = {}
        for planned in ops:
            op = self.graph[planned.name]
            for ref in op.inputs if _in_parts(planned) else ():
                if self._needs(ref) and self.graph[ref.op].kind not in SOURCES and self._is_whole(ref):
                    found[ref] = None
        return list(found)

    def _is_whole(self, ref: TensorRef) -> bool:
        s = self._strategies[ref.op]
        return s.gather[ref.index] or s.outputs[ref.index].is_replicate

    def _gradients_alive(self, op: Op) -> int:
        """Returns the bytes of the gradients that are alive while an op goes backward: of its outputs and inputs."""
        if op.name in self.graph.fused:
            return 0
        tensors = {*outputs_of(op), *self._really_read(op)}
        return sum(self._bytes(ref) for ref in tensors if self._needs(ref) and self.graph[ref.op].kind != "param")

    def _owed(self, ops: Iterable[OpPlan]) -> set[str]:
        """Returns the parameters that every rank has whole and reads in parts, so that their gradients are terms."""
        found: set[str] = set()
        for planned in ops:
            if _in_parts(planned):
                read = [ref.op for ref in self.graph[planned.name].inputs if self.graph[ref.op].kind == "param"]
                found.update(name for name in read if self._is_whole(TensorRef(name)))
        return found

    # -- what is held --------------------------------------------------------------------------------------------------

    def _read(self, ops: Iterable[OpPlan], kind: str) -> list[str]:
        """Returns the parameters, or buffers, that some ops read."""
        read = (ref.op for planned in ops for ref in self.graph[planned.name].inputs)
        return [name for name in dict.fromkeys(read) if self.graph[name].kind == kind]

    def _held(self, parameter: str) -> int:
        return self.search.held_bytes(self.graph[parameter], self._strategies[parameter])

    def _kept(self, ops: Iterable[OpPlan], recompute: bool) -> tuple[int, int]:
        """Returns (bytes kept of a microbatch from forward to backward, bytes more at the worst moment of backward)."""
        outside, borders, layers = _Storages(self), _Storages(self), dict[str, _Storages]()
        worst: dict[str, int] = {}  # by layer, "" for what is none: most bytes of gradients that are alive at once
        for planned in ops:
            op = self.graph[planned.name]
            if op.name in self.graph.fused:
                continue
            inputs = self._really_read(op)
            needed = self._inputs_needed(op, inputs)
            layer = layer_of(op.module) if recompute else ""
            inside_op = self._kept_inside(op, self._inputs_needed(op, op.inputs)) if any(needed) else 0
            of_op = layers.setdefault(layer, _Storages(self)) if layer else outside
            of_op.add(kept_tensors(op, inputs, needed), inside_op)
            if layer:  # what enters a layer from another one, or from outside of all
                borders.add([ref for ref in inputs if layer_of(self.graph[ref.op].module) != layer])
            worst[layer] = max(worst.get(layer, 0), self._gradients_alive(op))
        kept = outside.union(borders)
        # What is kept outside of the layers is mostly the head's, which has gone backward when they come to it.
        again = max((own.nbytes + worst[layer] for layer, own in layers.items()), default=0) - (kept - borders.nbytes)
        return kept, max(worst.get("", 0), again)

    def _kept_inside(self, op: Op, needed: Sequence[bool]) -> int:
        """Returns the bytes that an op keeps beside its inputs and outputs; `needed[i]`: input i has a gradient.

        sdpa: log-sum-exps; where its mask has a gradient (a learned bias), which fused kernels do not compute, the
        probabilities, and q and k as they are multiplied. cross_entropy: the log-probabilities. dropout: a byte for
        each element that is drawn. rms_norm, where it is no kernel of its own: what is normalized, before its scale.
        """
        inputs = [self.search.local(ref, p) for ref, p in zip(op.inputs, self._strategies[op.name].inputs, strict=True)]
        kind = op.kind.removeprefix("opaque.")
        if kind == "cross_entropy":
            return inputs[0].nbytes
        if kind == "dropout":
            return prod(inputs[0].shape[: int(op.attrs["drawn"])])
        if is_norm(self.graph, op):
            return 0 if self.search.hardware.fuses_norms else sum(map(self._bytes, outputs_of(op)))
        if kind != "sdpa":
            return 0
        if not any(needed[3:]):
            return workspace_bytes(op, inputs, ())
        q, k = inputs[:2]
        return q.nbytes // q.shape[-1] * k.shape[-2] + q.nbytes + k.nbytes

    def _kept_for_weights(self, ops: Iterable[OpPlan]) -> int:
        """Returns the bytes that the gradients of weights need once those of a stage's inputs are computed."""
        storages = _Storages(self)
        for planned in ops:
            op = self.graph[planned.name]
            if any(self.graph[ref.op].kind == "param" for ref in op.inputs):
                storages.add([*self._really_read(op), *outputs_of(op)])
        return storages.nbytes

    def _really_read(self, op: Op) -> list[TensorRef]:
        """Returns the tensors that an op reads, those of the ops whose work it does among them."""
        found: dict[TensorRef, None] = {}
        for ref in op.inputs:
            if ref.op in self.graph.fused:
                found.update(dict.fromkeys(self._really_read(self.graph[ref.op])))
            else:
                found[ref] = None
        return list(found)

    def storage_of(self, ref: TensorRef) -> TensorRef:
        """Returns the tensor whose memory a tensor is a view of, itself where it is none."""
        op = self.graph[ref.op]
        while op.kind.removeprefix("opaque.") in VIEWS and op.inputs:
            ref = op.inputs[0]
            op = self.graph[ref.op]
        return ref

    def _bytes(self, ref: TensorRef) -> int:
        """Returns the bytes of a tensor as a rank has it for those that read it."""
        if self._is_whole(ref):
            return self.search.spec(ref).nbytes
        return self.search.local(ref, self._strategies[ref.op].outputs[ref.index]).nbytes

    def storage_bytes(self, ref: TensorRef) -> int:
        """Returns the bytes of a tensor that a rank keeps; 0 for parameters, buffers and the model's inputs, which are
        there anyway."""
        return 0 if self.graph[ref.op].kind in SOURCES else self._bytes(ref)


class _Storages:
    """Tensors that are kept, each storage counted once."""

    def __init__(self, analysis: WorkAnalysis) -> None:
        self._analysis = analysis
        self._found: dict[TensorRef, int] = {}
        self._more = 0

    def add(self, tensors: Iterable[TensorRef], more: int = 0) -> None:
        """Adds tensors, and `more` bytes that are no tensor of the graph."""
        for ref in map(self._analysis.storage_of, tensors):
            self._found[ref] = self._analysis.storage_bytes(ref)
        self._more += more

    def union(self, other: _Storages) -> int:
        """Returns the bytes of both, what both have once."""
        return sum((self._found | other._found).values()) + self._more + other._more

    @property
    def nbytes(self) -> int:
        """Bytes of all storages."""
        return sum(self._found.values()) + self._more


def _in_parts(op: OpPlan) -> bool:
    """Returns whether each rank computes a part, or a term, of what an op computes."""
    return any(not p.is_replicate for p in (*op.inputs, *op.outputs))
