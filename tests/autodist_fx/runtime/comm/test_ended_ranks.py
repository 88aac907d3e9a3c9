"""A rank that has ended in good order is not waited for: whoever calls what is called on all ranks is told at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.process_group import JoinOptions, join
from cost_model.mesh import Mesh
from tests.support.forked import on_processes

MOST_SECONDS = 5.0


@pytest.mark.distributed
@pytest.mark.parametrize("alone", [0, 1])
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(pp=2)], ids=str)
def test_the_rank_that_goes_on_is_told_who_has_ended(mesh: Mesh, alone: int) -> None:
    def work(rank: int) -> Any:
        communicator: Any = join(mesh, JoinOptions(device="cpu", timeout=60)).communicator
        x = torch.tensor([rank + 1.0])
        if mesh.tp == 2:
            assert communicator.all_reduce(x, "tp").item() == 3.0  # what is sent last arrives
        if rank != alone:
            return None
        began, error = time.monotonic(), None
        try:
            if mesh.tp == 2:
                communicator.all_reduce(x, "tp")
            else:
                communicator.recv((1,), torch.float32, "cpu", 1 - rank, 0)
        except CommunicationError as raised:
            error = str(raised)
        return error, time.monotonic() - began

    error, seconds = on_processes(2, work)[alone]
    assert f"waits for rank {1 - alone}, which ended before" in error
    assert seconds < MOST_SECONDS
