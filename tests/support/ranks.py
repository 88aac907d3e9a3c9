"""A model split over ranks as processes have it, a thread each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.from_checkpoint import distribute
from cost_model.costs.hardware import CPU_GLOO
from cost_model.mesh import Mesh
from cost_model.request.plan_request import PlanRequest


def on_ranks(
    model: PreTrainedModel, mesh: Mesh, work: Callable[[Any], Any], device: str = "cpu", cuda_graphs: bool = False
) -> list[Any]:
    """`work(the rank's share)`, by rank; a thread each."""

    def run(rank: int, communicator: Any) -> Any:
        joined = JoinedRank(mesh, rank, torch.device(device), communicator, cuda_graphs)
        with torch.no_grad():
            return work(distribute(model, joined, PlanRequest(mesh, CPU_GLOO), CompileOptions()))

    return ThreadWorld(mesh).run(run)
