"""Glues the shards of one dim back together: what both communicators do with the tensors of an all_gather."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.channels import Channel
from passes.ops.comm import Parts

# From so many bytes per rank on, an all_gather goes in chunks: one is put in its place while the next is on its way,
# and the buffer they arrive in stays in cache. Measured with 2 ranks, the logits of 4 x 128 tokens (32 MB each): 68 ms
# in chunks of 2 MB, 88 in one piece.
CHUNKED_BYTES = 4 * 1024 * 1024
CHUNK_BYTES = 2 * 1024 * 1024

FrozenParts = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True, slots=True)
class GatherLayout:
    """The meaning of `parts` for the bytes: the sizes of the shards, and where each element of the whole comes from."""

    local_sizes: tuple[int, ...]  # elements that each rank holds along the dim
    in_rank_order: bool  # the shards, one after the other, are the whole
    even: bool  # in_rank_order, and all of one size
    pieces: tuple[tuple[int, int, int], ...]  # (rank, start in its shard, elements), in the order of the whole


@functools.lru_cache(maxsize=4096)
def gather_layout(parts: FrozenParts) -> GatherLayout:
    """Return where each element of the whole comes from; of an element that several ranks hold, from the first of them.

    Raises CommunicationError where no rank holds an element.
    """
    size = max((stop for part in parts for _, stop in part), default=0)
    local_sizes = tuple(sum(stop - start for start, stop in part) for part in parts)
    flat = [interval for part in parts for interval in part if interval[1] > interval[0]]
    in_rank_order = sum(local_sizes) == size and all(a[1] == b[0] for a, b in itertools.pairwise(flat))
    edges = sorted({0} | {edge for interval in flat for edge in interval})
    pieces: list[tuple[int, int, int]] = []
    for start, stop in itertools.pairwise(edges):  # each either wholly in an interval or wholly outside of it
        rank, local = _first_holder(parts, start)
        if pieces and pieces[-1][0] == rank and pieces[-1][1] + pieces[-1][2] == local:
            pieces[-1] = (rank, pieces[-1][1], pieces[-1][2] + stop - start)
        else:
            pieces.append((rank, local, stop - start))
    return GatherLayout(
        local_sizes=local_sizes,
        in_rank_order=in_rank_order,
        even=in_rank_order and len(set(local_sizes)) == 1,
        pieces=tuple(pieces),
    )


def _first_holder(parts: FrozenParts, index: int) -> tuple[int, int]:
    """Return (rank, index in its shard) of an element of the whole."""
    for rank, part in enumerate(parts):
        before = 0
        for start, stop in part:
            if start <= index < stop:
                return rank, before + index - start
            before += stop - start
    raise CommunicationError(f"all_gather of parts {parts}: no rank holds element {index}")


def frozen_parts(parts: Parts) -> FrozenParts:
    """Return `parts` as tuples: what fx hands over may be lists of its own."""
    try:
        hash(parts)
    except TypeError:
        return tuple(tuple((start, stop) for start, stop in part) for part in parts)
    return parts  # type: ignore[return-value]


def glue(shards: Sequence[torch.Tensor], dim: int, layout: GatherLayout) -> torch.Tensor:
    """Return the whole tensor, from each rank's shard of it."""
    if layout.in_rank_order:
        return torch.cat(list(shards), dim)
    return torch.cat([shards[rank].narrow(dim, start, length) for rank, start, length in layout.pieces], dim)


def check_shard(x: torch.Tensor, dim: int, layout: GatherLayout, tp_rank: int) -> None:
    """Raise CommunicationError when `x` does not have the size of the rank's part."""
    if x.shape[dim] != layout.local_sizes[tp_rank]:
        raise CommunicationError(
            f"all_gather along dim {dim}: tp rank {tp_rank} holds {layout.local_sizes[tp_rank]} elements by its parts, "
            f"and its tensor has shape {list(x.shape)}"
        )


def gather_in_chunks(
    group: Any,
    tp_rank: int,
    x: torch.Tensor,
    dim: int,
    layout: GatherLayout,
    chunk_bytes: int,
    wait: Callable[[Sequence[tuple[int, Any]]], None],
) -> tuple[torch.Tensor, list[Any]]:
    """Return (the whole tensor, the sends under way), gathered a few rows (elements of the dims before `dim`) at a
    time: one chunk is put in its place while the next is on its way.

    `group` is torch's, of the ranks that have `x`; `wait` waits for receives, each with the rank that sends.
    """
    sizes, peers = layout.local_sizes, [rank for rank in range(len(layout.local_sizes)) if rank != tp_rank]
    rows, inner = math.prod(x.shape[:dim]), math.prod(x.shape[dim + 1 :])
    whole = x.new_empty(with_size(x.shape, dim, sum(sizes)))
    wide, mine = whole.view(rows, -1), x.view(rows, -1)
    step = max(1, chunk_bytes // (max(sizes) * inner * x.element_size()))  # the same on all ranks
    chunks = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    sends = [
        group.send([mine[start:stop]], peer, Channel.TP_EXCHANGE)
        for start, stop in chunks
        for peer in peers
        if mine.shape[1]
    ]
    starts = [sum(sizes[:rank]) * inner for rank in range(len(sizes))]
    senders = [rank for rank in peers if sizes[rank]]
    buffers = [{rank: x.new_empty(step, sizes[rank] * inner) for rank in senders} for _ in range(2)]

    def receive(number: int) -> list[tuple[int, Any]]:
        start, stop = chunks[number]
        into = buffers[number % 2]
        return [(rank, group.recv([into[rank][: stop - start]], rank, Channel.TP_EXCHANGE)) for rank in senders]

    awaited = receive(0)
    wide[:, starts[tp_rank] : starts[tp_rank] + mine.shape[1]] = mine
    for number, (start, stop) in enumerate(chunks):
        arriving, awaited = awaited, receive(number + 1) if number + 1 < len(chunks) else []
        wait(arriving)
        for rank in senders:
            wide[start:stop, starts[rank] : starts[rank] + sizes[rank] * inner] = buffers[number % 2][rank][
                : stop - start
            ]
    return whole, sends


def with_size(shape: Sequence[int], dim: int, size: int) -> tuple[int, ...]:
    """Return a shape with another size of one dim."""
    sizes = list(shape)
    sizes[dim] = size
    return tuple(sizes)


def gather_padded(group: Any, x: torch.Tensor, dim: int, layout: GatherLayout) -> list[torch.Tensor]:
    """Return every rank's shard by one all_gather, which wants one size: shorter shards travel with padding."""
    shapes = [with_size(x.shape, dim, size) for size in layout.local_sizes]
    lengths = [math.prod(shape) for shape in shapes]
    longest = max(lengths)
    if x.numel() == longest:
        mine = x.view(-1)
    else:
        mine = x.new_empty(longest)
        mine[: x.numel()] = x.view(-1)
    everything = x.new_empty(len(shapes) * longest)
    group._allgather_base(everything, mine).wait()
    rows = everything.view(len(shapes), longest)
    return [rows[rank, :length].view(shape) for rank, (length, shape) in enumerate(zip(lengths, shapes, strict=True))]


def describe(x: torch.Tensor) -> str:
    """Format a tensor as dtype and shape: float32[2, 8]."""
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
