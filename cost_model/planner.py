"""plan(): both searches, and their result written down as a PartitionPlan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from cost_model.alternatives import AlternativeCosts
from cost_model.comm_cost import send_seconds
from cost_model.compute_cost import op_flops
from cost_model.cut_options import cut_plans
from cost_model.errors import NoPlanFits, PlanError
from cost_model.explain import plan_warnings
from cost_model.hardware import Hardware
from cost_model.memory import collective_workspace_bytes, peak_activation_bytes, workspace_bytes
from cost_model.mesh import Mesh
from cost_model.op_graph import SOURCES, Op, OpGraph, TensorRef
from cost_model.op_rules import RuleTable
from cost_model.pipeline import OpCost, PipelineSearch, Stage
from cost_model.placement import REPLICATE, Layout, Placement
from cost_model.plan import Alternative, Hop, OpPlan, ParamPlan, PartitionPlan, StageSummary, rounded
from cost_model.shard_layouts import LayoutTable
from cost_model.tensor_parallel import EXPERT, Strategy, TensorParallelSearch

# Seconds per byte of matmul weight held beyond an even share. "shard": a microsecond a byte, so that a 16 KB matrix
# weighs more than dozens of collectives: who asks for tp=N asks for sharded weights. "latency": time decides alone.
PRICES = {"shard": 1e-6, "latency": 0.0}
# Lengths at which seconds and bytes are predicted where the caller names none: one sequence of 128 tokens; for a model
# with a KV cache one step of decoding, which is where generation spends its time.
FORWARD_SIZES = {"B": 1, "S": 128, "P": 0}
DECODE_SIZES = {"B": 1, "S": 1, "P": 512}
SOURCE_SIZE = 128  # "E": what an encoder before the decoder reads


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What a plan is made for.

    `sizes` maps "B" (batch), "S" (tokens per step), "P" (tokens cached before) and "E" (what an encoder reads) to
    lengths, where they are not to be FORWARD_SIZES or DECODE_SIZES; `memory_bytes` is a device's limit for weights and
    caches (None: no limit). `whole_experts`: experts may be dealt to ranks, which programs to be trained do not know.
    """

    mesh: Mesh
    hardware: Hardware
    objective: str = "shard"
    sizes: tuple[tuple[str, int], ...] = ()
    memory_bytes: int | None = None
    whole_experts: bool = True


def plan(graph: OpGraph, request: PlanRequest, *, model: str, fingerprint: str) -> PartitionPlan:
    """Choose every op's placement and every cut.

    Raises MeshError (no such cut), NoPlanFits (an explicit memory limit cannot be met), PlanError (bad request).
    """
    if request.objective not in PRICES:
        raise PlanError(f"no objective {request.objective!r}: choose one of {', '.join(PRICES)}")
    return _Planner(graph, request).plan(model, fingerprint)


