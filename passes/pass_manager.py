"""Runs the passes for one rank, in order, and checks the graph after each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch.fx

from cost_model.plan import PartitionPlan
from passes.context import RankContext
from passes.drop_elsewhere import drop_elsewhere
from passes.extract_stage import extract_stage
from passes.fuse_ops import fuse_ops
from passes.graph_text import graph_text
from passes.insert_collectives import insert_collectives
from passes.insert_send_recv import insert_send_recv
from passes.localize_cache import localize_cache
from passes.localize_shapes import localize_shapes
from passes.op_graph import parameter_names
from passes.program import RankProgram
from passes.shard_parameters import shard_parameters


def emit_rank(
    whole: torch.fx.GraphModule,
    plan: PartitionPlan,
    rank: int,
    *,
    layer_kinds: Sequence[str] = (),
    dump_dir: str | Path | None = None,
    sources: dict[int, str] | None = None,
) -> RankProgram:
    """The program of global rank `rank`. `whole` is the normalised graph that `plan` was made for; it is not changed.

    `dump_dir` gets the graph after each pass, as "03_localize_shapes.rank1.txt". `sources` may hold
    `parameter_names(whole)`, where many ranks are emitted.
    """
    ctx = RankContext(plan, rank)
    names = parameter_names(whole) if sources is None else sources
    inputs = tuple(str(n.target) for n in whole.graph.nodes if n.op == "placeholder")
    passes: tuple[tuple[str, Callable[[torch.fx.GraphModule], torch.fx.GraphModule]], ...] = (
        # first, so that all others see this rank's nodes only
        ("extract_stage", lambda g: extract_stage(g, ctx)),
        # before parameters: it says whose experts' weights a rank needs
        ("drop_elsewhere", lambda g: drop_elsewhere(g, ctx)),
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
    return RankProgram(
        rank=rank,
        mesh=plan.mesh,
        graph_module=graph,
        input_names=inputs,
        param_shards=dict(ctx.param_shards),
        cache_layers=ctx.cache_layers,
        cache_kinds=tuple(layer_kinds[layer] for layer in ctx.cache_layers),
    )
