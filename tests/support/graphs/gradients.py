"""Small graphs compiled for training, and checks of their gradient sums."""

from __future__ import annotations

import torch
from torch import nn

from autodist_fx.simulation.backward import glued, run_backward
from cost_model.partition_plan import PartitionPlan
from passes.op_graph.build import build_op_graph
from passes.partition.pipeline import emit_rank
from passes.program.rank_program import RankProgram
from passes.verify.verify import verify
from tests.support.graphs.small import fill, normalized, plan_for


class Loss(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": torch.sin(self.body(x)["y"]).sum()}


def emitted(whole: torch.fx.GraphModule, plan: PartitionPlan) -> list[RankProgram]:
    return [emit_rank(whole, plan, rank, train=True) for rank in range(plan.mesh.size)]


def check_and_plan(body: nn.Module, width: int, tp: int, pp: int = 1) -> tuple[list[RankProgram], PartitionPlan]:
    """As `check`, and the plan that the programs follow."""
    module = Loss(body).double().eval()
    x = torch.randn(2, 5, width, dtype=torch.float64)
    module(x)["loss"].backward()
    whole = normalized(module, x=("B", "S", width))
    plan = plan_for(whole, tp, pp)
    programs = emitted(whole, plan)
    verify(programs, plan, build_op_graph(whole), whole)
    for program in programs:
        fill(program.graph_module, program.param_shards, module)
        program.graph_module.requires_grad_()
    found = glued(programs, run_backward(programs, {"x": x})[1])
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-12)
    return programs, plan
