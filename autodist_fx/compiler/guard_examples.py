"""Picks example lengths to trace with, such that every guard comes out as it does for a given call.

Each length that a guard asks for has candidates. Those that share a guard form a group, which is searched together; the
groups' choices are then combined so that all lengths can still be told apart.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from autodist_fx.calls.lengths import Lengths, with_total
from passes.fx.guards import Guards

_MOST_TRIED = 40_000  # combinations of candidates, for one choice of the fixed lengths
_MOST_PAIRED = 300
_NEAR = 40  # candidates lie so far above the call's length, or above a number in a guard
_SMALL = 64  # all lengths below are candidates
_LARGEST = 2**20
_Choice = tuple[Lengths, Lengths, Lengths]  # first, second, and the lengths fixed in both


def examples_like(
    known_guards: Sequence[Guards],
    lengths: Mapping[str, int],
    usual: tuple[Lengths, Lengths],
    points: frozenset[int] = frozenset(),
    fixed_anyway: frozenset[str] = frozenset(),
    smallest: Mapping[str, int] | None = None,
) -> tuple[Lengths, Lengths, Lengths]:
    """Choose two sets of lengths at which each of `known_guards` comes out as at `lengths`: (first, second, fixed).

    The size symbols in `fixed` have one value in both sets, and are numbers in the graph. `usual`: the two sets to use
    where no guard asks for a length. `points`: numbers that lengths are divided by, such as chunk sizes. Only symbols
    in `lengths` are ever fixed; those in `fixed_anyway` always are. `smallest`: lower bounds of lengths.
    """
    search = _Search(known_guards, lengths, usual, points, fixed_anyway, smallest or {})
    groups = search.groups()
    choices_of_groups = [search.choices_for(group) for group in groups]
    for combination in itertools.islice(itertools.product(*choices_of_groups), _MOST_TRIED):
        first, second, fixed = dict(usual[0]), dict(usual[1]), Lengths()
        for a, b, numbers in combination:
            first |= a
            second |= b
            fixed |= numbers
        if _differ(with_total(first), with_total(second), fixed):
            return with_total(first), with_total(second), fixed
    fixed = {symbol: lengths[symbol] for group in groups for symbol in group}
    return with_total({**usual[0], **fixed}), with_total({**usual[1], **fixed}), fixed


def tells_apart(first: Mapping[str, int], second: Mapping[str, int], points: frozenset[int]) -> bool:
    """True if the quotients of S and E by each of `points` differ between the two sets, so that none looks constant,
    and so do, in one of the sets, their multiples below S and E, so that none looks like another's."""
    for symbol in {"S", "E"} & first.keys():
        a, b = first[symbol], second[symbol]
        below = {(a - a % p, b - b % p) for p in points}
        if a != b and (len(below) < len(points) or any(a // p == b // p for p in points)):
            return False
    return True


def leaves_remainders(lengths: Mapping[str, int], points: frozenset[int]) -> bool:
    """True if none of `points` divides S or E, so that rounding up and down by them give different numbers."""
    return all(lengths[symbol] % p for symbol in ("S", "E") if symbol in lengths for p in points)


@dataclass(frozen=True)
class _Search:
    """The search for example lengths; the fields are the arguments of `examples_like`."""

    known_guards: Sequence[Guards]
    lengths: Mapping[str, int]
    usual: tuple[Lengths, Lengths]
    points: frozenset[int]
    fixed_anyway: frozenset[str]
    smallest: Mapping[str, int]

    def groups(self) -> list[list[str]]:
        """Group the size symbols that guards ask for; two symbols are together where one guard asks for both."""
        asked_together = nx.Graph()
        asked_together.add_nodes_from({"S", "E"} & self.usual[0].keys() if self.points else ())
        for guards in self.known_guards:
            for needs in guards.needs:
                nx.add_path(asked_together, sorted(needs - {"T"} | ({"P", "S"} if "T" in needs else set())))
        in_call = asked_together.subgraph(asked_together.nodes & self.lengths.keys() & self.usual[0].keys())
        return [sorted(group) for group in nx.connected_components(in_call)]

    def choices_for(self, group: Sequence[str]) -> list[_Choice]:
        """List choices for these size symbols, with as few of them fixed as possible."""
        always = [symbol for symbol in group if symbol in self.fixed_anyway]
        others = [symbol for symbol in group if symbol not in always]
        for count in range(len(others)):
            for some in itertools.combinations(others, count):
                fixed = {symbol: self.lengths[symbol] for symbol in (*always, *some)}
                free = [symbol for symbol in others if symbol not in some]
                candidates = [self._candidates(symbol) for symbol in free]
                if math.prod(map(len, candidates)) > _MOST_TRIED:
                    continue
                choices = (dict(zip(free, values, strict=True)) for values in itertools.product(*candidates))
                right = [choice for choice in choices if self._is_right({**fixed, **choice})]
                pairs = itertools.islice(self._pairs(right, free), _MOST_PAIRED)
                examples = [({**fixed, **first}, {**fixed, **second}, fixed) for first, second in pairs]
                if examples:
                    return examples
        fixed = {symbol: self.lengths[symbol] for symbol in group}
        return [(fixed, fixed, fixed)]

    @functools.cached_property
    def _wanted(self) -> list[tuple[bool | None, ...]]:
        return [guards.answers(self.lengths) for guards in self.known_guards]

    def _is_right(self, choice: Lengths) -> bool:
        """True if each guard that `choice` decides comes out as at
        the call; those that need more symbols are passed over."""
        lengths = with_total(choice)
        return all(
            answer is None or answer == wanted
            for guards, wanted_answers in zip(self.known_guards, self._wanted, strict=True)
            for wanted, answer in zip(wanted_answers, guards.answers(lengths), strict=True)
        )

    def _candidates(self, symbol: str) -> list[int]:
        """List lengths to try for one size symbol, in order. None is 1 but for P, since models have shortcuts for 1."""
        in_guards = {n for guards in self.known_guards for n in guards.numbers}
        numbers = in_guards | self.points | {math.lcm(*self.points)} - {1}
        near = {n + d for n in (*numbers, self.lengths[symbol]) for d in range(-3, _NEAR)}
        multiples = {n * times for n in numbers for times in range(1, 9)}
        least = self.smallest.get(symbol, 1 if symbol == "P" else 2)
        return sorted(n for n in {*range(1, _SMALL), *near, *multiples} if least <= n <= _LARGEST)

    def _pairs(self, right: Sequence[Lengths], free: Sequence[str]) -> Iterator[tuple[Lengths, Lengths]]:
        """Yield pairs that tell lengths apart; as many divisors as
        possible divide the lengths of the second, and as few the first."""
        divided = [symbol for symbol in free if symbol in ("S", "E")]

        def divisors(choice: Lengths) -> int:
            return sum(choice[symbol] % p == 0 for symbol in divided for p in self.points)

        firsts = sorted(right, key=divisors)
        seconds = sorted(right, key=divisors, reverse=True)
        for first in firsts[:_MOST_PAIRED]:
            for second in seconds[:_MOST_PAIRED]:
                if all(first[x] != second[x] for x in free) and tells_apart(first, second, self.points):
                    yield first, second


def _differ(first: Lengths, second: Lengths, fixed: Mapping[str, int]) -> bool:
    """True if no free length equals another one plus a constant in both sets."""
    free = [symbol for symbol in first if symbol not in fixed and symbol != "T"]
    if "T" in first and not {"P", "S"} & fixed.keys():
        free.append("T")
    steps = [second[symbol] - first[symbol] for symbol in free]
    return 0 not in steps and len(set(steps)) == len(steps)
