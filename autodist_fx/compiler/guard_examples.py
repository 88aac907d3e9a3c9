"""guard examples."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from autodist_fx.calls.lengths import Lengths, with_total
from passes.fx.guards import Guards

_MOST_TRIED = 40_000  # of one choice of fixed lengths
_MOST_PAIRED = 300
_NEAR = 40  # how far from a length, or a number in a condition, others are tried
_SMALL = 64
_LARGEST = 2**20
_Way = tuple[Lengths, Lengths, Lengths]  # first, second, and what is fixed in both


def examples_like(
    known: Sequence[Guards],
    lengths: Mapping[str, int],
    usual: tuple[Lengths, Lengths],
    points: frozenset[int] = frozenset(),
    fixed_anyway: frozenset[str] = frozenset(),
    smallest: Mapping[str, int] | None = None,
) -> tuple[Lengths, Lengths, Lengths]:
    """(first, second, fixed): two choices of lengths at which each of the `known` conditions comes out as at `lengths`;
    those in `fixed` are numbers, the same in both.

    `usual`: what they are where no condition asks for them. `points`: numbers that lengths are divided by. Only lengths
    that are given are fixed; `fixed_anyway` names some. `smallest`: what lengths may not be below.
    """
    search = _Search(known, lengths, usual, points, fixed_anyway, smallest or {})
    groups = search.groups()
    found = [search.ways(group) for group in groups]
    for choice in itertools.islice(itertools.product(*found), _MOST_TRIED):
        first, second, fixed = dict(usual[0]), dict(usual[1]), Lengths()
        for a, b, numbers in choice:
            first |= a
            second |= b
            fixed |= numbers
        if _differ(with_total(first), with_total(second), fixed):
            return with_total(first), with_total(second), fixed
    fixed = {letter: lengths[letter] for group in groups for letter in group}
    return with_total({**usual[0], **fixed}), with_total({**usual[1], **fixed}), fixed


def tells_apart(first: Mapping[str, int], second: Mapping[str, int], points: frozenset[int]) -> bool:
    """Whether lengths divided by `points` look like no constants at these two choices."""
    return all(
        first[letter] == second[letter] or first[letter] // p != second[letter] // p
        for letter in ("S", "E") if letter in first
        for p in points
    )  # fmt: skip


@dataclass(frozen=True)
class _Search:
    known: Sequence[Guards]
    lengths: Mapping[str, int]
    usual: tuple[Lengths, Lengths]
    points: frozenset[int]
    fixed_anyway: frozenset[str]
    smallest: Mapping[str, int]

    def groups(self) -> list[list[str]]:
        """The letters that are asked for, together where one condition asks for several."""
        of = nx.Graph()
        of.add_nodes_from({"S", "E"} & self.usual[0].keys() if self.points else ())
        for conditions in self.known:
            for needs in conditions.needs:
                nx.add_path(of, sorted(needs - {"T"} | ({"P", "S"} if "T" in needs else set())))
        given = of.subgraph(of.nodes & self.lengths.keys() & self.usual[0].keys())
        return [sorted(group) for group in nx.connected_components(given)]

    def ways(self, group: Sequence[str]) -> list[_Way]:
        """Choices for these letters, with as few as can be fixed."""
        always = [letter for letter in group if letter in self.fixed_anyway]
        others = [letter for letter in group if letter not in always]
        for count in range(len(others)):
            for some in itertools.combinations(others, count):
                fixed = {letter: self.lengths[letter] for letter in (*always, *some)}
                free = [letter for letter in others if letter not in some]
                candidates = [self._candidates(letter) for letter in free]
                if math.prod(map(len, candidates)) > _MOST_TRIED:
                    continue
                choices = (dict(zip(free, values, strict=True)) for values in itertools.product(*candidates))
                right = [choice for choice in choices if self._is_right({**fixed, **choice})]
                pairs = itertools.islice(self._pairs(right, free), _MOST_PAIRED)
                found = [({**fixed, **first}, {**fixed, **second}, fixed) for first, second in pairs]
                if found:
                    return found
        fixed = {letter: self.lengths[letter] for letter in group}
        return [(fixed, fixed, fixed)]

    @functools.cached_property
    def _wanted(self) -> list[tuple[bool | None, ...]]:
        return [conditions.answers(self.lengths) for conditions in self.known]

    def _is_right(self, choice: Lengths) -> bool:
        """Whether what depends on these lengths alone comes out as at the call; None is what is not known."""
        lengths = with_total(choice)
        return all(
            found is None or found == wanted
            for conditions, answers in zip(self.known, self._wanted, strict=True)
            for wanted, found in zip(answers, conditions.answers(lengths), strict=True)
        )

    def _candidates(self, letter: str) -> list[int]:
        """Lengths to try; none is 1, for which models have shortcuts, but of tokens cached before."""
        numbers = {n for c in self.known for n in c.numbers} | self.points | {math.lcm(*self.points)} - {1}
        near = {n + d for n in (*numbers, self.lengths[letter]) for d in range(-3, _NEAR)}
        multiples = {n * times for n in numbers for times in range(1, 9)}
        least = self.smallest.get(letter, 1 if letter == "P" else 2)
        return sorted(n for n in {*range(1, _SMALL), *near, *multiples} if least <= n <= _LARGEST)

    def _pairs(self, right: Sequence[Lengths], free: Sequence[str]) -> Iterator[tuple[Lengths, Lengths]]:
        """Where lengths are divided, the second is a multiple and the first none, if there are such."""
        divided = [letter for letter in free if letter in ("S", "E")]

        def remainders(choice: Lengths, are: bool) -> bool:
            return all((choice[letter] % p != 0) == are for letter in divided for p in self.points)

        firsts = [c for c in right if remainders(c, True)] or list(right)
        seconds = [c for c in right if remainders(c, False)] or list(right)
        for first in firsts[:_MOST_PAIRED]:
            for second in seconds[:_MOST_PAIRED]:
                if all(first[x] != second[x] for x in free) and tells_apart(first, second, self.points):
                    yield first, second


def _differ(first: Lengths, second: Lengths, fixed: Mapping[str, int]) -> bool:
    """No length at one of them plus a number is another at both."""
    free = [letter for letter in first if letter not in fixed and letter != "T"]
    if "T" in first and not {"P", "S"} & fixed.keys():
        free.append("T")
    steps = [second[letter] - first[letter] for letter in free]
    return 0 not in steps and len(set(steps)) == len(steps)
