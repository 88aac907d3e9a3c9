"""Which elements of which parameter a rank holds: shifted, lost, held twice, in another order, of another layer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from cost_model.graph.placement import Interval
from passes.fx.arguments import place
from passes.ops.parallel_layers import RowParallelLinear, VocabParallelEmbedding
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram
from tests.mutations.mutation import NotHere, mutation, pick
from tests.support.graphs.broken_programs import Programs, with_slice


def _sharded(programs: Programs, rng: random.Random, least: int = 1) -> tuple[RankProgram, ParamShard]:
    """One of which a rank holds a slice, of at least so many intervals."""
    found = [
        (p, s) for p in programs for s in p.param_shards.values() if s.dim is not None and len(s.intervals) >= least
    ]  # fmt: skip
    return pick(rng, found)  # type: ignore[no-any-return]


def _set(program: RankProgram, shard: ParamShard, intervals: Sequence[Interval]) -> None:
    """Other elements, and a module that agrees with that."""
    with_slice(program, shard.name, intervals)
    owner = program.graph_module.get_submodule(shard.name.rpartition(".")[0])
    if isinstance(owner, VocabParallelEmbedding):
        owner.intervals = tuple(intervals)
        owner.num_embeddings = sum(b - a for a, b in intervals)


@mutation
def slice_shifted_by_one(programs: Programs, rng: random.Random) -> str:
    program, shard = _sharded(programs, rng)
    size = shard.shape[shard.dim]
    at = pick(rng, [i for i, (a, b) in enumerate(shard.intervals) if b > a])
    intervals = list(shard.intervals)
    a, b = intervals[at]
    step = pick(rng, [s for s in (-1, 1) if a + s >= 0 and b + s <= size])
    intervals[at] = (a + step, b + step)
    _set(program, shard, intervals)
    return f"{shard.name} on rank {program.rank}: {intervals}"


@mutation
def border_between_two_ranks_slices_moved(programs: Programs, rng: random.Random) -> str:
    program, shard = _sharded(programs, rng)
    others = [p for p in programs if p.stage == program.stage and shard.name in p.param_shards and p is not program]
    ends = [(i, b) for i, (a, b) in enumerate(shard.intervals) if b > a]
    for other in others:
        theirs = other.param_shards[shard.name]
        for i, b in ends:
            for j, (start, stop) in enumerate(theirs.intervals):
                if start == b and stop > start:
                    mine, yours = list(shard.intervals), list(theirs.intervals)
                    mine[i], yours[j] = (mine[i][0], b - 1), (start - 1, stop)
                    _set(program, shard, mine)
                    _set(other, theirs, yours)
                    return f"{shard.name} between ranks {program.rank} and {other.rank}"
    raise NotHere


@mutation
def slice_too_short(programs: Programs, rng: random.Random) -> str:
    program, shard = _sharded(programs, rng)
    at = pick(rng, [i for i, (a, b) in enumerate(shard.intervals) if b > a])
    intervals = list(shard.intervals)
    a, b = intervals[at]
    intervals[at] = pick(rng, [(a + 1, b), (a, b - 1)])
    _set(program, shard, intervals)
    return f"{shard.name} on rank {program.rank}: {intervals}"


@mutation
def elements_held_twice(programs: Programs, rng: random.Random) -> str:
    """One more than the plan says; or the same elements as the next rank."""
    program, shard = _sharded(programs, rng)
    intervals = list(shard.intervals)
    others = [p for p in programs if p.stage == program.stage and shard.name in p.param_shards and p is not program]
    if others and rng.random() < 0.5:
        theirs = rng.choice(others).param_shards[shard.name]
        _set(program, shard, theirs.intervals)
        return f"{shard.name} on rank {program.rank}: {theirs.intervals}, as on another"
    a, b = intervals[-1]
    if b < shard.shape[shard.dim]:
        intervals[-1] = (a, b + 1)
    elif intervals[0][0] > 0:
        intervals[0] = (intervals[0][0] - 1, intervals[0][1])
    else:
        raise NotHere
    _set(program, shard, intervals)
    return f"{shard.name} on rank {program.rank}: {intervals}"


@mutation
def slices_of_two_ranks_swapped(programs: Programs, rng: random.Random) -> str:
    """In one module: also what belongs to it, such as a bias, stays."""
    program, shard = _sharded(programs, rng)
    others = [p for p in programs if p.stage == program.stage and shard.name in p.param_shards and p is not program]
    other = pick(rng, [p for p in others if p.param_shards[shard.name].intervals != shard.intervals])
    theirs = other.param_shards[shard.name]
    _set(program, shard, theirs.intervals)
    _set(other, theirs, shard.intervals)
    return f"{shard.name} of ranks {program.rank} and {other.rank}"


@mutation
def segments_of_a_fused_weight_in_another_order(programs: Programs, rng: random.Random) -> str:
    program, shard = _sharded(programs, rng, least=2)
    intervals = list(shard.intervals)
    i, j = rng.sample(range(len(intervals)), 2)
    intervals[i], intervals[j] = intervals[j], intervals[i]
    _set(program, shard, intervals)
    return f"{shard.name} on rank {program.rank}: {intervals}"


@mutation
def parameter_of_another_place(programs: Programs, rng: random.Random) -> str:
    """Takes a parameter of the same shape: another layer's, say. On one rank, or on all that hold it."""
    program = pick(rng, programs)
    shards = list(program.param_shards.values())
    shard = pick(rng, shards)
    known = {(s.source, s.shape, s.dtype, s.is_buffer) for p in programs for s in p.param_shards.values()}
    alike = sorted(
        source for source, shape, dtype, is_buffer in known
        if source != shard.source and (shape, dtype, is_buffer) == (shard.shape, shard.dtype, shard.is_buffer)
    )  # fmt: skip
    source = pick(rng, alike)
    ranks = [program] if rng.random() < 0.5 else [p for p in programs if shard.name in p.param_shards]
    for p in ranks:
        p.param_shards[shard.name] = dataclasses.replace(p.param_shards[shard.name], source=source)  # type: ignore[index]
    return f"{shard.name} is {source} on {len(ranks)} ranks"


