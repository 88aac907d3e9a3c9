"""Min-sum variable elimination: the cheapest assignment of many variables with few choices each, exactly.

Bucket elimination (Dechter, "Bucket elimination: a unifying framework for reasoning", 1999): to eliminate a variable,
all tables that have it are added up, and its best choice is taken for each combination of the variables that share a
table with it, its *scope*; what is left is one table over the scope. The order is min-fill: next is the variable that
ties the fewest pairs of others together (in order of degrees a mixture of experts had tables 100 times as large).

Each step is kept as a clique. A clique hangs below that of the variable of its scope that is eliminated next, so that
cliques form a tree (a forest, for a graph in pieces), and a second pass from the roots back (the calibration of a
junction tree: Lauritzen and Spiegelhalter, 1988) gives for every single choice the least cost of all the rest.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]
TIE = 1e-12  # relative: below this, a difference is rounding
MOST_ENTRIES = 2**24  # of one table: 128 MiB
MOST_ENTRIES_OF_SOME = 2**20  # where variables may be given up: each that is starts the elimination anew


class TooWideError(Exception):
    """So many variables hang together that a table of their combinations would not fit: those of `variables`."""

    def __init__(self, variable: str, scope: Sequence[str]) -> None:
        super().__init__(f"{variable} hangs together with {len(scope)} others")
        self.variables = (variable, *scope)


@dataclass(slots=True)
class _Clique:
    """One step: `variable` was eliminated while the variables of `scope` were still there.

    Tables have one dim for each variable of the scope, in its order.
    """

    variable: str
    scope: tuple[str, ...]
    joint: Table  # one more dim, the variable's choices: its cost, and the least cost of all below this clique
    best: npt.NDArray[np.intp]  # the variable's best choice
    reduced: Table  # the minimum of `joint` over the variable


class Elimination:
    """Minimises sum(unary[v][x_v]) + sum(pairs[u, v][x_u, x_v]): `choice` is the argmin, variable -> x_v, `cost` the
    minimum.

    `unary[v]` has shape [choices of v], `pairs[u, v]` [choices of u, choices of v]; infinities forbid a combination.
    Raises ValueError when no assignment is feasible, TooWideError where a table would have over 2**24 entries. Not so
    for variables in `to_fall_back_on`, each with one of its choices: where tables would have over 2**20 entries, those
    of these that tie most others together are given that choice, `given_up` says which, and the minimum is over the
    rest.
    """

    def __init__(
        self,
        unary: Mapping[str, Table],
        pairs: Mapping[tuple[str, str], Table],
        to_fall_back_on: Mapping[str, int] | None = None,
    ) -> None:
        self.given_up: dict[str, int] = {}
        while True:
            try:
                most = MOST_ENTRIES if to_fall_back_on is None else MOST_ENTRIES_OF_SOME
                self._cliques = _eliminate(*_with_choices(unary, pairs, self.given_up), most)
                break
            except TooWideError as error:
                free = [v for v in error.variables if v in (to_fall_back_on or {}) and v not in self.given_up]
                if to_fall_back_on is None or not free:
                    raise
                degrees = Counter(v for pair in pairs for v in pair)
                widest = max(free, key=degrees.__getitem__)
                self.given_up[widest] = to_fall_back_on[widest]
        self.cost = sum(float(c.reduced) for c in self._cliques.values() if not c.scope)
        if not np.isfinite(self.cost):
            raise ValueError("no combination of strategies is feasible")
        self.choice: dict[str, int] = {}
        for clique in reversed(self._cliques.values()):
            self.choice[clique.variable] = int(clique.best[tuple(self.choice[name] for name in clique.scope)])
        self._parents: dict[str, str] = {}
        self._children: dict[str, list[str]] = {}
        self._beliefs: dict[str, Table] = {}

    def dearer_by(self, variable: str) -> Table:
        """Returns, for each choice of the variable, by how much the cheapest assignment that has it exceeds `cost`:
        shape [choices], infinite where there is none."""
        belief = self._belief(variable)
        costs = belief.reshape(-1, belief.shape[-1]).min(axis=0)
        return np.where(np.isfinite(costs), np.maximum(costs - costs[self.choice[variable]], 0.0), np.inf)

    def forced(self, variable: str, value: int) -> dict[str, int]:
        """Returns the choices that differ from `choice` in the cheapest assignment with variable = value, which is
        among them. Raises ValueError when there is no such assignment.
        """
        if value == self.choice[variable]:
            return {}
        if not np.isfinite(self._belief(variable)[..., value].min()):
            raise ValueError(f"{variable} cannot be {value}")
        # Outwards from the variable's clique: up to the root, and from each clique on that way down. A subtree whose
        # scope keeps its choices keeps them itself, and is not entered: most of a model stays as it is.
        assigned = {variable: value}
        came_from, at = "", variable
        while True:
            clique = self._cliques[at]
            self._assign(clique, assigned)
            self._descend(at, came_from, assigned)
            above = self._parents.get(at)
            if above is None or all(assigned[name] == self.choice[name] for name in clique.scope):
                break
            came_from, at = at, above
        return {name: k for name, k in assigned.items() if k != self.choice[name]}

    def _assign(self, clique: _Clique, assigned: dict[str, int]) -> None:
        """Assigns the best values to the clique's variables that have none yet; those of `choice` if as good."""
        names = (*clique.scope, clique.variable)
        free = [name for name in names if name not in assigned]
        belief = self._belief(clique.variable)[tuple(assigned.get(name, slice(None)) for name in names)]
        as_before = tuple(self.choice[name] for name in free)
        least = float(belief.min())
        if belief[as_before] <= least + TIE * abs(least):
            assigned.update(zip(free, as_before))
        else:
            assigned.update(zip(free, (int(k) for k in np.unravel_index(int(belief.argmin()), belief.shape))))

    def _descend(self, top: str, done: str, assigned: dict[str, int]) -> None:
        """Assigns the best values in the subtrees below `top` whose scopes have changed, but for that of `done`."""
        stack = [child for child in self._children[top] if child != done]
        while stack:
            clique = self._cliques[stack.pop()]
            values = tuple(assigned[name] for name in clique.scope)
            if values != tuple(self.choice[name] for name in clique.scope):
                assigned[clique.variable] = int(clique.best[values])
                stack += self._children[clique.variable]

    def _belief(self, variable: str) -> Table:
        """Returns the least cost of a clique's whole tree, by the values of its scope and, last, of its variable."""
        if not self._beliefs:
            self._calibrate()
        return self._beliefs[variable]

    def _calibrate(self) -> None:
        """Computes the belief of every clique, from the roots down: its own table plus the least cost of the rest."""
        order = {name: i for i, name in enumerate(self._cliques)}
        self._children = {name: [] for name in self._cliques}
        for name, clique in reversed(self._cliques.items()):
            if not clique.scope:
                self._beliefs[name] = clique.joint
                continue
            above = min(clique.scope, key=order.__getitem__)
            self._parents[name] = above
            self._children[above].append(name)
            names = (*self._cliques[above].scope, above)
            belief = self._beliefs[above].min(axis=tuple(i for i, x in enumerate(names) if x not in clique.scope))
            kept = [x for x in names if x in clique.scope]
            belief = belief.transpose([kept.index(x) for x in clique.scope])
            # The belief above, reduced to this scope, contains this clique's own cost: that is taken out again, and
            # counts once. Where it is infinite, `joint` is, too, and the difference (inf - inf) is left out.
            outside = np.subtract(belief, clique.reduced, out=np.zeros_like(belief), where=np.isfinite(clique.reduced))
            self._beliefs[name] = clique.joint + outside[..., None]


