"""Runs both searches for one request: placements of all ops, then cuts, at a price of memory with which they fit."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace

from cost_model.costs.communication import send_seconds
from cost_model.costs.hardware import Hardware, Link
from cost_model.errors import NoPlanFits, PlanError
from cost_model.graph.op_graph import SOURCES, Op, OpGraph, TensorRef
from cost_model.graph.placement import REPLICATE
from cost_model.graph.roles import EXPERT
from cost_model.layouts.layout_table import LayoutTable
from cost_model.request.cuts import cut_positions
from cost_model.request.like_plan import cuts_like, roles_like
from cost_model.request.pins import roles_by_pin
from cost_model.request.plan_request import PRICES, PlanRequest
from cost_model.search.alternatives import refuse_impossible_roles
from cost_model.search.pipeline import OpCost, PipelineSearch, Stage
from cost_model.search.prediction_sizes import DECODE_SIZES, FORWARD_SIZES, SOURCE_SIZE, all_lengths, lengths_of
from cost_model.search.strategy import Strategy, exchanged_bytes
from cost_model.search.tensor_parallel import TensorParallelSearch

STEP_MESSAGE_BYTES = 256  # what tells a rank of a step: numbers and token ids (runtime/generation/step_messages.py)

# Tensor-parallel searches by all that they depend on but the graph, so that several plans of one graph share them.
SharedSearches = dict[tuple[object, ...], TensorParallelSearch]


class Infeasible(PlanError):
    """The tensor-parallel search has no solution."""


class PlanSearch:
    """The two searches behind one plan for `request`.

    After `choose`, `result`, `strategies` (by op) and `pipeline` are those that its stages were found with.
    Raises PlanError for pins that name no op or contradict each other, or that an op cannot have.
    """

    def __init__(self, graph: OpGraph, request: PlanRequest, shared: SharedSearches) -> None:
        self.graph = graph
        self.request = request
        self.mesh = request.mesh
        present = lengths_of(graph)
        wanted = {**(DECODE_SIZES if "P" in present else FORWARD_SIZES), "E": SOURCE_SIZE, **dict(request.sizes)}
        self.lengths = {symbol: n for symbol, n in wanted.items() if symbol in present}
        self.sizes = all_lengths(self.lengths)
        followed = roles_like(graph, request.like) if request.like is not None else {}
        self.roles = {**followed, **roles_by_pin(graph, request.pin)}  # op -> the role that it must have
        self.of_stage = [self._search(device, shared) for device in request.stage_devices]
        # One sharding for all stages, chosen for the device that the whole model takes longest on.
        self.search = max(dict.fromkeys(self.of_stage), key=unsplit_seconds) if request.devices else self.of_stage[0]
        self.hardware = self.search.hardware
        self.layouts = self.search.layouts

    def _search(self, device: Hardware, shared: SharedSearches) -> TensorParallelSearch:
        """Returns the tensor-parallel search on a device, from `shared` if it was made already."""
        at_once = self.request.ranks_at_once or self.mesh.tp
        on_mesh = replace(device, tp_link=device.tp_link_on(self.mesh)).computing(at_once)
        fixed = (self.mesh.tp, tuple(self.sizes.items()), tuple(self.roles.items()))
        key = (*fixed, on_mesh)
        if key not in shared:
            tp = self.mesh.tp
            layouts = next((x.layouts for x in shared.values() if x.tp == tp), None) or LayoutTable(self.graph, tp)
            shared[key] = TensorParallelSearch(self.graph, tp, on_mesh, self.sizes, layouts, self.roles)
            refuse_impossible_roles(shared[key])
        return shared[key]

    def choose(self) -> list[Stage]:
        """Chooses strategies and cuts; returns the stages.

        The objective's price of memory is tried first. Where its plan does not fit, the price of a replicated byte is
        raised in steps of 10 until the plan fits, at most to that of "shard".
        Raises NoPlanFits (at no price), Infeasible (no strategies agree), MeshError (no such cuts), PlanError.
        """
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
        """Runs both searches at a price, in seconds, of a byte of weight held beyond an even share."""
        try:
            self.result = self.search.solve(price)
        except ValueError as error:
            raise Infeasible(str(error)) from error
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
        weights = {op.name: self.weight_bytes(op) for op in self.graph if op.kind in ("param", "buffer")}
        self.pipeline = PipelineSearch(self.graph, costs, sends, weights, self.sizes)
        cuts, seconds = self.request.cuts, None
        if len(set(self.of_stage)) > 1:
            of_search = {x: {name: self._seconds(x, self.graph[name]) for name in costs} for x in set(self.of_stage)}
            seconds = [of_search[x] for x in self.of_stage]
        positions = None
        if self.request.like is not None and self.mesh.pp > 1:
            positions = cuts_like(self.graph, self.pipeline.sequence, self.request.like)
        elif cuts:
            positions = cut_positions(self.graph, self.pipeline.sequence, cuts, self.mesh.pp)
        return self.pipeline.solve(
            self.mesh.pp,
            self.request.max_memory,
            seconds=seconds,
            cuts=positions,
            balance="bytes" if self.request.objective == "memory" else "seconds",
            arrival=self._arrival_seconds,
        )

    def _arrival_seconds(self, k: int, stage: Stage, starts: Sequence[int]) -> float:
        """Returns the seconds in which stage k receives its tensors (pipeline.Arrival)."""
        position, again = self.pipeline.position, set(stage.recomputed)

        def is_there(user: str) -> bool:
            return user in again or stage.start <= position[user] < stage.stop

        total = 0.0
        for ref in stage.received:
            link = self.hop_link(bisect_right(starts, position[ref.op]) - 1 if starts else k - 1, k)
            total += sum(send_seconds(nbytes, link) for _, nbytes in self.sent_forms(ref, is_there))
        return total

    def sent_forms(self, ref: TensorRef, is_there: Callable[[str], bool]) -> list[tuple[bool, int]]:
        """Returns the placements in which a stage receives `ref`, each as (is it whole?, bytes on a tp rank).

        `is_there(op)` is True for the ops of the stage. A tensor that is not sent whole is sent as it lies.
        """
        have = self.strategies[ref.op].outputs[ref.index]
        users = self.graph.users.get(ref, ())
        wanted = {self.strategies[user].inputs[slot] for user, slot in users if is_there(user)}
        # As it lies if all readers want it so; whole if one wants it whole; both if some want a sum that is still owed
        # and others the whole, since a rank can cut its shard out of the whole, but not its summand.
        forms = {p.is_replicate or p != have for p in wanted}
        if forms == {True, False} and not have.is_partial:
            forms = {True}
        return [
            (is_whole, self.search.local(ref, REPLICATE if is_whole else have).nbytes) for is_whole in sorted(forms)
        ]

    def _send_seconds(self, ref: TensorRef) -> float:
        """Returns the seconds to hand one tensor to another stage, at both ends: one launches the send, one the recv.

        Where the receiver cannot tell a length from the model's inputs, the shape is sent ahead: 8 bytes a dim.
        """
        if self.strategies[ref.op].factor == EXPERT and not self.strategies[ref.op].gather[ref.index]:
            return math.inf  # a layer's experts are one stage's: each rank has its own of them
        spec, link = self.search.spec(ref), self.hardware.pp_link
        told = any(symbol.startswith("?") for symbol in self.graph.spec(ref).symbols)
        ahead = send_seconds(8 * len(spec.shape), link) + link.launch_seconds if told else 0.0
        return ahead + send_seconds(spec.nbytes, link) + link.launch_seconds

    def _op_cost(self, op: Op) -> OpCost:
        strategy = self.strategies[op.name]
        stays = any(self.graph[ref.op].kind == "param" or ref.op in self.graph.state for ref in op.inputs)
        return OpCost(
            seconds=self._seconds(self.search, op),
            state_bytes=self.cache_bytes(op),
            repeatable=not (op.mutates or stays or any(strategy.gather) or self._exchanges(op)),
        )

    def _exchanges(self, op: Op) -> bool:
        return exchanged_bytes(op, self.strategies[op.name], self.search.spec, self.search.tp) > 0

    def _seconds(self, search: TensorParallelSearch, op: Op) -> float:
        strategy = self.strategies[op.name]
        return search.compute_seconds(op, strategy) + search.gather_seconds(op, strategy)

    def weight_bytes(self, op: Op) -> int:
        """Returns the bytes of a parameter or buffer on the fullest tp rank."""
        return self.search.held_bytes(op, self.strategies[op.name])

    def cache_bytes(self, op: Op) -> int:
        """Returns the bytes of KV cache that an op keeps on the fullest tp rank, for all micro-batches in flight."""
        if op.kind != "cache_update":
            return 0
        outs = self.strategies[op.name].outputs
        per_batch = sum(self.search.local(TensorRef(op.name, j), p).nbytes for j, p in enumerate(outs))
        return per_batch * self.request.in_flight

    def step_seconds(self, stage: int) -> float:
        """Returns what a step of generating takes beside its graph, on the stage that leads it: the loop, telling the
        other ranks, and, where nothing is cached, what comes before a first step. 0.0 on other stages, in models that
        do not generate, and where it was not measured."""
        device = self.of_stage[stage].hardware
        if stage != self.mesh.pp - 1 or device.measured is None or "P" not in self.lengths:
            return 0.0
        told = send_seconds(STEP_MESSAGE_BYTES, device.pp_link) if self.mesh.size > 1 else 0.0
        start = 0.0 if self.lengths["P"] else device.measured.start_seconds
        return device.measured.step_seconds + start + told

    def hop_link(self, source: int, target: int) -> Link:
        """Returns the link between two stages; for devices of two kinds, in two machines, the slower one's."""
        kinds = [self.request.stage_devices[stage] for stage in (source, target)]
        if kinds[0].name == kinds[1].name:
            return kinds[0].hop_link(self.mesh, source, target)
        return min((kind.inter_node for kind in kinds), key=lambda link: link.bandwidth)


def unsplit_seconds(search: TensorParallelSearch) -> float:
    """Predicts the seconds of one forward with nothing sharded."""
    total = 0.0
    for op in search.graph:
        replicated = (REPLICATE,) * len(op.inputs), (REPLICATE,) * len(op.outputs)
        total += search.compute_seconds(op, Strategy("", *replicated, (False,) * len(op.outputs)))
    return total
