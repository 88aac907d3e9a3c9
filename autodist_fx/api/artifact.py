"""artifact."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from autodist_fx.artifact.reader import Artifact
from autodist_fx.runtime.comm.process_group import DEFAULT_TIMEOUT_SECONDS, started_by_torchrun
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    rank: int | None = None,
    world_size: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
) -> Artifact | DistributedCausalLM:
    """What `compiled.save(directory)` or `autodist-fx compile --out` wrote.

    Under torchrun, or with `rank`, ... given: this process's share, on `device`, as `from_pretrained` gives it. Called
    in every process alike; each reads its own graph and weights only. Otherwise an `Artifact`, of all ranks.

    Nothing in the directory is run or unpickled; a file that is not what was written is refused by name. Raises
    ArtifactError, RuntimeSetupError.
    """
    artifact = Artifact(directory)
    if rank is None and not started_by_torchrun() and not dist.is_initialized():
        return artifact
    return artifact.to_distributed(
        device=device,
        timeout=timeout,
        rank=rank,
        world_size=world_size,
        master_addr=master_addr,
        master_port=master_port,
    )
