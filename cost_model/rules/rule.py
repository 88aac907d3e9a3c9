"""An op rule as data, and the factors that many rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class DimLink:
    """One dim of one tensor of the op, and how its elements belong to the factor's.

    `pairs` is two arrays (elements of the dim, elements of the factor) of equal length, or None for the identity.
    `cover` marks the dim of a tensor that is read through a repetition (the KV heads of grouped attention): where it
    has too few elements to be dealt out, a rank holds each element that its part of the factor reads, so that an
    element may live on several ranks.
    """

    slot: int
    dim: int
    pairs: tuple[IntArray, IntArray] | None = None
    cover: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """A coordinate of `size` elements that runs through dims of inputs and outputs, as a factor of Shardy's sharding
    rules does: the op may be sharded along it. `reduces`: outputs without it are sums over it.

    `alternatives` names a group of factors that use the same dim in different ways (the pieces of a split view): only
    one of the group can be in force, and the outermost that no op blocks is taken.

    `filled`: every rank must have some element of it, since torch refuses an op on nothing.
    """

    name: str
    size: int
    inputs: tuple[DimLink, ...]
    outputs: tuple[DimLink, ...]
    reduces: bool = False
    alternatives: str = ""
    filled: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class OpRule:
    """All factors of one op, and which sets of inputs may be Partial together so that the outputs are Partial."""

    factors: tuple[Factor, ...] = ()
    linear_in: tuple[tuple[int, ...], ...] = ()


Shape = tuple[int, ...]
RuleFunction = Callable[[Sequence[Shape], Sequence[Shape], Mapping[str, Any]], OpRule]


def passing(in_slot: int, out_slot: int, shape: Shape, in_dim: int, out_dim: int, name: str = "") -> Factor:
    """A dim that goes through unchanged."""
    return Factor(name or f"d{out_dim}", shape[in_dim], (DimLink(in_slot, in_dim),), (DimLink(out_slot, out_dim),))


def broadcast_factors(inputs: Sequence[Shape], out: Shape) -> tuple[Factor, ...]:
    factors = []
    for dim, size in enumerate(out):
        links = []
        for slot, shape in enumerate(inputs):
            own = dim - (len(out) - len(shape))
            if own >= 0 and shape[own] == size:
                links.append(DimLink(slot, own))
        if links:
            factors.append(Factor(f"d{dim}", size, tuple(links), (DimLink(0, dim),)))
    return tuple(factors)


def repeat_pairs(groups: int, size: int) -> tuple[IntArray, IntArray]:
    factor = np.arange(size, dtype=np.int64)
    return factor // (size // groups), factor
