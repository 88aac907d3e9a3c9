"""Programs of stages that do nothing but talk: graphs written by hand, for the order of messages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx

from cost_model.mesh import Mesh
from cost_model.schedule.messages import StageValue
from cost_model.schedule.schedule import Schedule
from passes.ops.comm import all_reduce, recv, send
from passes.program.rank_program import RankProgram

CHAIN = ((0, 1), (1, 2), (2, 3))
SKIPS = (*CHAIN, (0, 2), (0, 3), (1, 3))  # values that are needed two stages on, and three


def stage_programs(
    tp: int, pp: int, values: Sequence[tuple[int, int]] = CHAIN, collectives: int = 2, gradient: bool = True
) -> list[RankProgram]:
    """The programs of all ranks; `values` are (source stage, target stage), and their channels count from 0."""
    mesh = Mesh(tp, pp)
    found = []
    for rank in range(mesh.size):
        stage, t = mesh.coordinates(rank)
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        told = {"gradient": True} if gradient else {}
        for channel, (source, target) in enumerate(values):
            if target == stage:
                where = {"source": mesh.rank(source, t), "channel": channel}
                x = graph.call_function(recv, ((4,), torch.float64, None), {**where, **told})
                x.name = f"from_{source}_to_{target}"
        for _ in range(collectives):
            x = graph.call_function(all_reduce, (x,), {"axis": "tp"})
        for channel, (source, target) in enumerate(values):
            if source == stage and target < pp:
                y = graph.call_function(torch.add, (x, channel))
                y.name = f"from_{source}_to_{target}"
                graph.call_function(send, (y,), {"to": mesh.rank(target, t), "channel": channel, **told})
        graph.output({})
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        found.append(RankProgram(rank, mesh, module, ("x",), {}, ()))
    return found


def chain_values(schedule: Schedule) -> list[list[StageValue]]:
    """The values of CHAIN, of each microbatch, as a schedule's messages name them."""
    named = [StageValue(*value, channel, name="from_{}_to_{}".format(*value)) for channel, value in enumerate(CHAIN)]
    named = [value for value in named if value.target < schedule.stages]
    return [named] * schedule.microbatches
