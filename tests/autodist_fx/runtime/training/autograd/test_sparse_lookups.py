"""Gradients of lookups that are kept as rows: they add up to the dense ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autodist_fx.runtime.training.autograd.sparse_lookups import SparseLookups
from autodist_fx.runtime.training.gradient_buckets import GradientBuckets

IDS = torch.tensor([[3, 0, 3], [1, 5, 3]])


class Alone:
    """The communicator of one replica."""

    def start_all_reduce(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        return lambda: x


def gradient(table: nn.Parameter, *, tied: bool, **options: object) -> torch.Tensor:
    found = F.embedding(IDS, table, padding_idx=0, **options)
    scores = found @ table.T if tied else found
    return torch.autograd.grad((scores * torch.arange(scores.numel()).view(scores.shape)).sum(), [table])[0]


@pytest.mark.parametrize("tied", [False, True])
def test_microbatches_add_up_as_dense_gradients_do(tied: bool) -> None:
    table = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    dense = gradient(table, tied=tied)
    with SparseLookups():
        rows = gradient(table, tied=tied)
    assert rows.is_sparse != tied, "what a product gives is dense, and so is the sum with it"
    buckets = GradientBuckets([table])
    for _ in range(2):  # steps: what the one before left is forgotten
        buckets.begin()
        with buckets.taking(Alone()):  # type: ignore[arg-type]
            for given in (rows, dense, rows):
                buckets.add(table, given)
        total = buckets.whole(Alone())[id(table)]  # type: ignore[arg-type]
        torch.testing.assert_close(total, 3 * dense, rtol=0, atol=1e-12)


def test_lookups_whose_gradients_depend_on_how_often_stay_dense() -> None:
    table = nn.Parameter(torch.randn(6, 4))
    with SparseLookups():
        assert not gradient(table, tied=False, scale_grad_by_freq=True).is_sparse
        computed = (table * 2).requires_grad_()
        grown = torch.autograd.grad(F.embedding(IDS, computed).sum(), [table])[0]  # through what the table is made of
    torch.testing.assert_close(grown, 2 * torch.bincount(IDS.flatten(), minlength=6).float()[:, None].expand(6, 4))
