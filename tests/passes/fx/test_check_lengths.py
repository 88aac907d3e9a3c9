"""check_lengths: two sizes that are alike at both examples by chance are found at others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from cost_model.errors import AmbiguousLengthsError
from passes.fx.shape_propagation import Example
from passes.normalize.pipeline import normalize
from tests.support.graphs.small import traced


class Chunked(nn.Module):
    """Counts what its last chunk of 4 lacks, from 1 to 4, and one more than there are chunks."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        n = x.shape[0]
        lacking = x.new_ones(4 - n % 4)
        chunks = x.new_ones((n + 3) // 4 + 1)
        return {"lacking": lacking * 2, "chunks": chunks.view((n + 3) // 4 + 1, 1)}


def example(n: int) -> Example:
    return Example({"x": torch.empty(n, device="meta")}, {"B": n})


def test_sizes_that_are_alike_by_chance() -> None:
    before = traced(Chunked())
    with pytest.raises(AmbiguousLengthsError, match=r"B.: 3"):
        normalize(copy.deepcopy(before), (example(2), example(5)), [example(3)])  # 2 and 3, twice


def test_sizes_that_differ_at_the_examples() -> None:
    before = traced(Chunked())
    after = normalize(copy.deepcopy(before), (example(7), example(24)), [example(n) for n in (2, 3, 5)])
    for n in range(1, 20):
        x = torch.ones(n)
        found, expected = after(x=x), before(x=x)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_lengths_at_which_the_graph_does_not_run_are_not_asked() -> None:
    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": x.view(x.shape[0] // 4, 4) * 2}

    after = normalize(traced(Whole()), (example(8), example(20)), [example(9), example(12)])
    assert after(x=torch.ones(16))["y"].shape == (4, 4)
