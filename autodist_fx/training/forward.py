"""Runs a forward pass alone, of all stages that a rank has: nothing is trained, and every rank gets all outputs."""

from __future__ import annotations

from typing import Any

import torch

from autodist_fx.runtime.share_outputs import share_outputs
from autodist_fx.runtime.table_checks import lookups_checked
from autodist_fx.runtime.training.replica_communicator import (
    Letters,
    ReplicaCommunicator,
    TrainingCommunicator,
    runs_on,
)
from autodist_fx.runtime.training.stage import Microbatch
from cost_model.mesh import Mesh
from cost_model.schedule.schedule import Schedule
from passes.ops.comm import using


@torch.no_grad()
def run_forward(
    communicator: TrainingCommunicator,
    mesh: Mesh,
    rank: int,
    schedule: Schedule,
    microbatch: Microbatch,
    device: torch.device,
) -> dict[str, Any]:
    """Return the flat outputs of the programs of `microbatch`, of all stages; called on all ranks. `schedule` says
    which rank has which stage; each replica runs all of it."""
    owner = runs_on(mesh, schedule.stage_ranks, mesh.dp_rank(rank))
    letters: Letters = {}
    found: dict[str, Any] = {}
    for stage, program in sorted(microbatch.programs.items()):
        own = ReplicaCommunicator(communicator, rank, program.rank, owner, letters, None)
        inputs, graph = microbatch.inputs_of(stage), program.graph_module
        with lookups_checked(graph, inputs), using(own):
            found |= {name: x for name, x in graph(**inputs).items() if name not in found}
    communicator.finish_sends()
    return share_outputs(communicator, mesh, rank, found, device)
