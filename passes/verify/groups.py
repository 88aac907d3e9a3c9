"""Checks what the ranks of a stage owe to each other, and what the stages together give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cost_model.graph.op_graph import SOURCES, OpGraph, TensorRef
from cost_model.plan.data import PlanData
from passes.program.rank_program import RankProgram
from passes.verify.core.report import Duty, fail, fail_plainly, on_rank
from passes.verify.core.state import RankFacts


def check_group(group: Sequence[RankFacts]) -> None:
    """Checks that sums have each term once, collectives are of one tensor, and outputs are the same on every rank of
    a stage."""
    _check_sums(group)
    _check_biases(group)
    first = group[0]
    for facts in group[1:]:
        for (theirs, a), (mine, b) in zip(first.collectives, facts.collectives, strict=True):
            if a != b:
                fail(
                    facts.program, mine,
                    f"is of {b.op} here, and of {a.op} on rank {first.program.rank} ({theirs.name})",
                )  # fmt: skip
        if facts.outputs != first.outputs:
            fail_plainly(
                f"{on_rank(facts.program)} returns {sorted(facts.outputs)}, rank {first.program.rank} "
                f"{sorted(first.outputs)}, of other tensors or under other names",
                Duty.NODES,
            )


def _check_sums(group: Sequence[RankFacts]) -> None:
    """Checks that an op that owes a sum has, over all ranks, each element of what it sums over once."""
    for op in dict.fromkeys(op for facts in group for op in facts.sums):
        lost = [facts for facts in group if op not in facts.sums]
        node, size, _ = next(facts.sums[op] for facts in group if op in facts.sums)
        some = next(facts.program for facts in group if op in facts.sums)
        if lost:
            fail(
                some, node, f"owes a sum over ranks, and rank {lost[0].program.rank} has no term of it",
                untouched=Duty.WEIGHTS,
            )  # fmt: skip
        owners = np.zeros(size, dtype=np.int64)
        for facts in group:
            for start, stop in facts.sums[op][2]:
                owners[start:stop] += 1
        wrong = np.flatnonzero(owners != 1)
        if len(wrong):
            fail(
                some, node,
                f"element {wrong[0]} of the {size} that it sums over is on {owners[wrong[0]]} ranks instead of one: "
                + ", ".join(f"rank {f.program.rank} has {list(f.sums[op][2])}" for f in group),
                untouched=Duty.WEIGHTS,
            )  # fmt: skip


def _check_biases(group: Sequence[RankFacts]) -> None:
    """Checks that the sum over ranks adds a bias once."""
    for op in dict.fromkeys(op for facts in group for op in facts.biases):
        adding = [facts for facts in group if op in facts.biases and facts.biases[op][1]]
        if len(adding) != 1:
            some = next(facts for facts in group if op in facts.biases)
            ranks = [facts.program.rank for facts in adding]
            fail(
                some.program, some.biases[op][0],
                f"owes a sum over ranks, and its bias is added on ranks {ranks} instead of one", untouched=Duty.WEIGHTS,
            )  # fmt: skip




def check_outputs(
    facts: Sequence[RankFacts], plan: PlanData, graph: OpGraph, names: Mapping[str, TensorRef] | None = None
) -> None:
    """Checks that every output of the model comes out of exactly one stage, and under its name where `names` are
    given."""
    stages: dict[TensorRef, set[int]] = {}
    for of_rank in facts:
        for name, ref in of_rank.outputs.items():
            if ref not in graph.outputs:
                fail_plainly(
                    f"{on_rank(of_rank.program)} returns {ref.op} as {name}, which is no output of the model",
                    Duty.NODES,
                )
            if names is not None and names.get(name) != ref:
                fail_plainly(
                    f"{on_rank(of_rank.program)} returns {ref.op} as {name}, and the model returns "
                    + (f"{names[name].op} under that name" if name in names else f"{', '.join(names)} only"),
                    Duty.NODES,
                )
            stages.setdefault(ref, set()).add(of_rank.program.stage)
    for ref in graph.outputs:
        where = sorted(stages.get(ref, ()))
        if not where:
            fail_plainly(f"no rank returns {ref.op}, an output of the model ({graph[ref.op]})", Duty.NODES)
        if len(where) > 1 and graph[ref.op].kind not in SOURCES:
            fail_plainly(f"{ref.op}, an output of the model, comes out of stages {where}", Duty.NODES)


_CACHED = ("cache_update", "cache_read")


def check_caches(facts: Sequence[RankFacts], plan: PlanData, graph: OpGraph) -> None:
    """Checks that each cache layer is on one stage, whose layers count from 0 in the order in which they are
    written."""
    owners: dict[int, int] = {}
    for stage in range(plan.mesh.pp):
        group = [facts[r] for r in plan.mesh.tp_group(stage)]
        layers = group[0].program.cache_layers
        planned = [op.name for op in plan.ops if op.kind in _CACHED and stage in op.stages]
        for of_rank in group:
            _check_rank_cache(of_rank.program, of_rank, layers, planned)
        for layer in layers:
            other = owners.setdefault(layer, stage)
            if other != stage:
                fail_plainly(f"cache layer {layer} is on stages {other} and {stage}", Duty.CACHE)
    written = {op.attrs["layer"] for op in graph if op.kind in _CACHED}
    if written != owners.keys():
        fail_plainly(f"the model writes cache layers {sorted(written)}, the ranks have {sorted(owners)}", Duty.CACHE)


def _check_rank_cache(
    program: RankProgram, of_rank: RankFacts, layers: tuple[int, ...], planned: Sequence[str]
) -> None:
    if program.cache_layers != layers:
        fail_plainly(f"{on_rank(program)} has cache layers {program.cache_layers}, its group {layers}", Duty.CACHE)
    written = [op for op, _, _ in of_rank.updates]
    for op, _, node in of_rank.updates:
        if written.count(op) > 1:
            fail(program, node, "writes its cache layer twice", untouched=Duty.CACHE)
    lost = [op for op in planned if op not in written]
    if lost:
        fail_plainly(f"{on_rank(program)} never runs {lost[0]}, which writes a cache layer", Duty.CACHE)
    order = list(dict.fromkeys(local for _, local, _ in of_rank.updates))
    if order != list(range(len(layers))):
        fail_plainly(
            f"{on_rank(program)} writes its {len(layers)} cache layers in the order {order}: a cache grows layer by "
            f"layer, from 0",
            Duty.CACHE,
        )
