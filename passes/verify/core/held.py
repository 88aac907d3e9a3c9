"""Held: what a rank has of a tensor; and op rules read as typing rules over it.

`Held` claims: this rank's tensor is the whole tensor, with the elements `runs` picked along `dim`, in that order. Such
a claim speaks of one rank only. An op keeps it when some factor of its rule runs through all dims that are picked from,
and the same coordinates of the factor are there in all of them: a rank that has rows 0..15 of a weight computes columns
0..15 of the product, whatever other ranks do. Only of a Partial must all ranks be asked (groups.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cost_model.graph.placement import Interval, Layout, Placement
from cost_model.rules.rule import DimLink, Factor, IntArray, OpRule

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """One rank's claim on a tensor: which elements of which dim it has. `dim` is -1 for a whole tensor and for a
    Partial: then its shape is the whole tensor's. Make with `held`.

    `owner` is the tp rank that alone is said to have it, whole; -1 where all ranks have something.
    """

    dim: int = -1
    runs: tuple[Interval, ...] = ()
    partial: bool = False
    owner: int = -1

    @property
    def is_sharded(self) -> bool:
        """Returns whether the rank has some elements of a dim only."""
        return self.dim >= 0

    def local_shape(self, shape: Shape) -> Shape:
        """Returns the shape that a tensor of this whole shape has on the rank."""
        if self.dim < 0:
            return shape
        return (*shape[: self.dim], sum(b - a for a, b in self.runs), *shape[self.dim + 1 :])

    def __str__(self) -> str:
        if self.partial:
            return "a sum that is still owed over tp (P)"
        if self.owner >= 0:
            return f"whole on tp rank {self.owner} alone (O)"
        if self.dim < 0:
            return "whole (R)"
        return f"S({self.dim}) with elements {', '.join(f'{a}:{b}' for a, b in self.runs) or 'none'}"


WHOLE = Held()
PARTIAL = Held(partial=True)


def held(dim: int, runs: Sequence[Interval], size: int) -> Held:
    """Makes a Held in one normal form: runs that follow each other are one, empty ones go, and all elements in order
    are WHOLE."""
    joined: list[Interval] = []
    for start, stop in runs:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    if joined == [(0, size)] and size > 0:
        return WHOLE
    return Held(dim, tuple(joined))


def held_sequence(dim: int, sequence: IntArray, size: int) -> Held:
    """Makes a Held of elements in any order, repetitions allowed."""
    breaks = np.flatnonzero(np.diff(sequence) != 1) + 1
    bounds = [0, *breaks.tolist(), len(sequence)]
    runs = [(int(sequence[a]), int(sequence[b - 1]) + 1) for a, b in pairwise(bounds) if b > a]
    return held(dim, runs, size)


def as_planned(placement: Placement, layout: Layout | None, tp_rank: int) -> Held:
    """Returns the Held that a placement of the plan claims for a rank."""
    if placement.is_partial:
        return PARTIAL
    if placement.is_owned:
        return Held(owner=placement.dim)
    if not placement.is_shard or layout is None:
        return WHOLE
    return held(placement.dim, layout.parts[tp_rank], layout.size)


def elements(value: Held, size: int) -> IntArray:
    """Returns the elements held along `value.dim`, or all `size` of a dim that is not picked from."""
    if value.dim < 0:
        return np.arange(size, dtype=np.int64)
    if not value.runs:
        return np.empty(0, dtype=np.int64)
    return np.concatenate([np.arange(a, b, dtype=np.int64) for a, b in value.runs])


@dataclass(frozen=True, slots=True)
class Derivation:
    """How an op's outputs lie. `factor` is the one that is sharded (None: none), `part` this rank's piece of it."""

    outputs: tuple[Held, ...]
    factor: Factor | None = None
    part: tuple[Interval, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """All derivations that a rule allows (several where a rank holds nothing at all), or why there is none."""

    derivations: tuple[Derivation, ...]
    reason: str = ""


class Judge:
    """Applies op rules as typing rules; remembers every judgement, since the layers and ranks of a model ask the
    same."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Judgement] = {}
        self._rules: list[OpRule] = []  # keeps them alive: their ids are keys

    def __call__(
        self, rule: OpRule, inputs: Sequence[Shape], outputs: Sequence[Shape], types: tuple[Held, ...]
    ) -> Judgement:
        """Judges an op: `inputs` and `outputs` are the shapes of the whole tensors, `types` how its inputs lie."""
        key = (id(rule), types)
        found = self._known.get(key)
        if found is None:
            self._rules.append(rule)
            found = self._known[key] = _judge(rule, inputs, outputs, types)
        return found