@mutation
def cut_along_the_other_dim(programs: Programs, rng: random.Random) -> str:
    program, shard = _sharded(programs, rng)
    if len(shard.shape) != 2:
        raise NotHere
    other = 1 - shard.dim
    if max(b for _, b in shard.intervals) > shard.shape[other]:
        raise NotHere
    ranks = [p for p in programs if shard.name in p.param_shards]
    if rng.random() < 0.5:
        ranks = [program]
    for p in ranks:
        new = dataclasses.replace(p.param_shards[shard.name], dim=other)
        p.param_shards[shard.name] = new  # type: ignore[index]
        tensor = torch.empty(new.local_shape, dtype=getattr(torch, new.dtype), device="meta")
        place(p.graph_module, shard.name, torch.nn.Parameter(tensor))
    return f"{shard.name} along dim {other} on {len(ranks)} ranks"


def _row_biases(programs: Programs) -> list[str]:
    """Modules that owe a sum, and have a bias on one rank."""
    found = []
    for p in programs:
        for name, module in p.graph_module.named_modules():
            if isinstance(module, RowParallelLinear) and f"{name}.bias" in p.param_shards:
                found.append(name)
    return list(dict.fromkeys(found))


@mutation
def bias_added_on_each_rank(programs: Programs, rng: random.Random) -> str:
    path = pick(rng, _row_biases(programs))
    holder = next(p for p in programs if f"{path}.bias" in p.param_shards)
    group = [p for p in programs if p.stage == holder.stage and p is not holder]
    for p in group if rng.random() < 0.5 else [pick(rng, group)]:
        p.graph_module.get_submodule(path).bias = torch.nn.Parameter(
            torch.empty_like(holder.graph_module.get_submodule(path).bias)
        )
        p.param_shards[f"{path}.bias"] = holder.param_shards[f"{path}.bias"]  # type: ignore[index]
    return path


@mutation
def bias_added_on_no_rank(programs: Programs, rng: random.Random) -> str:
    linears = [
        (p, name) for p in programs for name, m in p.graph_module.named_modules()
        if isinstance(getattr(m, "bias", None), torch.nn.Parameter) and f"{name}.bias" in p.param_shards
        and m.weight.dim() == 2
    ]  # fmt: skip
    _, path = pick(rng, linears)
    for p in programs:
        if f"{path}.bias" in p.param_shards:
            p.graph_module.get_submodule(path).bias = None
            del p.param_shards[f"{path}.bias"]  # type: ignore[attr-defined]
    return path


@mutation
def rows_that_a_lookup_takes_for_its_own(programs: Programs, rng: random.Random) -> str:
    found = [
        (p, name, m) for p in programs for name, m in p.graph_module.named_modules()
        if isinstance(m, VocabParallelEmbedding)
    ]  # fmt: skip
    program, name, module = pick(rng, found)
    (a, b), *rest = module.intervals
    step = 1 if a == 0 else rng.choice([-1, 1])
    module.intervals = ((a + step, b + step), *rest)
    return f"{name} on rank {program.rank}: {module.intervals}"


@mutation
def another_KV_head_picked(programs: Programs, rng: random.Random) -> str:
    found = [
        (p, name, b) for p in programs for name, b in p.graph_module.named_buffers()
        if name not in p.param_shards and b.dtype == torch.int64 and b.dim() == 1 and len(b)
    ]  # fmt: skip
    program, name, buffer = pick(rng, found)
    changed = buffer.clone()
    at = rng.randrange(len(buffer))
    changed[at] = int(pick(rng, [i for i in range(int(buffer.max()) + 2) if i != int(buffer[at])]))
    place(program.graph_module, name, changed)
    return f"{name} on rank {program.rank}: {changed.tolist()}"
