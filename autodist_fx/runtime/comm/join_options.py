"""`JoinOptions`: which rank a process is, on which device, and where the ranks meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DEFAULT_TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """The options of `join`: this process's rank, device and meeting point; None where torchrun's environment variables
    say it.

    device: "cpu", "cuda" (those that are visible, in turn), or None for CUDA where there is some.
    timeout: seconds to wait for another rank, at the start and ever after.
    cuda_graphs: steps that generate are captured and replayed, on CUDA devices.
    """

    device: str | torch.device | None = None
    rank: int | None = None
    world_size: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    cuda_graphs: bool = False