def _judge(rule: OpRule, inputs: Sequence[Shape], outputs: Sequence[Shape], types: tuple[Held, ...]) -> Judgement:
    if all(t is WHOLE or t == WHOLE for t in types):
        return Judgement((Derivation((WHOLE,) * len(outputs)),))
    owners = {t.owner for t in types if t.owner >= 0}
    if owners:
        if len(owners) == 1 and all(t == WHOLE or t.owner >= 0 for t in types):
            return Judgement((Derivation((Held(owner=owners.pop()),) * len(outputs)),))
        return Judgement((), "what one rank alone has (O) may only meet what that rank has whole")
    partial = tuple(i for i, t in enumerate(types) if t.partial)
    if partial:
        if partial in rule.linear_in and not any(t.is_sharded for t in types):
            return Judgement((Derivation((PARTIAL,) * len(outputs)),))
        return Judgement((), "it is not linear in what is a sum still owed (P): an all_reduce must come first")
    found, reasons = [], []
    for factor in rule.factors:
        derivation = _follow(factor, inputs, outputs, types)
        if isinstance(derivation, str):
            reasons.append(f"{factor.name}: {derivation}")
        else:
            found.append(derivation)
    shown = "; ".join(reasons[:4]) or "it has no rule, so that it takes whole tensors only"
    return Judgement(tuple(found), f"no factor of its rule allows this ({shown})")


def _follow(
    factor: Factor, inputs: Sequence[Shape], outputs: Sequence[Shape], types: tuple[Held, ...]
) -> Derivation | str:
    """Returns how the outputs of an op lie that is sharded along `factor`, or why it cannot be."""
    links = {link.slot: link for link in factor.inputs}
    for slot, value in enumerate(types):
        if value.is_sharded and (slot not in links or links[slot].dim != value.dim):
            return f"input {slot} is {value}, which the factor does not run through"
    if any(slot >= len(types) for slot in links):
        return "an input is missing"
    touched = [
        _factors_of(link, elements(types[slot], inputs[slot][link.dim]))
        for slot, link in links.items()
        if not link.cover
    ]
    if not touched:
        return "nothing says which part of it is meant"
    part = np.unique(np.concatenate(touched))
    for slot, link in links.items():
        own = elements(types[slot], inputs[slot][link.dim])
        if link.cover:
            if not reads_right(own, link, part):
                return f"input {slot} is {types[slot]}: not the elements that this part reads, in order"
            continue
        if link.pairs is not None:
            own = own[np.isin(own, link.pairs[0])]
        if not np.array_equal(own, _elements_of(link, part)):
            return f"input {slot} is {types[slot]}: other inputs hold another part, or a piece is cut in two"
    out: list[Held | None] = [PARTIAL if factor.reduces else None for _ in outputs]
    for link in factor.outputs:
        size = outputs[link.slot][link.dim]
        out[link.slot] = held_sequence(link.dim, _elements_of(link, part), size)
    if len(part) == factor.size:
        out = [WHOLE if o is None or o.partial else o for o in out]
    if any(o is None for o in out):
        return "an output does not carry the factor"
    return Derivation(tuple(o for o in out if o is not None), factor, held_sequence(0, part, -1).runs)


def _factors_of(link: DimLink, own: IntArray) -> IntArray:
    return own if link.pairs is None else link.pairs[1][np.isin(link.pairs[0], own)]


def _elements_of(link: DimLink, part: IntArray) -> IntArray:
    return part if link.pairs is None else np.unique(link.pairs[0][np.isin(link.pairs[1], part)])


def reads_right(own: IntArray, link: DimLink, part: IntArray) -> bool:
    """Returns whether the elements `own`, each repeated equally often, give what each coordinate in `part` reads."""
    if len(part) == 0:
        return True
    if len(own) == 0 or len(part) % len(own):
        return False
    assert link.pairs is not None
    reads = np.empty(int(link.pairs[1].max()) + 1, dtype=np.int64)
    reads[link.pairs[1]] = link.pairs[0]
    return np.array_equal(np.repeat(own, len(part) // len(own)), reads[part])
