"""The tensor-parallel search on small graphs, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cost_model.costs.communication import all_gather_seconds, all_reduce_seconds
from cost_model.costs.compute import op_seconds
from cost_model.costs.hardware import Hardware
from cost_model.graph.op_graph import OpGraph, TensorRef
from cost_model.graph.placement import REPLICATE, Placement
from cost_model.search.prediction_sizes import all_lengths
from cost_model.search.strategy import Strategy
from cost_model.search.tensor_parallel import TensorParallelSearch
from tests.support.graphs.small import Attention, Ids, Mlp, Stack


def read_seconds(have: Placement, whole: bool, want: Placement, hardware: Hardware) -> float:
    """Returns the cost of reading a tensor as `want`: nothing as it lies, a slice of a whole one, infinity else."""
    if have == want:
        return 0.0
    if want.kind == "P" or not (have.kind == "R" or whole):
        return math.inf
    return hardware.op_seconds if want.kind == "S" else 0.0


def own_seconds(search: TensorParallelSearch, name: str, s: Strategy, price: float) -> float:
    op = search.graph[name]
    ins = tuple(search.local(ref, p) for ref, p in zip(op.inputs, s.inputs))
    outs = tuple(search.local(TensorRef(name, j), p) for j, p in enumerate(s.outputs))
    seconds = op_seconds(op, ins, outs, search.hardware)
    for j, (placement, gathered) in enumerate(zip(s.outputs, s.gather)):
        if gathered:
            of_kind = all_reduce_seconds if placement.kind == "P" else all_gather_seconds
            seconds += of_kind(search.spec(TensorRef(name, j)).nbytes, search.tp, search.hardware.tp_link)
    seconds += price * search.excess_bytes(op, s)
    return seconds + 1e-9 * sum(p.kind == "P" for p in s.inputs)  # a sum still owed as an input loses a tie


def anything_cheaper(search: TensorParallelSearch, price: float, bound: float) -> dict[str, Strategy] | None:
    """An assignment that costs less than `bound`, if there is one: every combination is tried whose ops so far cost
    less (costs are never negative)."""
    graph = search.graph
    names = [op.name for op in graph]
    domains = {op.name: [(own_seconds(search, op.name, s, price), s) for s in search.domain(op)] for op in graph}
    chosen: dict[str, Strategy] = {}

    def reading(ref: TensorRef, want: Placement) -> float:
        producer = chosen[ref.op]
        return read_seconds(producer.outputs[ref.index], producer.gather[ref.index], want, search.hardware)

    def go(at: int, cost: float) -> bool:
        if at == len(names):
            return True
        name = names[at]
        for own, strategy in domains[name]:
            chosen[name] = strategy
            total = cost + own + sum(reading(r, p) for r, p in zip(graph[name].inputs, strategy.inputs))
            total += sum(reading(ref, REPLICATE) for ref in graph.outputs if ref.op == name)
            if total < bound and go(at + 1, total):
                return True
        chosen.pop(name, None)
        return False

    return chosen if go(0, 0.0) else None


def assert_optimal(search: TensorParallelSearch, price: float) -> None:
    result = search.solve(price)
    graph, cost = search.graph, 0.0
    for op in graph:
        s = result.strategies[op.name]
        assert s in search.domain(op)
        cost += own_seconds(search, op.name, s, price)
        for ref, want in zip(op.inputs, s.inputs):
            producer = result.strategies[ref.op]
            cost += read_seconds(producer.outputs[ref.index], producer.gather[ref.index], want, search.hardware)
    for ref in graph.outputs:
        producer = result.strategies[ref.op]
        cost += read_seconds(producer.outputs[ref.index], producer.gather[ref.index], REPLICATE, search.hardware)
    assert result.cost == pytest.approx(cost, rel=1e-9)
    assert anything_cheaper(search, price, result.cost * (1 - 1e-9)) is None
    assert anything_cheaper(search, price, result.cost * (1 + 1e-9)) is not None, "the trial itself finds nothing"


class Gated(nn.Module):
    """gate and up in one product, cut in two afterwards"""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 12, bias=False), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        both = self.both(x).chunk(2, -1)
        return {"y": self.down(torch.sigmoid(both[0]) * both[1]), "kept": both[0]}


class Squared(nn.Module):
    """a product of a tensor with itself: its op reads one tensor in two ways"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.up(x).unflatten(-1, (4, 4))
        return {"y": self.down(torch.matmul(a, a).flatten(-2))}


class Parallel(nn.Module):
    """two branches whose sums are added, as attention and MLP of some models are"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gate, self.out = nn.Linear(8, 6), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.down(torch.relu(self.up(x))) * 0.5 + self.out(torch.sigmoid(self.gate(x)))}
SMALL: dict[str, tuple[nn.Module, dict[str, object]]] = {
    "mlp": (Mlp(), {"x": ("B", "S", 8)}),
    "large mlp": (Mlp(256, 1024, bias=False), {"x": ("B", "S", 256)}),
    "gated": (Gated(), {"x": ("B", "S", 8)}),
    "squared": (Squared(), {"x": ("B", "S", 8)}),
    "parallel": (Parallel(), {"x": ("B", "S", 8)}),
    "attention": (Attention(12, 4, 2, 3), {"x": ("B", "S", 12)}),
    "fused attention": (Attention(12, 3, 3, 4, "thirds"), {"x": ("B", "S", 12)}),
    "vocabulary": (Stack([Mlp(8, 12, bias=False)], 8, vocab=11, tied=True), {"x": Ids("B", "S")}),
}


def search_of(graph: OpGraph, tp: int, hardware: Hardware) -> TensorParallelSearch:
    return TensorParallelSearch(graph, tp, hardware, all_lengths({"B": 2, "S": 64}))