def _with_choices(
    unary: Mapping[str, Table], pairs: Mapping[tuple[str, str], Table], given: Mapping[str, int]
) -> tuple[Mapping[str, Table], Mapping[tuple[str, str], Table]]:
    """Returns the tables in which each variable of `given` has that choice, and ties no others together."""
    if not given:
        return unary, pairs
    alone = dict(unary)
    for v, k in given.items():
        alone[v] = np.where(np.arange(len(unary[v])) == k, unary[v], np.inf)
    left: dict[tuple[str, str], Table] = {}
    for (u, v), table in pairs.items():
        if u in given and v in given:
            alone[v] = alone[v] + table[given[u], given[v]]
        elif u in given:
            alone[v] = alone[v] + table[given[u]]
        elif v in given:
            alone[u] = alone[u] + table[:, given[v]]
        else:
            left[u, v] = table
    return alone, left


def _eliminate(
    unary: Mapping[str, Table], pairs: Mapping[tuple[str, str], Table], most_entries: int
) -> dict[str, _Clique]:
    """Eliminates all variables; returns the cliques by variable, in the order of elimination."""
    interaction: nx.Graph[str] = nx.Graph()
    interaction.add_nodes_from(unary)
    factors: dict[str, list[tuple[tuple[str, ...], Table]]] = {v: [] for v in unary}
    for (u, v), table in pairs.items():
        interaction.add_edge(u, v)
        factors[u].append(((u, v), table))
        factors[v].append(((u, v), table))
    choices = {v: len(table) for v, table in unary.items()}
    number = {v: i for i, v in enumerate(unary)}
    heap = [(_dearness(interaction, v, choices), i, v) for v, i in number.items()]
    heapq.heapify(heap)
    # Entries are not changed but pushed anew, and checked when they come up. One that has become dearer is pushed back
    # with its new figure. One that has become cheaper is dropped: neighbours of what was eliminated last in its part of
    # the graph have entries that are right, so that no part is forgotten, only the order may be a little worse.
    cliques: dict[str, _Clique] = {}
    while heap:
        dearness, _, v = heapq.heappop(heap)
        if v in cliques:
            continue
        now = _dearness(interaction, v, choices)
        if now != dearness:  # an outdated entry
            if now > dearness:
                heapq.heappush(heap, (now, number[v], v))
            continue
        scope = tuple(sorted(interaction.neighbors(v), key=number.__getitem__))
        if math.prod(choices[name] for name in (*scope, v)) > most_entries:
            raise TooWideError(v, scope)
        axes = {name: axis for axis, name in enumerate((*scope, v))}
        joint: Table = unary[v].reshape((1,) * len(scope) + (-1,))
        for names, table in factors[v]:
            joint = joint + _aligned(names, table, axes)
        best = joint.argmin(axis=-1)
        reduced = np.take_along_axis(joint, best[..., None], axis=-1)[..., 0]
        cliques[v] = _Clique(v, scope, joint, best, reduced)
        # The tables that were added up are replaced by the reduced one, in the lists of all variables that have them;
        # they are told by id(), since two tables may be equal.
        old = set(map(id, (t for _, t in factors.pop(v))))
        interaction.remove_node(v)
        for name in scope:
            factors[name] = [f for f in factors[name] if id(f[1]) not in old]
        for name in scope:
            factors[name].append((scope, reduced))
        for i, a in enumerate(scope):
            for b in scope[i + 1 :]:
                interaction.add_edge(a, b)
        for name in scope:
            heapq.heappush(heap, (_dearness(interaction, name, choices), number[name], name))
    return cliques


def _dearness(interaction: nx.Graph[str], v: str, choices: Mapping[str, int]) -> tuple[int, int]:
    """Returns what eliminating v now would cost: the pairs of its neighbours that it newly ties together (min-fill),
    then, between equals, the number of entries of the table that is left."""
    near = interaction.adj
    neighbours = list(near[v])
    new = sum(1 for i, a in enumerate(neighbours) for b in neighbours[i + 1 :] if b not in near[a])
    return new, math.prod(choices[a] for a in neighbours)


def _aligned(names: tuple[str, ...], table: Table, axes: Mapping[str, int]) -> Table:
    """Returns `table`, whose dims are `names`, with its dims moved to their `axes` and size 1 along all others."""
    order = sorted(range(len(names)), key=lambda i: axes[names[i]])
    moved = table.transpose(order)
    shape = [1] * len(axes)
    for i in order:
        shape[axes[names[i]]] = table.shape[i]
    return moved.reshape(shape)
