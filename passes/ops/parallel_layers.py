"""Layers that hold a tp rank's share of a weight. They call no collectives, which stand in the graph.

Shapes: b batch, s sequence, i and o the whole layer's inputs and outputs, i/tp and o/tp this rank's share (uneven
shares allowed, also empty ones).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from passes.ops.comm_autograd import OneGradient, OneTerm


class _ParallelLinear(nn.Module):
    """Computes y = x @ weight.T + bias with this rank's share of the weight, [o, i], or [i, o] when `transposed`."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, dtype: torch.dtype, transposed: bool = False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.transposed = in_features, out_features, transposed
        shape = (in_features, out_features) if transposed else (out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta")) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ColumnParallelLinear(_ParallelLinear):
    """A linear with a rank's slice of the outputs: x [b, s, i] -> y [b, s, o/tp]. The bias is sliced with the
    weight."""


class RowParallelLinear(_ParallelLinear):
    """A linear with a rank's slice of the inputs: x [b, s, i/tp] -> y [b, s, o], a sum over ranks still owed.

    Only tp rank 0 has the bias, so that the sum adds it once.
    """


class VocabParallelEmbedding(nn.Module):
    """An embedding with a rank's rows of the table: ids [b, s] -> [b, s, d], zero for rows of other ranks; a sum is
    still owed.

    `intervals` are the rows [start, stop) held, in the order in which they lie in `weight`, of `rows` in the whole
    table. An id outside the whole table is an error, as in nn.Embedding: IndexError on every rank alike, whichever rows
    it holds (on CUDA, where looking at ids would wait for them, the lookup's own, at that end of the table).
    `padding_idx`, of the whole table: the row that gets no gradient.
    """

    def __init__(
        self,
        intervals: Sequence[tuple[int, int]],
        rows: int,
        embedding_dim: int,
        *,
        dtype: torch.dtype,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__()
        self.intervals, self.rows = tuple(intervals), rows
        self.padding_idx = None if padding_idx is None else padding_idx % rows
        self.num_embeddings = sum(stop - start for start, stop in self.intervals)
        self.weight = nn.Parameter(torch.empty(self.num_embeddings, embedding_dim, dtype=dtype, device="meta"))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.device.type == "cpu" and ids.numel():
            lowest, highest = (int(id_) for id_ in torch.aminmax(ids))
            if lowest < 0 or highest >= self.rows:
                raise IndexError(f"ids from {lowest} to {highest}, and the embedding has rows 0 to {self.rows - 1}")
        if self.num_embeddings == 0:
            return self.weight.sum(0).expand(*ids.shape, -1)  # zeros, which backward comes through as elsewhere
        if len(self.intervals) == 1:
            start, stop = self.intervals[0]
            # An id below the first row or above the last is nobody's: left as it is, the lookup refuses it.
            elsewhere = ids < start if stop == self.rows else (ids < start) | (ids >= stop)
            rows = ids - start
            if start > 0:
                rows = rows.clamp_min(0)
            if stop < self.rows:
                rows = rows.clamp_max(stop - start - 1)
        else:
            nobodys = (ids < 0) | (ids >= self.rows)
            rows = torch.where(nobodys, self.num_embeddings, torch.zeros_like(ids))  # which the lookup refuses
            elsewhere, before = torch.ones_like(ids, dtype=torch.bool), 0
            for start, stop in self.intervals:
                inside = (ids >= start) & (ids < stop)
                rows = torch.where(inside, ids - start + before, rows)
                elsewhere = elsewhere & ~inside
                before += stop - start
        found = F.embedding(rows, self.weight, self._local_padding() if torch.is_grad_enabled() else None)
        return found.masked_fill(elsewhere.unsqueeze(-1), 0.0)

    def _local_padding(self) -> int | None:
        """Returns the index of the row of padding in `weight`; None where the rank has it not."""
        before = 0
        for start, stop in self.intervals:
            if self.padding_idx is not None and start <= self.padding_idx < stop:
                return before + self.padding_idx - start
            before += stop - start
        return None

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"intervals={self.intervals}, embedding_dim={self.weight.shape[1]}{padding}"


def partial_mean(
    x: torch.Tensor, dims: Sequence[int], keepdim: bool, cut: int, length: int, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Returns this rank's term of a mean over `dims`, of which `cut` is sharded and `length` long in the whole
    tensor: the sum of its elements over the number of all ranks' elements. Nothing is cut out of the other dims."""
    count = length * math.prod(x.shape[dim] for dim in dims if dim % x.dim() != cut)
    return x.sum(tuple(dims), keepdim=keepdim, dtype=dtype) / count


def one_term(x: torch.Tensor, tp_rank: int) -> torch.Tensor:
    """Returns a whole tensor as a sum that is owed over ranks: rank 0 has it, the others have zeros. Nobody is
    asked."""
    if torch.is_grad_enabled() and x.requires_grad:
        return OneTerm.apply(x, tp_rank)
    return x if tp_rank == 0 else torch.zeros_like(x)


def one_gradient(x: torch.Tensor, tp_rank: int) -> torch.Tensor:
    """Returns `x` itself, for readers that know its whole gradient where each rank is to have a term: rank 0 has it
    all."""
    if torch.is_grad_enabled() and x.requires_grad:
        return OneGradient.apply(x, tp_rank)
    return x
