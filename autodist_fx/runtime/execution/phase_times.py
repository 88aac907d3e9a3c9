"""Measures what a rank spends on a forward pass, a prompt and a step of decoding: each node, waits, Python around them.

Called on every rank alike. Everything is measured twice, without clocks between the nodes and with them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch.fx import Node

from autodist_fx.runtime.execution.timed_graph import MEETING, TimedGraph
from passes.ops import comm

_REPEATS = 3  # of what is measured whole, of which the median counts


class TimedModel(Protocol):
    """The methods of a rank's model that are called here."""

    timed_graphs: Mapping[Any, TimedGraph] | None
    forward: Callable[..., Any]

    def __call__(self, **inputs: Any) -> Any: ...
    def generate(self, **inputs: Any) -> Any: ...
    def time_nodes(self, on: bool) -> None: ...


def phase_times(model: TimedModel, input_ids: torch.Tensor, new_tokens: int) -> dict[str, dict[str, Any]]:
    """Return, for "forward", "prefill" and "decode", what this rank spends, as JSON-ready values in seconds:

    seconds, timed_seconds: a pass or a step by the clock, without and with clocks between the nodes
    program_seconds: of these, the rank's program; model_seconds: what the model's forward takes, where generate runs it
    nodes: [{"ops": the plan's ops that a node stands for, "kind", "seconds", "waiting": in front of a collective}]

    input_ids: int64 [batch, tokens], alike on all ranks. new_tokens: at least 3.
    """
    found = {"forward": _forward_times(model, input_ids)}
    return found | _generation_times(model, input_ids, new_tokens)


def _forward_times(model: TimedModel, input_ids: torch.Tensor) -> dict[str, Any]:
    def forward() -> float:
        return _seconds(lambda: model(input_ids=input_ids, use_cache=False))

    forward()
    seconds = statistics.median(forward() for _ in range(_REPEATS))
    with _Clocks(model) as clocks:
        forward()
        clocks.forget()
        timed = statistics.median(forward() for _ in range(_REPEATS))
        return _phase(seconds, timed, clocks.graphs(), lambda runs: runs, None)


def _generation_times(model: TimedModel, input_ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    mask = torch.ones_like(input_ids)

    def generate(tokens: int) -> float:
        given = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        return _seconds(lambda: model.generate(input_ids=input_ids, attention_mask=mask, **given))

    def both() -> tuple[float, float]:
        """Return the seconds of a prompt and its first token, and of a step after it."""
        prompts, wholes = zip(*((generate(1), generate(new_tokens)) for _ in range(_REPEATS)), strict=True)
        first = statistics.median(prompts)
        return first, (statistics.median(wholes) - first) / (new_tokens - 1)

    generate(2)
    prefill, step = both()
    with _Clocks(model) as clocks:
        generate(2)
        clocks.forget()
        timed_prefill, timed_step = both()
        calls = clocks.calls
        graphs = clocks.graphs()
        steps = {id(run) for runs in _generations(graphs, new_tokens) for run in runs[1:]}
        of_steps = [seconds for number, seconds in enumerate(calls) if number % (new_tokens + 1) > 1]
        of_prompts = [seconds for number, seconds in enumerate(calls) if number % (new_tokens + 1) <= 1]
        return {
            "prefill": _phase(
                prefill, timed_prefill, graphs, lambda runs: [r for r in runs if id(r) not in steps], of_prompts
            ),
            "decode": _phase(step, timed_step, graphs, lambda runs: [r for r in runs if id(r) in steps], of_steps),
        }


def _generations(graphs: Iterable[TimedGraph], new_tokens: int) -> list[list[Any]]:
    """Return the runs of each call of generate that made more than one token, in order; the first is the prompt's."""
    ordered = sorted((run for graph in graphs for run in graph.runs), key=lambda run: run.began)
    size = new_tokens + 1  # one call with one token, one with all
    return [ordered[start + 1 : start + size] for start in range(0, len(ordered), size)]


class _Clocks:
    """Times nodes, and calls of the model's forward, while it is entered."""

    def __init__(self, model: TimedModel) -> None:
        self._model, self.calls = model, list[float]()

    def __enter__(self) -> _Clocks:
        forward = self._model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = forward(*args, **kwargs)
            self.calls.append(time.perf_counter() - began)
            return result

        vars(self._model)["forward"] = timed
        self._model.time_nodes(True)
        return self

    def __exit__(self, *_: object) -> None:
        del vars(self._model)["forward"]
        self._model.time_nodes(False)

    def graphs(self) -> list[TimedGraph]:
        return [*(self._model.timed_graphs or {}).values()]

    def forget(self) -> None:
        """Forget what was measured so far: first runs, which make things."""
        self.calls.clear()
        for graph in self.graphs():
            graph.runs.clear()


def _phase(
    seconds: float,
    timed_seconds: float,
    graphs: Iterable[TimedGraph],
    choose: Callable[[list[Any]], list[Any]],
    calls: list[float] | None,
) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = []
    program = 0.0
    for graph in graphs:
        if not (runs := choose(graph.runs)):
            continue
        medians = [statistics.median(column) / 1e9 for column in zip(*(run.nanoseconds for run in runs), strict=True)]
        program += sum(medians)
        nodes += _nodes(graph, medians)
    return {
        "seconds": seconds,
        "timed_seconds": timed_seconds,
        "program_seconds": program,
        "model_seconds": statistics.median(calls) if calls else None,
        "nodes": nodes,
    }


def _nodes(graph: TimedGraph, seconds: list[float]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    waiting, by_name = 0.0, graph.nodes
    for name, took in zip(graph.names, seconds, strict=True):
        if name.endswith(f" {MEETING}"):
            waiting = took
            continue
        node = by_name[name]
        is_comm = node.op == "call_function" and node.target in comm.COMM_OPS
        ops = [node.all_input_nodes[0].name] if is_comm and node.all_input_nodes else _ops_of(node)
        kind = "weight" if node.op == "get_attr" else graph.kind(node)
        found.append({"ops": ops, "kind": kind, "is_comm": is_comm, "seconds": took, "waiting": waiting})
        waiting = 0.0
    return found


def _ops_of(node: Node) -> list[str]:
    """Return the names of the plan's ops that a node of a bound graph stands for."""
    if node.name.startswith("merged_"):
        parts = next(iter(node.users))
        return [part.name.removeprefix("part_") for part in parts.users]
    return [node.name.removeprefix("fused_")]


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    with torch.no_grad():
        work()
    return time.perf_counter() - began
