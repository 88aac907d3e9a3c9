"""Op rules as data, their text, and factors that many rules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]  # one dim: element numbers, or tp ranks


@dataclass(frozen=True, slots=True, eq=False)
class DimLink:
    """A dim of one of the op's tensors, number `slot`, that a factor runs through, and how their elements correspond.

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
    """A coordinate of `size` elements that runs through dims of inputs and outputs, like a letter of an einsum or a
    factor of Shardy: the op may be sharded along it. `reduces`: outputs without it are sums over it.

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


Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class OpRule:
    """The rule of one op: its factors, and `linear_in`, the sets of inputs which, Partial together, make the outputs
    Partial.

    `inputs` and `outputs` are the shapes that it was made for; the table of rules sets them.
    """

    factors: tuple[Factor, ...] = ()
    linear_in: tuple[tuple[int, ...], ...] = ()
    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()

    def __str__(self) -> str:
        """Formats the rule like an einsum: `[d0 d1 row], [column row], [column] -> [d0 d1 column]  {sum: row}` is a
        linear with a bias.

        Tensors are in brackets, dims in order; `()` stands for no tensors. A dim is

            name      a factor          5         so many elements that are never cut
            (a b)     a times b elements, `a` the outer: pieces of a dim that a view splits or merges
            a[2:6]    elements 2 to 5 of factor `a`: a piece of what is concatenated or split
            a@2:6     elements 2 to 5 of this dim are factor `a`, the rest belongs to none: a slice; a@0:6:2 has a step
            a/3       each element goes with three of `a` in a row: KV heads that groups of query heads share
            a*        elements go with those of `a` in an order of their own

        Behind it, in braces, what else holds: `sum`: outputs without these factors are sums over them, hence Partial;
        `one of`: at most one of these is in force; `not empty`: every rank needs some element of these; `linear`: where
        these inputs are Partial, the outputs are ("0 or 1": each alone, "0 and 1": only both together).
        """
        before = ", ".join(self._tensor_text(slot, shape, "inputs") for slot, shape in enumerate(self.inputs)) or "()"
        after = ", ".join(self._tensor_text(slot, shape, "outputs") for slot, shape in enumerate(self.outputs)) or "()"
        groups = dict.fromkeys(f.alternatives for f in self.factors if f.alternatives)
        notes = {
            "sum": " ".join(f.name for f in self.factors if f.reduces),
            "one of": ", ".join(" ".join(f.name for f in self.factors if f.alternatives == g) for g in groups),
            "not empty": " ".join(f.name for f in self.factors if f.filled),
            "linear": " or ".join(" and ".join(map(str, slots)) for slots in self.linear_in),
        }
        said = "; ".join(f"{name}: {text}" for name, text in notes.items() if text)
        return f"{before} -> {after}" + (f"  {{{said}}}" if said else "")

    def _tensor_text(self, slot: int, shape: Shape, side: Literal["inputs", "outputs"]) -> str:
        dims = []
        for dim, size in enumerate(shape):
            links = [
                (factor, link)
                for factor in self.factors
                for link in (factor.inputs if side == "inputs" else factor.outputs)
                if (link.slot, link.dim) == (slot, dim)
            ]
            dims.append(_dim_text(size, links))
        return f"[{' '.join(dims)}]"


def _dim_text(size: int, links: Sequence[tuple[Factor, DimLink]]) -> str:
    if not links:
        return str(size)
    if len(links) > 1:  # several factors are all pieces of the dim, the outermost first
        return f"({' '.join(factor.name for factor, _ in links)})"
    factor, link = links[0]
    return factor.name if link.pairs is None else _pairs_text(factor, size, link.pairs)


def _pairs_text(factor: Factor, size: int, pairs: tuple[IntArray, IntArray]) -> str:
    """Formats how the elements of a dim of `size`, pairs[0], go with those of its factor, pairs[1]."""
    own, of_factor = pairs
    start, other = (int(x[0]) if len(x) else 0 for x in (own, of_factor))
    counted = np.arange(len(own))
    if len(own) == size and np.array_equal(own, counted) and np.array_equal(of_factor, counted + other):
        return f"{factor.name}[{other}:{other + size}]"
    if np.array_equal(of_factor, counted):
        step = int(own[1]) - start if len(own) > 1 else 1
        if step > 0 and np.array_equal(own, start + step * counted):
            last = start + step * (len(own) - 1) + 1
            return f"{factor.name}@{start}:{last}" + (f":{step}" if step > 1 else "")
        if np.array_equal(own, counted * size // len(own)):
            return f"{factor.name}/{len(own) // size}"
    inner = int(np.argmax(of_factor != other)) if factor.size > 1 else size
    if inner and np.array_equal(own, np.arange(size)) and np.array_equal(of_factor, own // inner % factor.size):
        outer = size // inner // factor.size
        pieces = [str(outer)] * (outer > 1) + [factor.name] + [str(inner)] * (inner > 1)
        return f"({' '.join(pieces)})"
    return f"{factor.name}*"


RuleFunction = Callable[[Sequence[Shape], Sequence[Shape], Mapping[str, Any]], OpRule]


def passing(in_slot: int, out_slot: int, shape: Shape, in_dim: int, out_dim: int, name: str = "") -> Factor:
    """Returns the factor of a dim that goes through unchanged, from `in_dim` of an input to `out_dim` of an output."""
    return Factor(name or f"d{out_dim}", shape[in_dim], (DimLink(in_slot, in_dim),), (DimLink(out_slot, out_dim),))


def broadcast_factors(inputs: Sequence[Shape], out: Shape) -> tuple[Factor, ...]:
    """Returns the factors of inputs that torch broadcasts to shape `out`: one for each output dim that some input has
    in full. Dims of size 1 that are expanded belong to no factor."""
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
    """Returns the pairs of a dim of `groups` elements, each of which goes with size / groups of a factor in a row."""
    factor = np.arange(size, dtype=np.int64)
    return factor // (size // groups), factor
