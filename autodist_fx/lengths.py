"""Example lengths for a graph that is right for one call: at all of them the model's code goes the way that it goes there.

A graph is traced and normalised at two choices of lengths, and serves all lengths for which Python decides alike. For a
call at which it decides otherwise (passes/conditions.py) both choices are made anew, so that each condition known so far
comes out as for that call. Where no two lengths do that, or none are found, the length is fixed: a number in the graph.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from autodist_fx.tracing import InputForm
from passes.conditions import Conditions

Lengths = dict[str, int]  # by letter: "B", "S", "P", "T", "E", "K"
_NAMES = {"B": "sequences", "S": "tokens", "P": "tokens cached", "E": "what the encoder reads", "K": "positions"}
_MOST_TRIED = 40_000  # of one choice of fixed lengths
_MOST_PAIRED = 300
_NEAR = 40  # how far from a length, or a number in a condition, others are tried
_SMALL = 64
_LARGEST = 2**20


def lengths_of(forms: Mapping[str, InputForm], inputs: Mapping[str, Any], past: int) -> Lengths:
    """The lengths of a call, whose `inputs` have these forms, with `past` tokens in the cache."""
    found: Lengths = {"P": past}
    for name, form in forms.items():
        value = inputs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == len(form.dims):
            found |= {dim: n for dim, n in zip(form.dims, value.shape, strict=True) if isinstance(dim, str)}
    return with_total(found)


def with_total(lengths: Lengths) -> Lengths:
    """T is P and S."""
    return {**lengths, "T": lengths["P"] + lengths["S"]} if "S" in lengths and "P" in lengths else lengths


def another_way(model: str, lengths: Mapping[str, int], lines: Sequence[str]) -> str:
    """Words for an error."""
    said = ", ".join(f"{_NAMES[letter]}: {n}" for letter, n in lengths.items() if letter in _NAMES)
    return f"for these lengths ({said}) {model}'s code goes another way at {' and '.join(lines)} than it was traced with"


def examples_like(
    known: Sequence[Conditions],
    lengths: Mapping[str, int],
    usual: tuple[Lengths, Lengths],
    points: frozenset[int] = frozenset(),
    fixed_anyway: frozenset[str] = frozenset(),
    smallest: Mapping[str, int] | None = None,
) -> tuple[Lengths, Lengths, Lengths]:
    """(first, second, fixed): two choices of lengths at which each of the `known` conditions comes out as at `lengths`;
    those in `fixed` are numbers, the same in both.

    `usual`: what they are where no condition asks for them. `points`: numbers that lengths are divided by. Only lengths
    that are given are fixed; `fixed_anyway` names some.
    """
    wanted = [conditions.answers(lengths) for conditions in known]
    letters = {letter for conditions in known for letter in conditions.letters} | ({"S", "E"} if points else set())
    letters |= {"P", "S"} if "T" in letters else set()
    asked = sorted(letters & lengths.keys() - {"T", *fixed_anyway})
    always = sorted(fixed_anyway & letters & lengths.keys())

    def is_right(choice: Lengths) -> bool:
        pairs = zip(known, wanted, strict=True)
        return all(a in (None, b) for c, w in pairs for a, b in zip(w, c.answers(with_total(choice)), strict=True))

    for count in range(len(asked) + 1):
        for some in itertools.combinations(asked, count):
            fixed = {letter: lengths[letter] for letter in (*always, *some)}
            free = [letter for letter in asked if letter not in fixed]
            candidates = [
                [n for n in _candidates(lengths[letter], known, points) if n >= (smallest or {}).get(letter, 2)]
                for letter in free
            ]
            if not free:
                return with_total({**usual[0], **fixed}), with_total({**usual[1], **fixed}), fixed
            if math.prod(map(len, candidates)) > _MOST_TRIED:
                continue
            choices = [dict(zip(free, values, strict=True)) for values in itertools.product(*candidates)]
            right = [c for c in choices if is_right({**usual[0], **fixed, **c})]
            for first, second in _pairs(right, free, points):
                both = with_total({**usual[0], **fixed, **first}), with_total({**usual[1], **fixed, **second})
                if _differ(*both, fixed):
                    return *both, fixed
    raise AssertionError("with every length fixed there is a choice")


def tells_apart(first: Mapping[str, int], second: Mapping[str, int], points: frozenset[int]) -> bool:
    """Whether lengths divided by `points` look like no constants at these two choices."""
    return all(
        first[letter] == second[letter] or first[letter] // p != second[letter] // p
        for letter in ("S", "E") if letter in first
        for p in points
    )  # fmt: skip


def _candidates(length: int, known: Sequence[Conditions], points: frozenset[int]) -> list[int]:
    """Lengths to try; none is 1, for which models have shortcuts."""
    numbers = {n for c in known for n in c.numbers} | points | {math.lcm(*points)} - {1}
    near = {n + d for n in (*numbers, length) for d in range(-3, _NEAR)}
    multiples = {n * times for n in numbers for times in range(1, 9)}
    found = {*range(2, _SMALL), *near, *multiples}
    return sorted(n for n in found if 2 <= n <= _LARGEST)


def _pairs(
    right: Sequence[Lengths], free: Sequence[str], points: frozenset[int]
) -> Iterator[tuple[Lengths, Lengths]]:
    """Where lengths are divided, the second is a multiple and the first none, if there are such."""
    divided = [letter for letter in free if letter in ("S", "E")]

    def remainders(choice: Lengths, are: bool) -> bool:
        return all((choice[letter] % p != 0) == are for letter in divided for p in points)

    firsts = [c for c in right if remainders(c, True)] or list(right)
    seconds = [c for c in right if remainders(c, False)] or list(right)
    for first in firsts[:_MOST_PAIRED]:
        for second in seconds[:_MOST_PAIRED]:
            if all(first[letter] != second[letter] for letter in free) and tells_apart(first, second, points):
                yield first, second


def _differ(first: Lengths, second: Lengths, fixed: Mapping[str, int]) -> bool:
    """No length at one of them plus a number is another at both."""
    free = [letter for letter in first if letter not in fixed and letter != "T"]
    if "T" in first and not {"P", "S"} & fixed.keys():
        free.append("T")
    steps = [second[letter] - first[letter] for letter in free]
    return 0 not in steps and len(set(steps)) == len(steps)
