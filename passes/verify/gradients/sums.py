"""Checks the sums that are owed of parameters' gradients: with them, each rank has the whole gradient of every element
that it holds, and every rank that takes part in a sum says so.

Followed for each element: what a rank has of its gradient is a sum of contributions, one by each rank that computes a
part (of a tensor that is cut, or that is used in parts), one by each stage where all ranks do alike. In the end every
holder must have each contribution once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import networkx as nx

from cost_model.mesh import Mesh
from passes.program.gradient_sums import Box, GradSum, Holder, cells, contains
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram
from passes.verify.core.report import Duty, fail_plainly, on_rank

Tensors = dict[str, bool]  # path of a parameter -> whether the rank gets a term of its gradient, or else all of it
Contributions = Counter[tuple[str, int, str]]  # ("rank" or "stage", its number, the parameter's path)


def check_grad_sums(programs: Sequence[RankProgram], held: Sequence[Tensors]) -> None:
    """Checks the sums of all programs; `held[r]`: what gradients come to on rank r. Raises VerificationError."""
    sums = _agreed(programs)
    by_source: dict[str, list[Holder]] = {}
    for program, tensors in zip(programs, held, strict=True):
        for path in tensors:
            by_source.setdefault(program.param_shards[path].source, []).append((program.rank, path))
    owed: dict[str, list[GradSum]] = {}
    for one in sums:
        for rank, path in {*one.terms, *one.holders}:
            if (rank, path) not in by_source.get(one.source, ()):
                fail_plainly(
                    f"a sum of the gradients of {one.source} names {path} on rank {rank}, which gets no gradient of it",
                    Duty.GRADIENT_SUMS,
                )
        owed.setdefault(one.source, []).append(one)
    for source, holders in by_source.items():
        _check_source(source, holders, owed.get(source, []), programs, held)


def _agreed(programs: Sequence[RankProgram]) -> list[GradSum]:
    """Returns all sums, once each; each is in the program of each rank that takes part, and of no other, in one
    order."""
    sums = list(dict.fromkeys(s for p in programs for s in p.grad_sums or ()))
    for one in sums:
        if not set(one.terms) <= set(one.holders):
            fail_plainly(
                f"a sum of the gradients of {one.source} has terms that do not get it: {one}",
                Duty.GRADIENT_SUMS,
            )
        for rank in one.ranks:
            if not 0 <= rank < len(programs):
                fail_plainly(
                    f"a sum of the gradients of {one.source} names rank {rank}, which is not there",
                    Duty.GRADIENT_SUMS,
                )
    for program in programs:
        own = [s for s in program.grad_sums or ()]
        if len(set(own)) < len(own):
            twice = next(s for s in own if own.count(s) > 1)
            fail_plainly(
                f"{on_rank(program)} adds up the gradients of {twice.source} {list(twice.box)} twice",
                Duty.GRADIENT_SUMS,
            )
        for one in sums:
            if (program.rank in one.ranks) != (one in own):
                says = "says nothing of it" if program.rank in one.ranks else "takes no part in it"
                fail_plainly(
                    f"the gradients of {one.source} {list(one.box)} are added up over ranks {list(one.ranks)}, and "
                    f"{on_rank(program)} {says}",
                    Duty.GRADIENT_SUMS,
                )
    for a in programs:
        for b in programs[a.rank + 1 :]:
            mine = [s for s in a.grad_sums or () if b.rank in s.ranks]
            if mine != [s for s in b.grad_sums or () if a.rank in s.ranks]:
                fail_plainly(
                    f"ranks {a.rank} and {b.rank} add up gradients of parameters in another order",
                    Duty.GRADIENT_SUMS,
                )
    order: nx.DiGraph[GradSum] = nx.DiGraph()
    for program in programs:
        nx.add_path(order, program.grad_sums or ())
    if not nx.is_directed_acyclic_graph(order):
        cycle = ", ".join(one.source for one, _ in nx.find_cycle(order))
        fail_plainly(
            f"ranks would wait for each other for ever, adding up the gradients of {cycle} in turn",
            Duty.GRADIENT_SUMS,
        )
    return sums


def _check_source(
    source: str,
    holders: Sequence[Holder],
    sums: Sequence[GradSum],
    programs: Sequence[RankProgram],
    held: Sequence[Tensors],
) -> None:
    boxes = {holder: _boxes(programs[holder[0]].param_shards[holder[1]]) for holder in holders}
    mesh = programs[0].mesh
    edges = [box for own in boxes.values() for box in own] + [one.box for one in sums]
    if len({len(box) for box in edges}) > 1:
        fail_plainly(f"a sum of the gradients of {source} is of another number of dims", Duty.GRADIENT_SUMS)
    for cell in cells(edges):
        having = [h for h in holders if any(contains(box, cell) for box in boxes[h])]
        values: dict[Holder, Contributions] = {h: Counter([_contribution(mesh, h, held)]) for h in having}
        everything = set().union(*values.values())
        for one in sums:
            if not contains(one.box, cell):
                continue
            lost = [h for h in one.holders if h not in values]
            if lost:
                fail_plainly(
                    f"the gradients of {source} {list(one.box)} are added up on rank {lost[0][0]} ({lost[0][1]}), "
                    f"which does not hold {list(cell)}",
                    Duty.GRADIENT_SUMS,
                )
            total: Contributions = Counter()
            for term in one.terms:
                total.update(values[term])
            values.update(dict.fromkeys(one.holders, total))
        for holder, found in values.items():
            wrong = [c for c in everything if found[c] != 1]
            if wrong:
                _fail_sum(source, cell, programs[holder[0]], found, wrong[0])


def _contribution(mesh: Mesh, holder: Holder, held: Sequence[Tensors]) -> tuple[str, int, str]:
    rank, path = holder
    return ("rank", rank, path) if held[rank][path] else ("stage", mesh.coordinates(rank)[0], path)


def _fail_sum(
    source: str, cell: Box, program: RankProgram, found: Contributions, contribution: tuple[str, int, str]
) -> None:
    who, number, path = contribution
    times = found[contribution]
    fail_plainly(
        f"{on_rank(program)} ends with a gradient of {source} {list(cell)} "
        + (f"that lacks what {who} {number} has of it ({path})" if times == 0 else
           f"that has what {who} {number} has of it ({path}) {times} times"),
        Duty.GRADIENT_SUMS,
    )  # fmt: skip


def _boxes(shard: ParamShard) -> list[Box]:
    whole = tuple((0, n) for n in shard.shape)
    if shard.dim is None:
        return [whole]
    return [(*whole[: shard.dim], run, *whole[shard.dim + 1 :]) for run in shard.intervals]
