"""Layers that run several times on the same weights: their runs are treated alike where the search gets too wide."""

from __future__ import annotations

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


def test_runs_are_one_choice_where_all_combinations_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, x = normalized(Loop(), x=("B", "S", 8)), torch.randn(2, 5, 8, dtype=torch.float64)
    exact = plan_for(whole, 2)
    for limit in (2**7, 2**6, 2**5, 2**4):  # narrower, until the exact search is too wide
        monkeypatch.setattr(elimination, "MOST_ENTRIES", limit)
        try:
            plan = plan_for(whole, 2)
        except PlanError as error:
            assert "too many to try" in str(error)
            break
        assert [op.outputs for op in plan.ops] == [op.outputs for op in exact.ops]
        assert_split_equals_whole(whole, plan, {"x": x})
    else:
        pytest.fail("no limit was too small")
