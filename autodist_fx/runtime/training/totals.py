"""Adds up a step's few numbers over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autodist_fx.runtime.comm.channels import Channel
from cost_model.mesh import Mesh
from passes.ops.comm import Communicator


def total(communicator: Communicator, mesh: Mesh, rank: int, numbers: Sequence[float]) -> list[float]:
    """Return the sums of these numbers over all ranks, in float64; the same bits on every rank. All ranks have come to
    here when it returns."""
    mine = torch.tensor(numbers, dtype=torch.float64)
    if rank != 0:
        communicator.send(mine, 0, Channel.STEP_TOTALS)
        return communicator.recv(mine.shape, mine.dtype, "cpu", 0, Channel.STEP_TOTALS).tolist()
    found = mine.clone()
    for other in range(1, mesh.size):
        found += communicator.recv(mine.shape, mine.dtype, "cpu", other, Channel.STEP_TOTALS)
    for other in range(1, mesh.size):
        communicator.send(found, other, Channel.STEP_TOTALS)
    return found.tolist()
