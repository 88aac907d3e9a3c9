"""Ops whose result's size depends on values: which elements of a mask are set, rows dealt out by counts.

The front end writes these in place of torch's own (`nonzero`, `split` by a list of counts), which cannot be run on
meta tensors. Here they can: on meta their lengths are made up, each call its own (`made_up_length`), different at
different example sizes, and equal to no length that anything else in a graph has. So a rank's graph is told apart
from lengths by the rules that hold for all lengths, and no length is ever taken for another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Of made-up lengths: ((numel * _STRIDE + number) * _SHARES + share) * _ROUNDINGS + rounding. All numbers of calls are
# below _STRIDE (a prime).
_STRIDE, _SHARES, _ROUNDINGS = 100_003, 1024, 512


def made_up_length(numel: int, number: int, share: int, multiple_of: int = 1) -> int:
    """Returns a size that says what it was made of: of `numel` elements, one in `share` is expected to be chosen.

    `multiple_of`: what is selected may be as much in each of so many rows, and models view it so.
    """
    length = ((numel * _STRIDE + number % _STRIDE) * _SHARES + min(share, _SHARES - 1)) * _ROUNDINGS
    return length + (-length % multiple_of if 1 < multiple_of <= _ROUNDINGS else 0)


def expectation(length: int) -> tuple[int, int] | None:
    """Returns (numel, share) of a made-up size; None for any other."""
    rest, share = divmod(length // _ROUNDINGS, _SHARES)
    numel = rest // _STRIDE
    return (numel, share) if numel > 0 and share > 0 else None


def piece_length(rows: int, number: int, pieces: int) -> int:
    """Returns the made-up size of one of `pieces` runs of `rows` rows, which may be a made-up number themselves."""
    numel, share = expectation(rows) or (rows, 1)
    return made_up_length(numel, number, share * pieces)


def selected(mask: torch.Tensor, number: int, share: int) -> tuple[torch.Tensor, ...]:
    """Returns torch.where(mask): for each dim of `mask` the coordinates [count], int64, of the elements that are not
    zero.

    `number` is this call's own in its graph; one element in `share` is expected to be chosen.
    """
    if mask.device.type != "meta":
        return torch.where(mask)
    length = made_up_length(mask.numel(), number, share, len(mask) if mask.dim() > 1 else 1)
    return tuple(torch.empty(length, dtype=torch.long, device="meta") for _ in range(mask.dim()))


def split_rows(x: torch.Tensor, counts: torch.Tensor, pieces: int, number: int) -> tuple[torch.Tensor, ...]:
    """Splits `x` [rows, ...] into `pieces` runs of rows: `counts` [pieces], integers, says how many rows each has."""
    if x.device.type != "meta":
        return x.split(counts.tolist())
    return tuple(x.new_empty(piece_length(len(x), number + i, pieces), *x.shape[1:]) for i in range(pieces))


def join_rows(pieces: Sequence[torch.Tensor], rows: int, counts: torch.Tensor) -> torch.Tensor:
    """Concatenates pieces [count, ...] that have `rows` rows together; `counts` [pieces] says how many each has."""
    if pieces[0].device.type != "meta":
        return torch.cat(list(pieces))
    return pieces[0].new_empty(rows, *pieces[0].shape[1:])


def join_own_rows(pieces: Sequence[torch.Tensor], rows: int, counts: torch.Tensor, first: int) -> torch.Tensor:
    """Joins rows where only the pieces from number `first` on are there, as many as are given: zeros for the others."""
    joined = pieces[0].new_zeros(rows, *pieces[0].shape[1:])
    if joined.device.type != "meta":
        own = torch.cat(list(pieces))
        joined.narrow(0, int(counts[:first].sum()), len(own)).copy_(own)
    return joined


def bincount(x: torch.Tensor, bins: int) -> torch.Tensor:
    """Returns how often each of 0 to bins - 1 is in `x`, int64 [bins]; no other number may be."""
    if x.device.type != "meta":
        return torch.bincount(x, minlength=bins)
    return torch.empty(bins, dtype=torch.long, device="meta")
