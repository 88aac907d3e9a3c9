"""The pipeline of passes that emits one rank's program: a literal list, checked and dumped after each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch.fx

from cost_model.plan.data import PlanData
from passes.fx import node_meta
from passes.fx.node_meta import Phase
from passes.fx.run_passes import Pass, history_text, run_passes
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


def rank_passes(
    whole: torch.fx.GraphModule, sources: Mapping[int, str], layer_kinds: Sequence[str], train: bool
) -> tuple[Pass[RankContext], ...]:
    """Returns the passes that make one rank's program of `whole`, in order, each with its settings bound."""
    return (
        extract_stage,  # first, so that all others see this rank's nodes only
        partial(shard_parameters, sources=sources),  # before shapes: it says which bias and which rows a rank has
        localize_shapes,  # while producers and consumers still agree on every tensor, sharded or not
        partial(localize_cache, layer_kinds=layer_kinds),  # reads layer numbers alone; here as nothing after it does
        insert_collectives,  # from here on tensors have several forms, so that names no longer say how one lies
        insert_send_recv,  # after collectives: what is sent may be what a collective made
        # when all readers of a value are there, also another stage; while each op still has its name in the plan
        *((partial(insert_gradient_sums, whole=whole),) if train else ()),
        fuse_ops,  # when all that the plan speaks of is in place
    )


def emit_rank(
    whole: torch.fx.GraphModule,
    plan: PlanData,
    rank: int,
    *,
    layer_kinds: Sequence[str] = (),
    dump_dir: str | Path | None = None,
    sources: Mapping[int, str] | None = None,
    train: bool = False,
    stage_uses: Mapping[int, tuple[ParamUse, ...]] | None = None,
) -> RankProgram:
    """Emits the program of global rank `rank`. `whole` is the normalised graph that `plan` was made for; it is not
    changed.

    `dump_dir` gets the graph after each pass, as "02_localize_shapes.rank1.txt", and what each pass came to, as
    "passes.rank1.txt". `sources` may hold `parameter_names(whole)`, where many ranks are emitted. `train`: with all
    that a backward pass owes; then `stage_uses` may hold what other ranks' programs have of that name.
    """
    passes = rank_passes(whole, parameter_names(whole) if sources is None else sources, layer_kinds, train)
    ctx = RankContext(plan, rank)
    graph = _run(whole, passes, ctx, dump_dir)
    sums: tuple[GradSum, ...] | None = None
    known = dict(stage_uses or {})
    if train:
        if ctx.tp_rank == 0:
            known[ctx.stage] = ctx.param_uses
        concerned = _stages_with_the_same(plan, ctx.stage)
        for stage in concerned - known.keys():
            first = RankContext(plan, plan.mesh.rank(stage, 0))  # it has every parameter that any of its stage has
            _run(whole, passes, first, None)
            known[stage] = first.param_uses
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
        length_kinds=ctx.length_kinds,
        grad_sums=sums,
        stage_uses=known,
    )


def _run(
    whole: torch.fx.GraphModule, passes: tuple[Pass[RankContext], ...], ctx: RankContext, dump_dir: str | Path | None
) -> torch.fx.GraphModule:
    """Runs the passes and returns the rank's graph. `dump_dir` as for emit_rank."""
    folder = None if dump_dir is None else Path(dump_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def after(name: str, graph: torch.fx.GraphModule) -> None:
        if folder is not None:
            graph.graph.lint()
            file = folder / f"{len(ctx.history) - 1:02d}_{name}.rank{ctx.rank}.txt"
            file.write_text(graph_text(graph) + "\n")

    graph = run_passes(passes, whole, ctx, after)
    graph.graph.lint()
    node_meta.drop_ended(graph, Phase.EMITTED)
    node_meta.set_history(graph, ctx.history)
    node_meta.check(graph, Phase.EMITTED)
    if folder is not None:
        text = history_text((*node_meta.history(whole), *ctx.history))
        (folder / f"passes.rank{ctx.rank}.txt").write_text(text + "\n")
    return graph


def _stages_with_the_same(plan: PlanData, stage: int) -> set[int]:
    """Returns `stage`, and the stages that hold a parameter which it holds too."""
    return {stage, *(other for p in plan.params if stage in p.stages for other in p.stages)}
