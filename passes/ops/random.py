"""Random ops whose numbers depend on no mesh: each element's is a function of a seed, a step, an op and a place.

    random_state     int64 [3]: the seed, the step, the row of the whole batch that this call's batch begins with
    a number         Philox 4x32-10, key = the seed, counter = (block of four elements, row, op, step)

A graph's random ops are numbered, the same on every mesh. An element's place is its row (of the whole batch, over all
microbatches and data parallel ranks) and its index among the elements of that row of the whole tensor, whatever part
of these a rank has: so a rank draws its own part alone, and any mesh and any microbatching have the same numbers.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Computed in
int64, which CPU and CUDA have alike: the bits are the same on both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

RANDOM_STATE = "random_state"  # the input of graphs that have random ops

Interval = tuple[int, int]
# (dim, outer, inner): rows of the batch lie along `dim`, whose elements are [outer, rows, inner]. None: no dim has them
Row = tuple[int, int, int]
# (dim, size, intervals): of the `size` elements of `dim` the tensor at hand has these alone. None: it has all
Cut = tuple[int, int, Sequence[Interval]]

_MULTIPLIERS, _WEYL = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)  # Salmon et al., section 3.3, table 2
_ROUNDS, _WORD = 10, 0xFFFFFFFF
LANES = 4  # words that one counter gives
MOST_OPS = 2**16  # in a graph: the upper half of the counter's third word belongs to the block
# Counters at a time: their words stay in a core's cache; a GPU is given as many as keep it busy.
_CHUNK_OF_CORE, _CHUNK_OF_GPU = 2**14, 2**22


def random_state(
    seed: int = 0, step: int = 0, first_row: int = 0, device: torch.device | str | None = None
) -> torch.Tensor:
    """Returns the input `random_state` of a graph: int64 [3], of `seed` (below 2**63), `step` and `first_row` (below
    2**32).

    `first_row` is where in the whole batch the rows of this call begin: 0 for one that is not cut into microbatches.
    Raises ValueError for numbers out of bounds.
    """
    for name, value, bits in (("seed", seed, 63), ("step", step, 32), ("first_row", first_row, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} is {value}: it is 0 or more, and less than 2**{bits}")
    return torch.tensor([seed, step, first_row], dtype=torch.int64, device=device)


def philox_4x32(counter: Sequence[torch.Tensor], seed: torch.Tensor) -> list[torch.Tensor]:
    """Returns four words for each counter: int64 tensors of one shape, each element below 2**32.

    `counter` are four int64 tensors of one shape, below 2**32, and are overwritten; `seed` is an int64 of no dims, its
    lower half the first word of the key.
    """
    c0, c1, c2, c3 = counter
    t0, t1 = torch.empty_like(c0), torch.empty_like(c0)
    for k0, k1 in zip(_keys(seed, _WEYL[0]), _keys(seed >> 32, _WEYL[1]), strict=True):
        torch.mul(c0, _MULTIPLIERS[0], out=t0)  # up to 2**64, which wraps: the bits are those of the product
        torch.mul(c2, _MULTIPLIERS[1], out=t1)
        torch.bitwise_right_shift(t1, 32, out=c0)
        torch.bitwise_right_shift(t0, 32, out=c2)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, t1, c3, t0 = t1, c1, t0, c3  # their upper halves are cut off where they are read
    return [c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)]


def _keys(word: torch.Tensor, weyl: int) -> Sequence[torch.Tensor]:
    """Returns a key's word in each round."""
    rounds = torch.arange(_ROUNDS, dtype=torch.int64, device=word.device)
    return ((word & _WORD) + rounds * weyl).bitwise_and_(_WORD).unbind()


# -- what graphs call --------------------------------------------------------------------------------------------------


def seeded_dropout(
    x: torch.Tensor, random_state: torch.Tensor, op: int, p: float, drawn: int, row: Row | None, cut: Cut | None = None
) -> torch.Tensor:
    """Returns x with elements set to zero, each with probability `p`, and the others times 1 / (1 - p).

    `op` is this op's number in the graph. The first `drawn` dims of x have a draw for each of their elements, which
    holds for all that lies in the dims behind them (dropout of whole channels). For `row` and `cut` see above.
    """
    if p >= 1:
        return x * 0.0
    keep = keep_mask(random_state, op, p, x.shape[:drawn], row, cut, x.device)
    return torch.where(keep.reshape(*keep.shape, *(1,) * (x.dim() - drawn)), x * (1.0 / (1.0 - p)), 0.0)


