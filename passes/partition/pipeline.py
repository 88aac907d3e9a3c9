"""Runs the passes for one rank, in order, and checks the graph after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.fx

from cost_model.plan.data import PlanData
from passes.fx.text import graph_text
from passes.op_graph.build import parameter_names
from passes.partition.context import RankContext
from passes.partition.extract_stage import extract_stage
from passes.partition.fuse_ops import fuse_ops
from passes.partition.insert_collectives import insert_collectives
from passes.partition.insert_gradient_sums import insert_gradient_sums
from passes.partition.insert_send_recv import insert_send_recv
from passes.partition.localize_cache import localize_cache
from passes.partition.localize_shapes import localize_shapes
from passes.partition.shard_parameters import shard_parameters
from passes.program.gradient_sums import GradSum, ParamUse, grad_sums, of_rank
from passes.program.rank_program import RankProgram


def emit_rank(
    whole: torch.fx.GraphModule,
    plan: PlanData,
    rank: int,
    *,
    layer_kinds: Sequence[str] = (),
    dump_dir: str | Path | None = None,
    sources: dict[int, str] | None = None,
    train: bool = False,
    stage_uses: dict[int, tuple[ParamUse, ...]] | None = None,
) -> RankProgram:
    """The program of global rank `rank`. `whole` is the normalised graph that `plan` was made for; it is not changed.

    `dump_dir` gets the graph after each pass, as "03_localize_shapes.rank1.txt". `sources` may hold
    `parameter_names(whole)`, where many ranks are emitted. `train`: with all that a backward pass owes; then
    `stage_uses` may be a dict, given with each rank alike, where what is found out of other stages is kept.
    """
    names = parameter_names(whole) if sources is None else sources
    ctx, graph = _run(whole, plan, rank, layer_kinds, names, train, dump_dir)
    sums: tuple[GradSum, ...] | None = None
    if train:
        known = {} if stage_uses is None else stage_uses
        if ctx.tp_rank == 0:
            known[ctx.stage] = ctx.param_uses
        concerned = _stages_with_the_same(plan, ctx.stage)
        for stage in concerned - known.keys():
            first = plan.mesh.rank(stage, 0)  # which has every parameter that any rank of its stage has
            known[stage] = _run(whole, plan, first, layer_kinds, names, train, None)[0].param_uses
        sums = of_rank(grad_sums(plan.mesh, {stage: known[stage] for stage in concerned}), rank)
    inputs = tuple(str(n.target) for n in whole.graph.nodes if n.op == "placeholder")
    return RankProgram(
        rank=rank,
        mesh=plan.mesh,
        graph_module=graph,
        input_names=inputs,
        param_shards=dict(ctx.param_shards),
        cache_layers=ctx.cache_layers,
        cache_kinds=tuple(layer_kinds[layer] for layer in ctx.cache_layers),
        grad_sums=sums,
    )


def _run(
    whole: torch.fx.GraphModule,
    plan: PlanData,
    rank: int,
    layer_kinds: Sequence[str],
    names: dict[int, str],
    train: bool,
    dump_dir: str | Path | None,
) -> tuple[RankContext, torch.fx.GraphModule]:
    ctx = RankContext(plan, rank)
    passes: tuple[tuple[str, Callable[[torch.fx.GraphModule], torch.fx.GraphModule]], ...] = (
        # first, so that all others see this rank's nodes only
        ("extract_stage", lambda g: extract_stage(g, ctx)),
        # before shapes: it says which bias and which rows a rank has
        ("shard_parameters", lambda g: shard_parameters(g, ctx, names)),
        # while producers and consumers still agree on every tensor, sharded or not
        ("localize_shapes", lambda g: localize_shapes(g, ctx)),
        # reads layer numbers alone; here because nothing after it does
        ("localize_cache", lambda g: localize_cache(g, ctx, layer_kinds)),
        # from here on tensors have several forms, so that names no longer say how one lies
        ("insert_collectives", lambda g: insert_collectives(g, ctx)),
        # after collectives: what is sent may be what a collective made
        ("insert_send_recv", lambda g: insert_send_recv(g, ctx)),
        # when all readers of a value are there, also another stage; while each op still has its name in the plan
        *([("insert_gradient_sums", lambda g: insert_gradient_sums(g, ctx, whole))] if train else ()),
        # when all that the plan speaks of is in place
        ("fuse_ops", lambda g: fuse_ops(g, ctx)),
    )
    graph = whole
    for number, (name, run) in enumerate(passes):
        graph = run(graph)
        graph.graph.lint()
        if dump_dir is not None:
            Path(dump_dir).mkdir(parents=True, exist_ok=True)
            (Path(dump_dir) / f"{number:02d}_{name}.rank{rank}.txt").write_text(graph_text(graph) + "\n")
    return ctx, graph


def _stages_with_the_same(plan: PlanData, stage: int) -> set[int]:
    """`stage`, and those that hold a parameter which it holds too."""
    return {stage, *(other for p in plan.params if stage in p.stages for other in p.stages)}
