"""Cases for the proof of the op rules: an op on drawn inputs, whole and on the shares of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

Outputs = tuple[torch.Tensor, ...]


@dataclass
class Share:
    """A rank's share of an op: for each cut dim of each tensor, the elements it holds, ascending."""

    rank: int = 0
    ins: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    outs: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    out_shapes: tuple[tuple[int, ...], ...] = ()
    factor: str = ""


@dataclass
class Case:
    """Inputs, attributes, and the op itself on a share of them (sizes that stand in its arguments are the share's)."""

    inputs: tuple[torch.Tensor, ...]
    run: Callable[[Sequence[torch.Tensor], Share], torch.Tensor | Outputs]
    attrs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, inputs: Sequence[torch.Tensor], share: Share) -> Outputs:
        out = self.run(inputs, share)
        return out if isinstance(out, tuple) else (out,)


CaseMaker = Callable[[st.DataObject], Case]


class Cases(dict[str, CaseMaker]):
    """Makers of cases by kind of op; called with kinds, it is a decorator of a maker for these."""

    def __call__(self, *kinds: str) -> Callable[[CaseMaker], CaseMaker]:
        def register(maker: CaseMaker) -> CaseMaker:
            self.update(dict.fromkeys(kinds, maker))
            return maker

        return register


dims = st.integers(1, 5)
shapes = st.lists(dims, min_size=1, max_size=4)


def values(*shape: int) -> torch.Tensor:
    """Positive, away from 0 and from each other's multiples: fit for log and division, and sorted in one way only."""
    return torch.rand(*shape, dtype=torch.float64) * 2 + 0.1


def broadcast_to_same(data: st.DataObject, count: int) -> list[list[int]]:
    """`count` shapes that broadcast against each other: dims of 1, and leading dims left out; the first is whole."""
    whole = data.draw(shapes)
    found = [whole]
    for _ in range(count - 1):
        start = data.draw(st.integers(0, len(whole) - 1))
        found.append([n if data.draw(st.booleans()) else 1 for n in whole[start:]])
    return found


def picked(x: torch.Tensor, share: Share, head: int, each: int, slot: int, query_slot: int = 0) -> torch.Tensor:
    """The KV heads that the rank's query heads read, one for each query head, out of those that it holds."""
    if (query_slot, head) not in share.ins and (0, head) not in share.outs:
        return x.repeat_interleave(each, head)
    queries = share.ins.get((query_slot, head), share.outs.get((0, head))) if slot else share.outs[0, head]
    held = share.ins.get((slot, head), torch.arange(x.shape[head]))
    return x.index_select(head, torch.searchsorted(held, queries // each))