def keep_mask(
    random_state: torch.Tensor,
    op: int,
    p: float,
    shape: Sequence[int],
    row: Row | None = None,
    cut: Cut | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Returns bool [*shape]: False with probability `p`, to within 2**-33. `shape` is of the part that `cut` names."""
    mask = torch.empty(tuple(shape), dtype=torch.bool, device=device or random_state.device)
    threshold = round(p * 2**32)
    return _fill(mask, random_state, op, row, cut, lambda word, out: torch.ge(word, threshold, out=out))


def seeded_uniform(
    random_state: torch.Tensor,
    op: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    low: float = 0.0,
    high: float = 1.0,
    row: Row | None = None,
) -> torch.Tensor:
    """Returns a floating-point tensor [*shape] of numbers from `low` up to, and without, `high`, on the device of
    `random_state`; multiples of 2**-b of the way, b the number of bits that `dtype` has for a fraction, at most 32."""
    bits = min(32, 1 - round(math.log2(torch.finfo(dtype).eps)))  # 24 of a float32, 8 of a bfloat16, as torch.rand

    def place(word: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_((word >> (32 - bits)) * 2.0**-bits)

    drawn = torch.empty(tuple(shape), dtype=dtype, device=random_state.device)
    drawn = _fill(drawn, random_state, op, row, None, place)
    return drawn if (low, high) == (0.0, 1.0) else drawn * (high - low) + low


# -- places ------------------------------------------------------------------------------------------------------------


class _Lines(NamedTuple):
    """The places of a tensor's elements: the last dim is a line, cut into blocks of four; int64, one a line or a
    block."""

    rows: torch.Tensor  # [lines]: the row of this call's batch
    before: torch.Tensor  # [lines]: blocks of that row in front of the line
    blocks: torch.Tensor  # [blocks]: which blocks of a line are there, in part at least
    lanes: torch.Tensor | slice  # which elements of these blocks are there
    most: int  # blocks in a row of the whole tensor


def _fill(
    out: torch.Tensor,
    random_state: torch.Tensor,
    op: int,
    row: Row | None,
    cut: Cut | None,
    place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Fills `out`: place(words, target) writes what a tensor of words makes into `target`. On meta nothing is done."""
    if out.device.type == "meta" or out.numel() == 0:
        return out
    if not 0 <= op < MOST_OPS:
        raise ValueError(f"random op number {op}: a graph has up to {MOST_OPS}")
    lines = _lines(tuple(out.shape), row, cut if cut is not None and cut[0] < out.dim() else None, out.device)
    if lines.most > 2**48:
        raise ValueError(f"a random op over {lines.most * LANES} elements a row: up to {2**48 * LANES} are told apart")
    seed, step, first_row = random_state.unbind()
    rows = lines.rows if row is None else (lines.rows + first_row) & _WORD
    target = out.view(len(rows), -1)
    length = len(lines.blocks)
    chunk = _CHUNK_OF_CORE * torch.get_num_threads() if out.device.type == "cpu" else _CHUNK_OF_GPU
    at_once = max(1, chunk // length)
    for start in range(0, len(rows), at_once):
        of_chunk = slice(start, start + at_once)
        block = lines.before[of_chunk, None] + lines.blocks
        third = torch.full_like(block, op)
        if lines.most > 2**32:
            third += (block >> 32) << 16
            block &= _WORD
        counter = block, rows[of_chunk, None].expand_as(block).contiguous(), third, torch.empty_like(block).copy_(step)
        words = philox_4x32(counter, seed)
        drawn = out.new_empty(*block.shape, LANES)
        for lane, word in enumerate(words):
            place(word, drawn[..., lane])
        target[of_chunk] = drawn.view(len(block), -1)[:, lines.lanes]
    return out


def _lines(shape: tuple[int, ...], row: Row | None, cut: Cut | None, device: torch.device) -> _Lines:
    """Returns the places of a tensor's elements; one dim is added where rows lie along the last, or there is none."""
    if not shape or (row is not None and row[0] == len(shape) - 1):
        shape = (*shape, 1)
    rows = before = torch.zeros(1, dtype=torch.int64, device=device)
    most = 1
    for dim, size in enumerate(shape[:-1]):
        places, whole = _places(dim, size, cut, device)
        of_row = torch.zeros_like(places)
        if row is not None and row[0] == dim:
            _, outer, inner = row
            count = whole // (outer * inner)
            of_row = places // inner % count
            places, whole = places // (inner * count) * inner + places % inner, outer * inner
        rows = (rows[:, None] + of_row).reshape(-1)
        before = (before[:, None] * whole + places).reshape(-1)
        most *= whole
    places, whole = _places(len(shape) - 1, shape[-1], cut, device)
    a_line = -(-whole // LANES)
    blocks, lanes = _blocks(places, len(shape) - 1, cut)
    return _Lines(rows, before * a_line, blocks, lanes, most * a_line)


def _places(dim: int, size: int, cut: Cut | None, device: torch.device) -> tuple[torch.Tensor, int]:
    """Returns (which elements of the whole dim are there, int64 [size], how many the whole dim has)."""
    if cut is None or cut[0] != dim:
        return torch.arange(size, device=device), size
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in cut[2]]), cut[1]


def _blocks(places: torch.Tensor, dim: int, cut: Cut | None) -> tuple[torch.Tensor, torch.Tensor | slice]:
    """Returns (the blocks that a line's elements lie in, where among these blocks' elements they are)."""
    runs = [(0, len(places))] if cut is None or cut[0] != dim else [run for run in cut[2] if run[1] > run[0]]
    if len(runs) == 1:
        start, stop = runs[0]
        first = start // LANES
        return torch.arange(first, -(-stop // LANES), device=places.device), slice(
            start - first * LANES, stop - first * LANES
        )
    blocks, at = torch.unique(places // LANES, return_inverse=True)
    return blocks, at * LANES + places % LANES
