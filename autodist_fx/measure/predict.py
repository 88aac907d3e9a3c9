"""`Forecast`: seconds and bytes of a model's forward, prompt and step on any mesh, from one trace of each graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.compiler.compile import as_used
from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.compiler.examples import planned_graph, traced_once
from autodist_fx.runtime.microbatches.chunked_step import LEAST_TOKENS
from autodist_fx.runtime.microbatches.forecast import by_rows, by_tokens
from autodist_fx.startup.stage_forecast import StageForecast
from autodist_fx.tracing import empty_model
from cost_model.costs.communication import send_seconds
from cost_model.graph.op_graph import OpGraph
from cost_model.partition_plan import PartitionPlan
from cost_model.request.plan_request import PlanRequest
from cost_model.schedule.fill import Filling
from cost_model.search.plan_search import SharedSearches
from cost_model.search.planner import forward_seconds, plan
from passes.op_graph.build import fingerprint
from passes.op_graph.divide_rows import divide_rows
from passes.op_graph.divide_tokens import why_tokens_stay


@dataclass(frozen=True, slots=True)
class Predicted:
    """A prediction: the seconds of a call, and the bytes on the rank of each stage (the fullest of its tp group)."""

    seconds: float
    memory: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Graph:
    """A graph to plan: what searches of it share, and why its work stays in one microbatch ("": it need not)."""

    graph: OpGraph
    shared: SharedSearches
    undivided: str


class Forecast:
    """The predictions of one model; its weights are not looked at."""

    def __init__(self, model: PreTrainedModel | PretrainedConfig) -> None:
        self._model = empty_model(model) if isinstance(model, PretrainedConfig) else model
        self._graphs: dict[bool, _Graph] = {}  # by whether there is a cache

    def forward(self, request: PlanRequest, batch: int, tokens: int) -> Predicted:
        """Predict `model(...)` without a cache, in as many microbatches as it chooses, whose outputs all ranks get:
        those of other stages by messages."""
        made = self._plan(request, {"B": batch, "S": tokens}, use_cache=False)
        graph = self._graphs[False].graph
        lengths = {"B": batch, "S": tokens}
        outputs = [graph.spec(ref).at(lengths).nbytes for ref in graph.outputs]
        pp = request.mesh.pp
        sharing = (pp - 1) * sum(send_seconds(n, request.stage_devices[-1].pp_link) for n in outputs)
        held = [stage.memory_bytes + (sum(outputs) if k < pp - 1 else 0) for k, stage in enumerate(made.stages)]
        sizes = {"B": batch, "S": tokens, "P": 0}
        gain = self._gain(request, made, lambda seconds: by_rows(seconds, sizes), use_cache=False)
        return Predicted(made.predicted_seconds / gain + sharing, tuple(held))

    def step(self, request: PlanRequest, batch: int, tokens: int, past: int) -> Predicted:
        """Predict a step of generating: a prompt where `past` is 0, in as many chunks as it is run in, else one on a
        cache of `past` tokens. The plan is that of a step at the sizes of `request`, as generating runs it."""
        made = self._plan(request, dict(request.sizes), use_cache=True)
        found = self._graphs[True]
        sizes = {"B": batch, "S": tokens, "P": past}
        seconds = forward_seconds(found.graph, made, request, sizes, found.shared)
        if tokens >= 2 * LEAST_TOKENS:
            seconds /= self._gain(
                request, made, lambda stages: by_tokens(stages, sizes, LEAST_TOKENS), use_cache=True
            )
        return Predicted(seconds, tuple(stage.memory_bytes for stage in made.stages))

    def _gain(
        self,
        request: PlanRequest,
        made: PartitionPlan,
        filling: Callable[[StageForecast], Filling],
        *,
        use_cache: bool,
    ) -> float:
        """Return how many times as fast microbatches in flight make the stages; 1.0 where there are none."""
        found = self._graphs[use_cache]
        if request.mesh.pp == 1 or found.undivided:
            return 1.0
        return filling(StageForecast(lambda: found.graph, made, request)).gain

    def _plan(self, request: PlanRequest, sizes: Mapping[str, int], *, use_cache: bool) -> PartitionPlan:
        if use_cache not in self._graphs:
            options = as_used(self._model, CompileOptions()) if use_cache else CompileOptions()
            traced, _ = traced_once(self._model, use_cache, options.input_names, dict(options.concrete_args))
            graph, module = planned_graph(traced), traced.graph_module
            why = why_tokens_stay(module, graph) if use_cache else divide_rows(module, graph).reason
            self._graphs[use_cache] = _Graph(graph, {}, why)
        found = self._graphs[use_cache]
        wanted = replace(request, sizes=tuple(sizes.items()))
        name = type(self._model).__name__
        return plan(
            found.graph, wanted, model=name, fingerprint=fingerprint(found.graph), shared=found.shared, explained=False
        )
