"""A model split over ranks that are threads of this process, each with the runtime that processes have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

from autodist_fx.compiler.compile_options import CompileOptions
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup import from_checkpoint
from cost_model.costs.hardware import CPU_GLOO
from cost_model.mesh import Mesh
from cost_model.request.plan_request import PlanRequest


def on_ranks(model: PreTrainedModel, mesh: Mesh, work: Callable[[Any], object]) -> None:
    """Runs `work(the rank's model)` on all ranks. As threads they share one compilation, where processes would make
    one each, all the same; programs are proven where these calls are simulated."""

    def run(rank: int, communicator: Any) -> None:
        joined = JoinedRank(mesh, rank, torch.device("cpu"), communicator)
        options = CompileOptions(verify=False)
        with torch.no_grad():
            work(from_checkpoint.distribute(model, joined, PlanRequest(mesh, CPU_GLOO), options))

    with mock.patch.object(from_checkpoint, "compile_to_run", _once(from_checkpoint.compile_to_run)):
        ThreadWorld(mesh).run(run)


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that makes one thing, and returns it to whoever calls later."""
    made: list[Any] = []

    def shared(*args: Any) -> Any:
        if not made:
            made.append(make(*args))
        return made[0]

    return shared
