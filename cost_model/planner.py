"""plan(): both searches, and their result written down as a PartitionPlan."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cost_model.alternatives import AlternativeCosts, refuse_impossible_roles
from cost_model.comm_cost import send_seconds
from cost_model.compute_cost import op_flops
from cost_model.cut_options import cut_plans
from cost_model.cuts import cut_positions
from cost_model.errors import NoPlanFits, PlanError
from cost_model.explain import plan_warnings
from cost_model.hardware import Hardware, Link
from cost_model.memory import collective_workspace_bytes, peak_activation_bytes, workspace_bytes
from cost_model.op_graph import SOURCES, Op, OpGraph, TensorRef
from cost_model.pins import pinned_roles, pins_text, to_blame
from cost_model.pipeline import OpCost, PipelineSearch, Stage
from cost_model.placement import REPLICATE, Layout, Placement
from cost_model.plan import Alternative, Device, Hop, OpPlan, ParamPlan, PartitionPlan, Request, StageSummary, rounded
from cost_model.plan_request import PRICES, PlanRequest
from cost_model.roles import EXPERT, role_of
from cost_model.shard_layouts import LayoutTable
from cost_model.tensor_parallel import Strategy, TensorParallelSearch

# Lengths at which seconds and bytes are predicted where the caller names none: one sequence of 128 tokens; for a model
# with a KV cache one step of decoding, which is where generation spends its time.
FORWARD_SIZES = {"B": 1, "S": 128, "P": 0}
DECODE_SIZES = {"B": 1, "S": 1, "P": 512}
SOURCE_SIZE = 128  # "E": what an encoder before the decoder reads


# Searches made already, by what they depend on: several plans of one graph share them.
SharedSearches = dict[tuple[object, ...], TensorParallelSearch]


def plan(
    graph: OpGraph, request: PlanRequest, *, model: str, fingerprint: str, shared: SharedSearches | None = None
) -> PartitionPlan:
    """Choose every op's placement and every cut. `shared` is filled with searches, for another plan of the same graph.

    Raises MeshError (no such cut), NoPlanFits (an explicit memory limit cannot be met), PlanError (bad request: a pin
    or a cut that names nothing, is impossible, or contradicts another).
    """
    shared = {} if shared is None else shared
    try:
        planner = _Planner(graph, request, shared)
        stages = planner.choose()
    except (NoPlanFits, _Infeasible) as error:
        blamed = to_blame(request.pins, lambda pins: _fails(graph, replace(request, pins=tuple(pins)), shared))
        if blamed:
            together = "the pin" if len(blamed) == 1 else "together the pins"
            raise type(error)(f"{together} {pins_text(blamed)} cannot be met: {error}") from error
        raise
    return planner.write(model, fingerprint, stages)


def forward_seconds(
    graph: OpGraph, plan: PartitionPlan, request: PlanRequest, sizes: Mapping[str, int], shared: SharedSearches
) -> float:
    """Of one forward through all stages of a plan for `graph`, made for `request`, at other sizes than its own."""
    planner = _Planner(graph, replace(request, sizes=tuple(sizes.items())), shared)
    total = 0.0
    for op in plan.ops:
        s = Strategy(op.letter, op.inputs, op.outputs, op.gather)
        for stage in op.stages:
            search = planner.of_stage[stage]
            total += search.compute_seconds(graph[op.name], s) + search.gather_seconds(graph[op.name], s)
    for hop in plan.hops:
        placement = REPLICATE if hop.whole else plan.op(hop.op).outputs[hop.index]
        nbytes = planner.search.local(TensorRef(hop.op, hop.index), placement).nbytes
        total += send_seconds(nbytes, planner.hop_link(hop.source, hop.target))
    return total


class _Infeasible(PlanError):
    """The tensor-parallel search has no solution."""


def _fails(graph: OpGraph, request: PlanRequest, shared: SharedSearches) -> bool:
    try:
        _Planner(graph, request, shared).choose()
    except (NoPlanFits, _Infeasible):
        return True
    return False


class _Planner:
    def __init__(self, graph: OpGraph, request: PlanRequest, shared: SharedSearches) -> None:
        self.graph = graph
        self.request = request
        self.mesh = request.mesh
        present = _lengths_of(graph)
        wanted = {**(DECODE_SIZES if "P" in present else FORWARD_SIZES), "E": SOURCE_SIZE, **dict(request.sizes)}
        self.lengths = {symbol: n for symbol, n in wanted.items() if symbol in present}
        self.sizes = all_lengths(self.lengths)
        self.pinned = pinned_roles(graph, request.pins)
        self.of_stage = [self._search(device, shared) for device in request.stage_devices]
        # One sharding for all stages, chosen for the device that the whole model takes longest on.
        self.search = max(dict.fromkeys(self.of_stage), key=_unsplit_seconds) if request.devices else self.of_stage[0]
        self.hardware = self.search.hardware
        self.layouts = self.search.layouts
        self.interned: dict[Layout, int] = {}
        self.choices: dict[tuple[Alternative, ...], int] = {}

    def _search(self, device: Hardware, shared: SharedSearches) -> TensorParallelSearch:
        on_mesh = replace(device, tp_link=device.tp_link_on(self.mesh))
        may_deal = self.request.whole_experts
        fixed = (self.mesh.tp, tuple(self.sizes.items()), tuple(self.pinned.items()), may_deal)
        key = (*fixed, on_mesh)
        if key not in shared:
            tp = self.mesh.tp
            layouts = next((x.layouts for x in shared.values() if x.tp == tp), None) or LayoutTable(self.graph, tp)
            shared[key] = TensorParallelSearch(self.graph, tp, on_mesh, self.sizes, layouts, self.pinned, may_deal)
            refuse_impossible_roles(shared[key])
        return shared[key]

    def choose(self) -> list[Stage]:
        """Raises NoPlanFits, _Infeasible, MeshError, PlanError."""
        price, highest = PRICES[self.request.objective], PRICES["shard"]
        try:
            return self._stages_at(price)
        except NoPlanFits:
            if self.mesh.tp == 1 or price >= highest:
                raise
        self._stages_at(highest)  # does not fit either: no need to try what lies between
        price = 1e-12
        while price < highest:
            try:
                return self._stages_at(price)
            except NoPlanFits:
                price *= 10  # memory costs more until the plan fits
        return self._stages_at(highest)

    def _stages_at(self, price: float) -> list[Stage]:
        """With a byte of replicated weight at this price."""
        try:
            self.result = self.search.solve(price)
        except ValueError as error:
            raise _Infeasible(str(error)) from error
        self.strategies = self.result.strategies
        return self._cut()

    # -- the pipeline search ---------------------------------------------------------------------------------------

    def _cut(self) -> list[Stage]:
        costs = {op.name: self._op_cost(op) for op in self.graph if op.kind not in SOURCES}
        sends = {
            TensorRef(op.name, j): self._send_seconds(TensorRef(op.name, j))
            for op in self.graph
            for j in range(len(op.outputs))
        }
        weights = {op.name: self._weight_bytes(op) for op in self.graph if op.kind in ("param", "buffer")}
        self.pipeline = PipelineSearch(self.graph, costs, sends, weights)
        cuts, seconds = self.request.cuts, None
        if len(set(self.of_stage)) > 1:
            of_search = {x: {name: self._seconds(x, self.graph[name]) for name in costs} for x in set(self.of_stage)}
            seconds = [of_search[x] for x in self.of_stage]
        return self.pipeline.solve(
            self.mesh.pp,
            self.request.memory_bytes,
            seconds=seconds,
            cuts=cut_positions(self.graph, self.pipeline.sequence, cuts, self.mesh.pp) if cuts else None,
            balance="bytes" if self.request.objective == "memory" else "seconds",
            arrival=self._arrival_seconds,
        )

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
            seconds=self._seconds(self.search, op),
            state_bytes=self._cache_bytes(op),
            repeatable=not (op.mutates or takes_weights or any(strategy.gather)),
        )

    def _seconds(self, search: TensorParallelSearch, op: Op) -> float:
        strategy = self.strategies[op.name]
        return search.compute_seconds(op, strategy) + search.gather_seconds(op, strategy)

    def _weight_bytes(self, op: Op) -> int:
        return self.search.held_bytes(op, self.strategies[op.name])

    def _cache_bytes(self, op: Op) -> int:
        if op.kind != "cache_update":
            return 0
        outs = self.strategies[op.name].outputs
        per_batch = sum(self.search.local(TensorRef(op.name, j), p).nbytes for j, p in enumerate(outs))
        return per_batch * self.request.in_flight

    # -- writing it down -------------------------------------------------------------------------------------------

    def write(self, model: str, fingerprint: str, stages: list[Stage]) -> PartitionPlan:
        self.alternatives = AlternativeCosts(self.search, self.result)
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
            hardware=", ".join(dict.fromkeys(d.name for d in self.request.stage_devices)),
            objective=self.request.objective,
            sizes=tuple(self.lengths.items()),
            ops=ops,
            params=params,
            layouts=tuple(self.interned),
            hops=hops,
            stages=tuple(self._summary(k, stage, computed, hops) for k, stage in enumerate(stages)),
            one_device_seconds=alone,
            device_memory_bytes=max(self.request.memory_bytes or (x.memory_bytes for x in self.request.stage_devices)),
            choices=tuple(self.choices),
            cuts=cut_plans(self.pipeline, stages, lambda ref: self.search.spec(ref).nbytes),
            request=Request(
                self.request.pins,
                self.request.cuts,
                self.request.memory_bytes or (),
                tuple(Device(x.name, x.memory_bytes) for x in self.request.devices),
            ),
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
        role = role_of(op, s.letter)
        weights = [r.op for r in op.inputs if self.graph[r.op].attrs.get("matmul")]
        choice = self.alternatives.of(op)
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
            weight=weights[0] if role and weights else "",
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
                for is_whole, nbytes in self._forms(ref, lambda user: k in computed[user]):  # noqa: B023
                    found.append(Hop(ref.op, ref.index, homes[ref.op], k, 0, is_whole, nbytes))
        found.sort(key=lambda h: (self.pipeline.position[h.op], h.index, h.target, h.whole))
        return tuple(replace(hop, channel=i) for i, hop in enumerate(found))

    def _forms(self, ref: TensorRef, is_there: Callable[[str], bool]) -> list[tuple[bool, int]]:
        """In which forms, (whole, bytes on a tp rank), a stage receives a tensor that ops which are there read."""
        have = self.strategies[ref.op].outputs[ref.index]
        users = self.graph.users.get(ref, ())
        wanted = {self.strategies[user].inputs[slot] for user, slot in users if is_there(user)}
        # as it lies, when all users there want it so; whole, when one wants it whole; both, when some want a sum that
        # is still owed and others the whole
        forms = {p.is_replicate or p != have for p in wanted}
        if forms == {True, False} and not have.is_partial:
            forms = {True}
        return [
            (is_whole, self.search.local(ref, REPLICATE if is_whole else have).nbytes) for is_whole in sorted(forms)
        ]

    def _arrival_seconds(self, k: int, stage: Stage, starts: Sequence[int]) -> float:
        position, again = self.pipeline.position, set(stage.recomputed)

        def is_there(user: str) -> bool:
            return user in again or stage.start <= position[user] < stage.stop

        total = 0.0
        for ref in stage.received:
            link = self.hop_link(bisect_right(starts, position[ref.op]) - 1 if starts else k - 1, k)
            total += sum(send_seconds(nbytes, link) for _, nbytes in self._forms(ref, is_there))
        return total

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
            send_seconds(h.nbytes, self.hop_link(h.source, h.target)) for h in hops if h.target == k
        )
        search = self.of_stage[k]
        return StageSummary(
            index=k,
            layers=self._layers(ops),
            compute_seconds=sum(search.compute_seconds(op, self.strategies[op.name]) for op in ops),
            comm_seconds=sum(search.gather_seconds(op, self.strategies[op.name]) for op in ops) + hop_seconds,
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
        if ref.op in self.graph.fused:
            return 0
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
        """The model unsplit on one device, the fastest (on the whole machine, where ranks share one)."""
        alone = {device.alone(self.mesh.size) for device in self.request.stage_devices}
        return min(_unsplit_seconds(TensorParallelSearch(self.graph, 1, x, self.sizes, self.layouts)) for x in alone)

    def hop_link(self, source: int, target: int) -> Link:
        """Between two stages. Devices of two kinds are in two machines, and talk as the slower of both can."""
        kinds = [self.request.stage_devices[stage] for stage in (source, target)]
        if kinds[0].name == kinds[1].name:
            return kinds[0].hop_link(self.mesh, source, target)
        return min((kind.inter_node for kind in kinds), key=lambda link: link.bandwidth)


def _lengths_of(graph: OpGraph) -> set[str]:
    """B, and those of S, P and E that the graph's sizes or its cache's depend on: an image has no S, and a step of a
    model with a cache of its own is one token."""
    found = {symbol for op in graph for spec in op.outputs for text in spec.symbols for symbol in text.split("*")}
    if any(op.kind == "cache_update" for op in graph):
        found |= {"S", "P"}
    return {"B"} | found & {"S", "P", "E"} | ({"P"} if "T" in found else set())


def all_lengths(sizes: Mapping[str, int]) -> dict[str, int]:
    """B, S, P and E, the total T that S and P make, and the products that merged dims have ("B*S"). A step without S is
    of one token."""
    full = {"S": 1, "P": 0, **sizes}
    full["T"] = full.get("T", full["P"] + full["S"])
    for x in list(full):
        for y in list(full):
            if "*" not in x and "*" not in y:
                full[f"{x}*{y}"] = full[x] * full[y]
    return full


def _unsplit_seconds(search: TensorParallelSearch) -> float:
    """One forward pass with nothing sharded."""
    total = 0.0
    for op in search.graph:
        replicated = (REPLICATE,) * len(op.inputs), (REPLICATE,) * len(op.outputs)
        total += search.compute_seconds(op, Strategy("", *replicated, (False,) * len(op.outputs)))
    return total
