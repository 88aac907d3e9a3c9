"""all_reduce and all_gather among the ranks of one machine, over memory that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from autodist_fx.large_memory import empty_large
from autodist_fx.runtime.comm.gather import GatherLayout, glue
from autodist_fx.runtime.comm.shared_memory import SLOT_BYTES, SharedMemory


class SharedCollectives:
    """The collectives of tp rank `rank` among `ranks`. Tensors larger than a slot go in pieces of `slot_bytes`, and
    while one is read the next is written."""

    def __init__(self, memory: SharedMemory, rank: int, ranks: int, slot_bytes: int = SLOT_BYTES) -> None:
        self._memory, self._rank, self._ranks, self.slot_bytes = memory, rank, ranks, slot_bytes

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum, added up in rank order: every rank gets the same bits. x: contiguous; may be written to."""
        if x.requires_grad:
            x = x.detach()
        length, step = x.numel(), self.slot_bytes // x.element_size()
        if length <= step:
            parts = self._memory.exchange_alike(x)
            total = torch.add(parts[0], parts[1])
            for part in parts[2:]:
                total.add_(part)
            return total
        flat = x.view(-1)
        for start in range(0, length, step):
            mine = flat[start : start + step]
            parts = self._memory.exchange(mine, (mine.numel(),) * self._ranks)
            torch.add(parts[0], parts[1], out=mine)
            for part in parts[2:]:
                mine.add_(part)
        return x

    def all_gather(self, x: torch.Tensor, dim: int, layout: GatherLayout) -> torch.Tensor:
        """Return the whole tensor, of which `x` (contiguous) is this rank's shard along `dim`."""
        x, dim = x.detach(), dim % x.dim()
        rows, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
        widths = [size * inner for size in layout.local_sizes]
        row_bytes = max(widths) * x.element_size()
        if rows * row_bytes > self.slot_bytes and layout.in_rank_order and row_bytes <= self.slot_bytes:
            return self._gather_rows(x, dim, layout, rows, widths, self.slot_bytes // row_bytes)
        shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in layout.local_sizes]
        shards = self._shards(x, [rows * width for width in widths])
        return glue([shard.view(shape) for shard, shape in zip(shards, shapes)], dim, layout)

    def _shards(self, x: torch.Tensor, lengths: Sequence[int]) -> Sequence[torch.Tensor]:
        """Return every rank's shard, flat."""
        flat, longest, step = x.view(-1), max(lengths), self.slot_bytes // x.element_size()
        if longest <= step:
            return self._memory.exchange(x, lengths)
        shards = [x.new_empty(length) for length in lengths]
        for start in range(0, longest, step):
            pieces = self._memory.exchange(
                flat[start : start + step], [max(0, min(step, length - start)) for length in lengths]
            )
            for shard, piece in zip(shards, pieces):
                shard[start : start + step] = piece
        return shards

    def _gather_rows(
        self, x: torch.Tensor, dim: int, layout: GatherLayout, rows: int, widths: Sequence[int], step: int
    ) -> torch.Tensor:
        """Return the whole tensor, gathered `step` rows (elements of the dims before `dim`) at a time, each piece
        put straight into its place."""
        whole = empty_large((*x.shape[:dim], sum(layout.local_sizes), *x.shape[dim + 1 :]), x.dtype)
        wide, mine = whole.view(rows, -1), x.view(rows, -1)
        for start in range(0, rows, step):
            count, at = min(step, rows - start), 0
            pieces = self._memory.exchange(mine[start : start + count], [count * width for width in widths])
            for width, piece in zip(widths, pieces):
                wide[start : start + count, at : at + width] = piece.view(count, width)
                at += width
        return whole
