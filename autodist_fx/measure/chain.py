"""A chain of nodes in a GraphModule, and the seconds of one of them: what the runtime pays for an op.

    def forward(self, x0, w0, x1, w1, ...):
        linear = torch._C._nn.linear(x0, w0);  x0 = w0 = None
        linear_1 = torch._C._nn.linear(x1, w1);  linear = x1 = w1 = None
        ...
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate
from torch.optim import Optimizer
from transformers import Cache

from autodist_fx.runtime.device import cuda

_CHAIN_SECONDS = 3e-3  # of a chain, where its nodes are short: far more than reading a clock takes
_LONGEST = 64  # nodes
_LONG_SECONDS = 0.1  # of a node that is run as seldom as can be
_LAUNCH_FACTOR = 2.0  # of what launching a chain takes: how long a GPU is kept busy meanwhile
_REPEATS = ((0.03, 7), (0.15, 3), (float("inf"), 1))  # (seconds of a chain up to which, how often it is run)


class Call(NamedTuple):
    """One node: a function, and its arguments, tensors and caches among them."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}


MakeCall = Callable[[], Call]


@dataclass(frozen=True, slots=True)
class Effort:
    """How a chain is measured: its nodes, and how often it is run. Alike on all ranks."""

    nodes: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Clock:
    """Times what runs on a device; `start` waits for the ranks that measure at the same time."""

    device: torch.device
    start: Callable[[], None]

    def seconds(self, work: Callable[[], object]) -> float:
        """Return the seconds of `work`, to the end of what it started."""
        self.start()
        self.finish()
        began = time.perf_counter()
        work()
        self.finish()
        return time.perf_counter() - began

    def finish(self) -> None:
        """Wait for what the device was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def effort_for(make: MakeCall, clock: Clock) -> Effort:
    """Return how to measure a node, from what one of it takes."""
    seconds = min(_runs(make, clock, Effort(1, 1)))
    if seconds < _LONG_SECONDS:  # in the first runs libraries choose their kernels, a GPU takes memory
        seconds = min(_runs(make, clock, Effort(1, 4)))
    nodes = min(max(1, round(_CHAIN_SECONDS / seconds)), _LONGEST)
    return Effort(nodes, next(repeats for most, repeats in _REPEATS if nodes * seconds <= most))


def node_seconds(make: MakeCall, clock: Clock, effort: Effort) -> float:
    """Return the median seconds of a node of a chain."""
    return statistics.median(_runs(make, clock, effort))


def device_seconds(make: MakeCall, clock: Clock, effort: Effort) -> float:
    """Return the median seconds that a GPU takes for a node, without what launching it takes the host: all nodes of a
    chain are launched while it is busy with something else."""
    launched = statistics.median(_runs(make, clock, effort)) * effort.nodes
    chain: Any = _chain([make() for _ in range(effort.nodes)])
    means = []
    for _ in range(effort.repeats):
        given = [x for _ in range(effort.nodes) for x in _inputs(make())]
        clock.start()
        work = functools.partial(chain, *given)
        means.append(cuda.queued_seconds(work, clock.device, _LAUNCH_FACTOR * launched) / effort.nodes)
    return statistics.median(means)


def _runs(make: MakeCall, clock: Clock, effort: Effort) -> list[float]:
    """Return a node's seconds in each run of a chain. Each has tensors of its own, made before the clock runs."""
    chain: Any = _chain([make() for _ in range(effort.nodes)])
    means = []
    for _ in range(effort.repeats):
        given = [x for _ in range(effort.nodes) for x in _inputs(make())]
        means.append(clock.seconds(functools.partial(chain, *given)) / effort.nodes)
    return means


def _is_input(x: object) -> bool:
    return isinstance(x, torch.Tensor | Cache | Optimizer)


def _inputs(call: Call) -> list[Any]:
    found: list[Any] = []
    map_aggregate((call.args, call.kwargs), lambda x: found.append(x) if _is_input(x) else None)
    return found


def _chain(calls: list[Call]) -> GraphModule:
    """Return a module that takes the tensors of all calls, in order, and makes the calls."""
    graph = Graph()
    inputs = iter([graph.placeholder(f"x{i}") for i in range(sum(len(_inputs(call)) for call in calls))])
    last: Node | None = None
    for call in calls:
        args, kwargs = map_aggregate((call.args, call.kwargs), lambda x: next(inputs) if _is_input(x) else x)
        last = graph.call_function(call.function, args, kwargs)
    graph.output(last)
    return GraphModule(torch.nn.Module(), graph)
