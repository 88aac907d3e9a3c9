"""Writes what the searches chose as a PartitionPlan: ops, parameters, hops, and the costs of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cost_model.costs.communication import send_seconds
from cost_model.costs.compute import op_flops
from cost_model.costs.memory import collective_workspace_bytes, peak_activation_bytes, workspace_bytes
from cost_model.format import layer_of
from cost_model.graph.op_graph import Op, TensorRef
from cost_model.graph.placement import Layout, Placement
from cost_model.graph.roles import role_of
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.data import Alternative, Device, Hop, OpPlan, ParamPlan, Request, StageSummary, rounded
from cost_model.plan.missing_rules import missing_rule_warnings, missing_rules
from cost_model.plan.warnings import plan_warnings
from cost_model.search.alternatives import AlternativeCosts
from cost_model.search.cut_options import cut_plans
from cost_model.search.pipeline import Stage
from cost_model.search.plan_search import PlanSearch, unsplit_seconds
from cost_model.search.strategy import exchanged_bytes
from cost_model.search.tensor_parallel import TensorParallelSearch


class PlanWriter:
    """Writes the plan that one PlanSearch chose; `explained`: with the other roles and cuts that it could have."""

    def __init__(self, search: PlanSearch, *, explained: bool = True) -> None:
        self.explained = explained
        self.planned = search
        self.graph, self.mesh, self.request = search.graph, search.mesh, search.request
        self.search, self.strategies, self.pipeline = search.search, search.strategies, search.pipeline
        self.alternatives = AlternativeCosts(search.search, search.result)
        self.interned: dict[Layout, int] = {}
        self.choices: dict[tuple[Alternative, ...], int] = {}

    def write(self, model: str, fingerprint: str, stages: list[Stage]) -> PartitionPlan:
        """Returns the plan with these stages, as `PlanSearch.choose` returned them.

        `model` is the class name of the traced model, `fingerprint` the sha256 of its graph.
        """
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
            sizes=tuple(self.planned.lengths.items()),
            ops=ops,
            params=params,
            layouts=tuple(self.interned),
            hops=hops,
            stages=tuple(self._summary(k, stage, computed, hops) for k, stage in enumerate(stages)),
            one_device_seconds=alone,
            device_memory_bytes=max(self.request.max_memory or (x.memory_bytes for x in self.request.stage_devices)),
            choices=tuple(self.choices),
            cuts=cut_plans(self.pipeline, stages, lambda ref: self.search.spec(ref).nbytes) if self.explained else (),
            request=Request(
                self.request.pin,
                self.request.cuts,
                self.request.max_memory or (),
                tuple(Device(x.name, x.memory_bytes) for x in self.request.devices),
            ),
        )
        missing = missing_rule_warnings(missing_rules(self.graph, plan))
        return replace(plan, warnings=(*plan_warnings(plan), *missing))

    def _layout_index(self, ref: TensorRef, placement: Placement) -> int:
        """Returns the position of a tensor's layout in the plan, which has equal ones once; -1 if it is not sharded."""
        if not placement.is_shard:
            return -1
        layout = self.search.layout(ref, placement)
        assert layout is not None, f"{ref} is {placement} without a layout"
        return self.interned.setdefault(layout, len(self.interned))

    def _op_plan(self, op: Op, home: int, stages: set[int]) -> OpPlan:
        s = self.strategies[op.name]
        role = role_of(op, s.factor)
        weights = [r.op for r in op.inputs if self.graph[r.op].attrs.get("matmul")]
        choice = self.alternatives.of(op) if self.explained else ()
        return OpPlan(
            name=op.name,
            kind=op.kind,
            home=home,
            stages=tuple(sorted(stages)),
            inputs=s.inputs,
            outputs=s.outputs,
            gather=s.gather,
            factor=s.factor,
            role=role,
            module=op.module,
            weight=weights[0] if role and weights else "",
            input_layouts=tuple(self._layout_index(r, p) for r, p in zip(op.inputs, s.inputs, strict=True)),
            output_layouts=tuple(self._layout_index(TensorRef(op.name, j), p) for j, p in enumerate(s.outputs)),
            compute_seconds=rounded(self.search.compute_seconds(op, s)),
            comm_seconds=rounded(self.search.gather_seconds(op, s)),
            comm_bytes=exchanged_bytes(op, s, self.search.spec, self.mesh.tp)
            + sum(self.search.spec(TensorRef(op.name, j)).nbytes for j, whole in enumerate(s.gather) if whole),
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
        """Returns one hop for each (tensor, stage that receives it, whole or not), in the order the tensors are made;
        channels count from 0."""
        found: list[Hop] = []
        for k, stage in enumerate(stages):
            for ref in stage.received:
                for is_whole, nbytes in self.planned.sent_forms(ref, lambda user: k in computed[user]):  # noqa: B023
                    found.append(Hop(ref.op, ref.index, homes[ref.op], k, 0, is_whole, nbytes))
        found.sort(key=lambda h: (self.pipeline.position[h.op], h.index, h.target, h.whole))
        return tuple(replace(hop, channel=i) for i, hop in enumerate(found))

    def _summary(self, k: int, stage: Stage, computed: Mapping[str, set[int]], hops: tuple[Hop, ...]) -> StageSummary:
        """Returns the costs of stage k on its slowest tp rank. `computed`: op -> the stages that compute it."""
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
            if exchanged := exchanged_bytes(op, s, self.search.spec, self.mesh.tp):
                count, nbytes = collectives.get("all_gather", (0, 0))
                collectives["all_gather"] = (count + 1, nbytes + exchanged)
            for j, (placement, gather) in enumerate(zip(s.outputs, s.gather, strict=True)):
                if gather:
                    name = "all_reduce" if placement.is_partial else "all_gather"
                    count, nbytes = collectives.get(name, (0, 0))
                    whole_bytes = self.search.spec(TensorRef(op.name, j)).nbytes
                    collectives[name] = (count + 1, nbytes + whole_bytes)
                    scratch = collective_workspace_bytes(placement, whole_bytes, outs[j].nbytes, self.mesh.tp)
                    workspace = max(workspace, scratch)
        weight_names = {
            ref.op for op in ops for ref in op.inputs if self.graph[ref.op].kind in ("param", "buffer")
        }
        hop_seconds = sum(
            send_seconds(h.nbytes, self.planned.hop_link(h.source, h.target)) for h in hops if h.target == k
        )
        search = self.planned.of_stage[k]
        return StageSummary(
            index=k,
            layers=self._layers(ops),
            compute_seconds=sum(search.compute_seconds(op, self.strategies[op.name]) for op in ops)
            + self.planned.step_seconds(k),
            comm_seconds=sum(search.gather_seconds(op, self.strategies[op.name]) for op in ops) + hop_seconds,
            recomputed=stage.recomputed,
            flops=flops,
            weight_bytes=sum(self.planned.weight_bytes(self.graph[name]) for name in weight_names),
            kv_cache_bytes=sum(self.planned.cache_bytes(op) for op in ops),
            activation_bytes=self._activation_bytes(ops, stage),
            workspace_bytes=workspace,
            collectives=tuple((name, count, nbytes) for name, (count, nbytes) in sorted(collectives.items())),
        )

    def _activation_bytes(self, ops: list[Op], stage: Stage) -> int:
        """Returns the peak bytes of a stage's activations, which live until they are last read, or sent."""
        names = {op.name for op in ops}
        later = {ref for ref in self.graph.outputs if ref.op in names}
        for ref, users in self.graph.users.items():
            if ref.op in names and any(user not in names for user, _ in users):
                later.add(ref)  # sent on
        return peak_activation_bytes(ops, self._held_bytes, later, stage.received)

    def _held_bytes(self, ref: TensorRef) -> int:
        """Returns the bytes of a tensor on one tp rank: as it lies and, where it is gathered, whole beside it."""
        strategy = self.strategies[ref.op]
        if ref.op in self.graph.fused:
            return 0
        nbytes = self.search.local(ref, strategy.outputs[ref.index]).nbytes
        return nbytes + (self.search.spec(ref).nbytes if strategy.gather[ref.index] else 0)

    def _layers(self, ops: list[Op]) -> tuple[str, ...]:
        """Returns the modules, cut behind their first number ("model.layers.3"), of ops that use weights, in order."""
        found: dict[str, None] = {}
        for op in ops:
            weights = [ref.op for ref in op.inputs if self.graph[ref.op].kind == "param"]
            if weights:
                found[layer_of(op.module) or op.module] = None
        return tuple(found)

    def _one_device_seconds(self) -> float:
        """Predicts the seconds of the unsplit model on the fastest device (all of it, where ranks share one)."""
        alone = {device.alone(self.mesh.size) for device in self.request.stage_devices}
        sizes, layouts = self.planned.sizes, self.planned.layouts
        return min(unsplit_seconds(TensorParallelSearch(self.graph, 1, x, sizes, layouts)) for x in alone)

