"""`Forecast`: seconds and bytes of a model's forward, prompt and step on any mesh, from one trace of each graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.compiler.compile import as_used
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.examples import planned_graph, traced_once
from autodist_fx.tracing import empty_model
from cost_model.costs.communication import send_seconds
from cost_model.graph.op_graph import OpGraph
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from cost_model.search.plan_search import SharedSearches
from cost_model.search.planner import forward_seconds, plan
from passes.op_graph.build import fingerprint


@dataclass(frozen=True, slots=True)
class Predicted:
    """A prediction: the seconds of a call, and the bytes on the rank of each stage (the fullest of its tp group)."""

    seconds: float
    memory: tuple[int, ...]


class Forecast:
    """The predictions of one model; its weights are not looked at."""

    def __init__(self, model: PreTrainedModel | PretrainedConfig) -> None:
        self._model = empty_model(model) if isinstance(model, PretrainedConfig) else model
        self._graphs: dict[bool, tuple[OpGraph, SharedSearches]] = {}

    def forward(self, request: PlanRequest, batch: int, tokens: int) -> Predicted:
        """Predict `model(...)` without a cache, whose outputs all ranks get: those of other stages by messages."""
        made = self._plan(request, {"B": batch, "S": tokens}, use_cache=False)
        graph, _ = self._graphs[False]
        lengths = {"B": batch, "S": tokens}
        outputs = [graph.spec(ref).at(lengths).nbytes for ref in graph.outputs]
        pp = request.mesh.pp
        sharing = (pp - 1) * sum(send_seconds(n, request.stage_devices[-1].pp_link) for n in outputs)
        held = [stage.memory_bytes + (sum(outputs) if k < pp - 1 else 0) for k, stage in enumerate(made.stages)]
        return Predicted(made.predicted_seconds + sharing, tuple(held))

    def step(self, request: PlanRequest, batch: int, tokens: int, past: int) -> Predicted:
        """Predict a step of generating: a prompt where `past` is 0, else one on a cache of `past` tokens. The plan is
        that of a step at the sizes of `request`, as generating runs it."""
        made = self._plan(request, dict(request.sizes), use_cache=True)
        graph, shared = self._graphs[True]
        sizes = {"B": batch, "S": tokens, "P": past}
        seconds = forward_seconds(graph, made, request, sizes, shared)
        return Predicted(seconds, tuple(stage.memory_bytes for stage in made.stages))

    def _plan(self, request: PlanRequest, sizes: Mapping[str, int], *, use_cache: bool) -> PartitionPlan:
        if use_cache not in self._graphs:
            options = as_used(self._model, CompileOptions()) if use_cache else CompileOptions()
            traced, _ = traced_once(self._model, use_cache, options.input_names, dict(options.concrete_args))
            self._graphs[use_cache] = (planned_graph(traced), {})
        graph, shared = self._graphs[use_cache]
        wanted = replace(request, sizes=tuple(sizes.items()))
        name = type(self._model).__name__
        return plan(graph, wanted, model=name, fingerprint=fingerprint(graph), shared=shared, explained=False)
