"""Costs of roles that a plan did not choose: equal to trying everything, and in words where there is none."""

from __future__ import annotations

import numpy as np
import pytest

import autodist_fx as adx
from cost_model.costs.hardware import A100, CPU_GLOO
from cost_model.graph.op_graph import Op, TensorRef
from cost_model.graph.roles import role_of
from cost_model.search.alternatives import AlternativeCosts
from cost_model.search.strategy import Strategy
from cost_model.search.tensor_parallel import TensorParallelSearch
from tests.support.graphs.searches import SMALL, anything_cheaper, own_seconds, read_seconds, search_of
from tests.support.graphs.small import Attention, Ids, Mlp, Stack, op_graph_of
from tests.support.models import tiny_config
from tests.support.moe import SIZES


class Restricted(TensorParallelSearch):
    """The same search with one op held to some of its strategies."""

    def __init__(self, search: TensorParallelSearch, name: str, allowed: list[Strategy]) -> None:
        super().__init__(search.graph, search.tp, search.hardware, search.sizes, search.layouts)
        self.name, self.allowed = name, allowed

    def domain(self, op: Op) -> list[Strategy]:
        return self.allowed if op.name == self.name else super().domain(op)


def seconds_of(search: TensorParallelSearch, strategies: dict[str, Strategy]) -> float:
    """Returns the seconds of all ops and of what they read, by the formulas of the other test."""
    total = 0.0
    for op in search.graph:
        s = strategies[op.name]
        total += own_seconds(search, op.name, s, 0.0) - 1e-9 * sum(p.kind == "P" for p in s.inputs)
        for ref, want in zip(op.inputs, s.inputs):
            producer = strategies[ref.op]
            total += read_seconds(producer.outputs[ref.index], producer.gather[ref.index], want, search.hardware)
    return total


def weights_of(search: TensorParallelSearch, strategies: dict[str, Strategy]) -> int:
    params = (op.name for op in search.graph if op.kind == "param")
    return sum(search.local(TensorRef(name), strategies[name].outputs[0]).nbytes for name in params)


# (attention has too many combinations: three minutes, tried once and right)
@pytest.mark.parametrize("price", [0.0, 1e-6])
@pytest.mark.parametrize("name", ["mlp", "large mlp", "parallel", "gated"])
def test_alternatives_equal_trying_all_strategies(name: str, price: float) -> None:
    module, inputs = SMALL[name]
    search = search_of(op_graph_of(module, **inputs), 2, A100 if name == "parallel" else CPU_GLOO)
    result = search.solve(price)
    costs = AlternativeCosts(search, result)
    checked = 0
    for op in search.graph:
        own = role_of(op, result.strategies[op.name].factor)
        for alternative in costs.of(op):
            values = [k for k, s in enumerate(search.domain(op)) if role_of(op, s.factor) == alternative.role]
            restricted = Restricted(search, op.name, [search.domain(op)[k] for k in values])
            if alternative.impossible:
                assert not values or anything_cheaper(restricted, price, np.inf) is None
                continue
            dearer = min(result.elimination.dearer_by(op.name)[k] for k in values)
            assert (dearer == 0) >= (alternative.role == own)
            bound = result.cost + dearer
            assert anything_cheaper(restricted, price, bound * (1 - 1e-9)) is None
            found = anything_cheaper(restricted, price, bound * (1 + 1e-9))
            assert found is not None
            # seconds and bytes are those of an assignment that costs so much
            best = min(values, key=lambda k: result.elimination.dearer_by(op.name)[k])
            changes = result.elimination.forced(op.name, best)
            forced = {**result.strategies, **{n: result.domains[n][k] for n, k in changes.items()}}
            seconds = seconds_of(search, forced) - seconds_of(search, dict(result.strategies))
            assert alternative.seconds == pytest.approx(seconds, rel=6e-3, abs=1e-12)
            assert alternative.weight_bytes == weights_of(search, forced) - weights_of(search, dict(result.strategies))
            checked += alternative.role != own
    assert checked >= 3


def test_a_column_becomes_a_row_at_the_price_of_collectives() -> None:
    graph = op_graph_of(Stack([Mlp(64, 256) for _ in range(7)], 64, 50), x=Ids("B", "S"))
    search = search_of(graph, 2, CPU_GLOO)
    costs = AlternativeCosts(search, search.solve(1e-6))
    of_layers = [costs.of(op) for op in graph if op.kind == "linear" and "up" in op.module]
    assert len(of_layers) == 7 and len(set(of_layers[2:5])) == 1, "equal layers share their alternatives"
    column, *others = of_layers[3]
    assert (column.role, column.seconds, column.weight_bytes) == ("column", 0.0, 0)
    assert {a.role for a in others} == {"row", "replicate"}
    whole = next(a for a in others if a.role == "replicate")
    assert whole.weight_bytes >= 256 * 64 * 8 // 2


def reasons(plan: adx.PartitionPlan, suffix: str) -> dict[str, str]:
    op = next(op for op in plan.ops if op.module.endswith(suffix))
    return {a.role: a.impossible for a in plan.alternatives(op) if a.impossible}


def test_one_head_cannot_be_cut() -> None:
    graph = op_graph_of(Attention(12, 1, 1, 4), x=("B", "S", 12))
    search = search_of(graph, 2, CPU_GLOO)
    found = AlternativeCosts(search, search.solve(1e-6)).of(graph["q"])
    assert [a.impossible for a in found if a.role == "column"] == [
        "no grain to cut: its 4 elements belong together (one head, say) and every rank reads all"
    ]


def test_a_router_is_whole() -> None:
    plan = adx.compile(tiny_config("mixtral", **SIZES), tp=2, hardware="cpu-gloo", verify=False).plan
    why = reasons(plan, ".gate")  # of block_sparse_moe, or on transformers 5 of mlp
    assert set(why) == {"column", "row"}
    assert all("router" in text for text in why.values())