class _Planner:
    def __init__(self, graph: OpGraph, request: PlanRequest) -> None:
        self.graph = graph
        self.request = request
        self.mesh = request.mesh
        self.hardware = replace(request.hardware, tp_link=request.hardware.tp_link_on(request.mesh))
        decodes = any(op.kind == "cache_update" for op in graph)
        source = {"E": SOURCE_SIZE} if any("E" in spec.symbols for op in graph for spec in op.outputs) else {}
        self.lengths = {**(DECODE_SIZES if decodes else FORWARD_SIZES), **source, **dict(request.sizes)}
        self.sizes = all_lengths(self.lengths)
        self.layouts = LayoutTable(graph, self.mesh.tp, RuleTable())
        self.search = TensorParallelSearch(
            graph, self.mesh.tp, self.hardware, self.sizes, self.layouts, whole_experts=request.whole_experts
        )
        self.interned: dict[Layout, int] = {}
        self.choices: dict[tuple[Alternative, ...], int] = {}

    def plan(self, model: str, fingerprint: str) -> PartitionPlan:
        price = PRICES[self.request.objective]
        limit = self.request.memory_bytes
        while True:
            result = self.search.solve(price)
            self.strategies = result.strategies
            try:
                stages = self._cut(limit)
                break
            except NoPlanFits:
                if price >= PRICES["shard"]:
                    raise
                price = max(10 * price, 1e-12)  # memory costs more until the plan fits
        self.alternatives = AlternativeCosts(self.search, result, role_of)
        return self._write(model, fingerprint, stages)

    # -- the pipeline search ---------------------------------------------------------------------------------------

    def _cut(self, limit: int | None) -> list[Stage]:
        costs = {op.name: self._op_cost(op) for op in self.graph if op.kind not in SOURCES}
        sends = {
            TensorRef(op.name, j): self._send_seconds(TensorRef(op.name, j))
            for op in self.graph
            for j in range(len(op.outputs))
        }
        weights = {op.name: self._weight_bytes(op) for op in self.graph if op.kind in ("param", "buffer")}
        self.pipeline = PipelineSearch(self.graph, costs, sends, weights)
        return self.pipeline.solve(self.mesh.pp, None if limit is None else [limit] * self.mesh.pp)

    def _send_seconds(self, ref: TensorRef) -> float:
        """Of one tensor to another stage, both ends: one launches the send, one the recv. Where the receiver cannot
        tell a length from the model's inputs, the shape goes ahead: 8 bytes a dim."""
        if self.strategies[ref.op].letter == EXPERT and not self.strategies[ref.op].gather[ref.index]:
            return math.inf  # a layer's experts are one stage's: each rank has its own of them
        spec, link = self.search.spec(ref), self.hardware.pp_link
        told = any(symbol.startswith("?") for symbol in self.graph.spec(ref).symbols)
        ahead = send_seconds(8 * len(spec.shape), link) + link.launch_seconds if told else 0.0
        return ahead + send_seconds(spec.nbytes, link) + link.launch_seconds

    def _op_cost(self, op: Op) -> OpCost:
        strategy = self.strategies[op.name]
        takes_weights = any(self.graph[ref.op].kind == "param" for ref in op.inputs)
        return OpCost(
            seconds=self.search.compute_seconds(op, strategy) + self.search.gather_seconds(op, strategy),
            state_bytes=self._cache_bytes(op),
            repeatable=not (op.mutates or takes_weights or any(strategy.gather)),
        )

    def _weight_bytes(self, op: Op) -> int:
        return self.search.held_bytes(op, self.strategies[op.name])

    def _cache_bytes(self, op: Op) -> int:
        if op.kind != "cache_update":
            return 0
        outs = self.strategies[op.name].outputs
        return sum(self.search.local(TensorRef(op.name, j), p).nbytes for j, p in enumerate(outs))

    # -- writing it down -------------------------------------------------------------------------------------------

    def _write(self, model: str, fingerprint: str, stages: list[Stage]) -> PartitionPlan:
        homes: dict[str, int] = {}
        computed: dict[str, set[int]] = {}
        for k, stage in enumerate(stages):
            for name in self.pipeline.sequence[stage.start : stage.stop]:
                homes[name] = k
                computed.setdefault(name, set()).add(k)
            for name in stage.recomputed:
                computed.setdefault(name, set()).add(k)
        ops = tuple(self._op_plan(self.graph[name], homes[name], computed[name]) for name in self.pipeline.sequence)
        params = tuple(self._param_plan(op, computed) for op in self.graph if op.kind == "param")
        hops = self._hops(stages, homes, computed)
        alone = self._one_device_seconds()
        plan = PartitionPlan(
            mesh=self.mesh,
            model=model,
            fingerprint=fingerprint,
            hardware=self.request.hardware.name,
            objective=self.request.objective,
            sizes=tuple(self.lengths.items()),
            ops=ops,
            params=params,
            layouts=tuple(self.interned),
            hops=hops,
            stages=tuple(self._summary(k, stage, computed, hops) for k, stage in enumerate(stages)),
            one_device_seconds=alone,
            device_memory_bytes=self.request.memory_bytes or self.request.hardware.memory_bytes,
            choices=tuple(self.choices),
            cuts=cut_plans(self.pipeline, stages, lambda ref: self.search.spec(ref).nbytes),
        )
        return replace(plan, warnings=tuple(plan_warnings(plan)))

    def _layout_index(self, ref: TensorRef, placement: Placement) -> int:
        if not placement.is_shard:
            return -1
        layout = self.search.layout(ref, placement)
        assert layout is not None, f"{ref} is {placement} without a layout"
        return self.interned.setdefault(layout, len(self.interned))

    def _op_plan(self, op: Op, home: int, stages: set[int]) -> OpPlan:
        s = self.strategies[op.name]
        role, choice = role_of(op, s), self.alternatives.of(op)
        return OpPlan(
            name=op.name,
            kind=op.kind,
            home=home,
            stages=tuple(sorted(stages)),
            inputs=s.inputs,
            outputs=s.outputs,
            gather=s.gather,
            letter=s.letter,
            role=role,
            module=op.module,
            weight=next((r.op for r in op.inputs if self.graph[r.op].attrs.get("matmul")), "") if role else "",
            input_layouts=tuple(self._layout_index(r, p) for r, p in zip(op.inputs, s.inputs, strict=True)),
            output_layouts=tuple(self._layout_index(TensorRef(op.name, j), p) for j, p in enumerate(s.outputs)),
            compute_seconds=rounded(self.search.compute_seconds(op, s)),
            comm_seconds=rounded(self.search.gather_seconds(op, s)),
            comm_bytes=sum(self.search.spec(TensorRef(op.name, j)).nbytes for j, whole in enumerate(s.gather) if whole),
            choice=self.choices.setdefault(choice, len(self.choices)) if choice else -1,
        )

    def _param_plan(self, op: Op, computed: Mapping[str, set[int]]) -> ParamPlan:
        placement = self.strategies[op.name].outputs[0]
        users = [user for user, _ in self.graph.users.get(TensorRef(op.name), ())]
        return ParamPlan(
            name=op.name,
            shape=op.outputs[0].shape,
            dtype=op.outputs[0].dtype,
            placement=placement,
            layout=self._layout_index(TensorRef(op.name), placement),
            stages=tuple(sorted({k for user in users for k in computed[user]})),
            matmul=bool(op.attrs.get("matmul")),
        )

    def _hops(
        self, stages: list[Stage], homes: Mapping[str, int], computed: Mapping[str, set[int]]
    ) -> tuple[Hop, ...]:
        """One hop for each (tensor, stage that receives it), in the order the tensors are made."""
        found: list[Hop] = []
        for k, stage in enumerate(stages):
            for ref in stage.received:
                producer = self.strategies[ref.op]
                have = producer.outputs[ref.index]
                wanted = {
                    self.strategies[user].inputs[slot]
                    for user, slot in self.graph.users.get(ref, ())
                    if k in computed[user]
                }
                # as it lies, when all users there want it so; whole, when one wants it whole; both, when some want a
                # sum that is still owed and others the whole
                forms = {p.is_replicate or p != have for p in wanted}
                if forms == {True, False} and not have.is_partial:
                    forms = {True}
                for is_whole in sorted(forms):
                    placement = REPLICATE if is_whole else have
                    nbytes = self.search.local(ref, placement).nbytes
                    found.append(Hop(ref.op, ref.index, homes[ref.op], k, 0, is_whole, nbytes))
        found.sort(key=lambda h: (self.pipeline.position[h.op], h.index, h.target, h.whole))
        return tuple(replace(hop, channel=i) for i, hop in enumerate(found))

    def _summary(self, k: int, stage: Stage, computed: Mapping[str, set[int]], hops: tuple[Hop, ...]) -> StageSummary:
        names = [name for name in self.pipeline.sequence if k in computed[name]]
        ops = [self.graph[name] for name in names]
        collectives: dict[str, tuple[int, int]] = {}
        flops, workspace = 0.0, 0
        for op in ops:
            s = self.strategies[op.name]
            ins = tuple(self.search.local(r, p) for r, p in zip(op.inputs, s.inputs, strict=True))
            outs = tuple(self.search.local(TensorRef(op.name, j), p) for j, p in enumerate(s.outputs))
            flops += op_flops(op, ins, outs) * self.search.on_slowest(op, s)
            workspace = max(workspace, workspace_bytes(op, ins, outs))
            for j, (placement, gather) in enumerate(zip(s.outputs, s.gather, strict=True)):
                if gather:
                    name = "all_reduce" if placement.is_partial else "all_gather"
                    count, nbytes = collectives.get(name, (0, 0))
                    whole = self.search.spec(TensorRef(op.name, j)).nbytes
                    collectives[name] = (count + 1, nbytes + whole)
                    beside = collective_workspace_bytes(placement, whole, outs[j].nbytes, self.mesh.tp)
                    workspace = max(workspace, beside)
        held = {
            ref.op for op in ops for ref in op.inputs if self.graph[ref.op].kind in ("param", "buffer")
        }
        hop_seconds = sum(
            send_seconds(h.nbytes, self.hardware.hop_link(self.mesh, h.source, h.target)) for h in hops if h.target == k
        )
        return StageSummary(
            index=k,
            layers=self._layers(ops),
            compute_seconds=sum(self.search.compute_seconds(op, self.strategies[op.name]) for op in ops),
            comm_seconds=sum(self.search.gather_seconds(op, self.strategies[op.name]) for op in ops) + hop_seconds,
            recomputed=stage.recomputed,
            flops=flops,
            weight_bytes=sum(self._weight_bytes(self.graph[name]) for name in held),
            kv_cache_bytes=sum(self._cache_bytes(op) for op in ops),
            activation_bytes=self._activation_bytes(ops, stage),
            workspace_bytes=workspace,
            collectives=tuple((name, count, nbytes) for name, (count, nbytes) in sorted(collectives.items())),
        )

    def _activation_bytes(self, ops: list[Op], stage: Stage) -> int:
        names = {op.name for op in ops}
        later = {ref for ref in self.graph.outputs if ref.op in names}
        for ref, users in self.graph.users.items():
            if ref.op in names and any(user not in names for user, _ in users):
                later.add(ref)  # sent on
        return peak_activation_bytes(ops, self._held_bytes, later, stage.received)

    def _held_bytes(self, ref: TensorRef) -> int:
        """Of a tensor on one tp rank, as it lies and, where it is gathered, whole."""
        strategy = self.strategies[ref.op]
        nbytes = self.search.local(ref, strategy.outputs[ref.index]).nbytes
        return nbytes + (self.search.spec(ref).nbytes if strategy.gather[ref.index] else 0)

    def _layers(self, ops: list[Op]) -> tuple[str, ...]:
        """Module paths up to their first number ("model.layers.3"), in order, of the ops that use weights."""
        found: dict[str, None] = {}
        for op in ops:
            weights = [ref.op for ref in op.inputs if self.graph[ref.op].kind == "param"]
            for path in ([op.module] if weights else []):
                atoms = path.split(".")
                number = next((i for i, atom in enumerate(atoms) if atom.isdecimal()), None)
                found[".".join(atoms[: number + 1]) if number is not None else path] = None
        return tuple(found)

    def _one_device_seconds(self) -> float:
        """The model unsplit on one device (on the whole machine, where ranks share one)."""
        alone = self.request.hardware.alone(self.mesh.size)
        search = TensorParallelSearch(self.graph, 1, alone, self.sizes, self.layouts)
        return sum(search.compute_seconds(op, search.domain(op)[0]) for op in self.graph)


def all_lengths(sizes: Mapping[str, int]) -> dict[str, int]:
    """B, S, P and E, the total T that S and P make, and the products that merged dims have ("B*S")."""
    full = {"P": 0, **sizes}
    full["T"] = full.get("T", full["P"] + full["S"])
    for x in list(full):
        for y in list(full):
            if "*" not in x and "*" not in y:
                full[f"{x}*{y}"] = full[x] * full[y]
    return full


def role_of(op: Op, strategy: Strategy) -> str:
    """The strategy in the field's words, for linears, convolutions and embeddings; "" for other ops."""
    if op.kind in ("linear", "conv"):
        return strategy.letter if strategy.letter in ("column", "row", "groups", EXPERT) else "replicate"
    if op.kind == "embedding":
        return {"vocab": "vocab", "hidden": "hidden"}.get(strategy.letter, "replicate")
    return ""
