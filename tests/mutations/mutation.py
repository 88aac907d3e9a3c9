"""A mutation: one way to break the programs of all ranks; and the list of all of them.

A function that changes `programs` in place, by a random choice of its own, and says what it did. NotHere where these
programs have no place for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import Node

from passes.program.rank_program import RankProgram
from tests.support.graphs.broken_programs import Programs

Mutate = Callable[[Programs, random.Random], str]
MUTATIONS: dict[str, Mutate] = {}


class NotHere(Exception):
    """Nothing in these programs can be broken in this way."""


def mutation(mutate: Mutate) -> Mutate:
    """Register a mutation; the table calls it by its function's name, in words."""
    name = mutate.__name__.replace("_", " ")
    assert name not in MUTATIONS
    MUTATIONS[name] = mutate
    return mutate


def pick(rng: random.Random, found: Sequence[Any]) -> Any:
    if not found:
        raise NotHere
    return rng.choice(found)


def pick_node(programs: Programs, rng: random.Random, fits: Callable[[Node], bool]) -> tuple[RankProgram, Node]:
    """A node that fits, of a rank that has one."""
    ranks = [(p, [n for n in p.graph_module.graph.nodes if fits(n)]) for p in programs]
    program, nodes = pick(rng, [(p, nodes) for p, nodes in ranks if nodes])
    return program, rng.choice(nodes)


def on_ranks(
    programs: Programs, program: RankProgram, node: Node, rng: random.Random
) -> list[tuple[RankProgram, Node]]:
    """The node alone, or with those of its name on all ranks of its stage: what a wrong pass would do to each."""
    if program.mesh.tp == 1 or rng.random() < 0.5:
        return [(program, node)]
    found = []
    for other in programs:
        if other.stage == program.stage:
            found += [(other, n) for n in other.graph_module.graph.nodes if n.name == node.name and n.op == node.op]
    return found


def said(places: Sequence[tuple[RankProgram, Node]]) -> str:
    return f"{places[0][1].name} on rank{'s' if len(places) > 1 else ''} {', '.join(str(p.rank) for p, _ in places)}"
