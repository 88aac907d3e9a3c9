"""Layers that run several times on the same weights: their runs are treated alike where the search gets too wide."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cost_model.errors import PlanError
from cost_model.graph.repeated_ops import repeated_ops
from cost_model.search import elimination
from cost_model.search.elimination import Elimination, TooWideError
from tests.support.graphs.small import assert_split_equals_whole, normalized, op_graph_of, plan_for


class Loop(nn.Module):
    """Two layers, three times."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for _ in range(3):
            x = x + self.down(torch.relu(self.up(x)))
        return {"y": x}


def test_runs_on_the_same_weights_are_found() -> None:
    found = repeated_ops(op_graph_of(Loop(), x=("B", "S", 8)))
    assert found == {"up_1": "up", "up_2": "up", "down_1": "down", "down_2": "down"}


def test_a_table_that_is_too_large_is_refused() -> None:
    """Each of ten variables with ten choices has a say in all others."""
    names = [f"v{i}" for i in range(10)]
    pairs = {(a, b): np.ones((10, 10)) for i, a in enumerate(names) for b in names[i + 1 :]}
    with pytest.raises(TooWideError, match="9 others"):
        Elimination({name: np.zeros(10) for name in names}, pairs)


def test_what_ties_most_others_together_falls_back_on_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is the cheapest of all that go with it."""
    monkeypatch.setattr(elimination, "MOST_ENTRIES_OF_SOME", 2**6)
    random, names = np.random.default_rng(0), [f"v{i}" for i in range(6)]
    unary = {name: random.random(3) for name in names}
    pairs = {(a, b): random.random((3, 3)) for i, a in enumerate(names) for b in names[i + 1 :]}
    found = Elimination(unary, pairs, {name: 1 for name in names[1:]})
    assert len(found.given_up) == 3 and set(found.given_up.values()) == {1} and "v0" not in found.given_up

    def cost(choice: dict[str, int]) -> float:
        alone = sum(unary[v][choice[v]] for v in names)
        return alone + sum(table[choice[u], choice[v]] for (u, v), table in pairs.items())

    ways = [dict(zip(names, ks, strict=True)) for ks in itertools.product(range(3), repeat=6)]
    allowed = [way for way in ways if way.items() >= found.given_up.items()]
    assert found.choice == min(allowed, key=cost)
    assert found.cost == pytest.approx(cost(found.choice))
    for v in names:
        for k, dearer in enumerate(found.dearer_by(v)):
            least = min((cost(way) for way in allowed if way[v] == k), default=np.inf)
            assert dearer == pytest.approx(least - found.cost)


def test_runs_are_one_choice_where_all_combinations_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where these are too many, too, ops without weights are kept whole."""
    whole, x = normalized(Loop(), x=("B", "S", 8)), torch.randn(2, 5, 8, dtype=torch.float64)
    exact, as_exact = plan_for(whole, 2), []
    for limit in (2**8, 2**7, 2**5, 2**3):  # narrower, until the search is too wide with ops whole, too
        monkeypatch.setattr(elimination, "MOST_ENTRIES", limit)
        monkeypatch.setattr(elimination, "MOST_ENTRIES_OF_SOME", limit)
        try:
            plan = plan_for(whole, 2)
        except PlanError as error:
            assert "too many to try" in str(error)
            break
        as_exact.append([op.outputs for op in plan.ops] == [op.outputs for op in exact.ops])
        assert_split_equals_whole(whole, plan, {"x": x})
    else:
        pytest.fail("no limit was too small")
    assert as_exact == [True, False, False]
