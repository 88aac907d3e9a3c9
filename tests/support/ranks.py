"""A model split over ranks as processes have it, a thread each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.from_checkpoint import distribute
from cost_model.mesh import Mesh


def on_ranks(model: PreTrainedModel, mesh: Mesh, work: Callable[[Any], Any]) -> list[Any]:
    """`work(the rank's share)`, by rank; a thread each."""

    def run(rank: int, communicator: Any) -> Any:
        joined = JoinedRank(mesh, rank, torch.device("cpu"), communicator)
        planning = dict.fromkeys(("hardware", "pin", "cuts", "max_memory", "device_map")) | {"objective": "shard"}
        with torch.no_grad():
            return work(distribute(model, joined, planning=planning, verify=True, dump_dir=None))

    return ThreadWorld(mesh).run(run)
