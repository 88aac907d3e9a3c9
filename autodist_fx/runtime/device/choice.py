"""Chooses the device of a rank, and whether the ranks may talk over NCCL."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from autodist_fx.errors import RuntimeSetupError
from autodist_fx.runtime.comm.agreement import name_ranks
from autodist_fx.runtime.device import cuda


def choose_device(device: str | torch.device | None, local_rank: int) -> torch.device:
    """Return the device of the rank that is the `local_rank`th of its machine: CUDA, where there is some and no device
    is asked for.

    CUDA devices are those that CUDA_VISIBLE_DEVICES leaves visible, dealt out in turn: with more ranks than devices,
    ranks share. Raises RuntimeSetupError for a device that is not there, or is neither cpu nor cuda.
    """
    wanted = torch.device(device) if device is not None else None
    visible = cuda.visible_devices()
    if wanted is None:
        wanted = torch.device("cuda" if visible else "cpu")
    if wanted.type not in ("cpu", "cuda"):
        raise RuntimeSetupError(f"device {wanted} was asked for: ranks run on cpu or cuda")
    if wanted.type == "cpu":
        return wanted
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    by = f" (CUDA_VISIBLE_DEVICES={shown})" if shown is not None else ""
    if not visible:
        raise RuntimeSetupError(f"device cuda was asked for, and no CUDA device is visible{by}: use device cpu")
    if wanted.index is None:
        return torch.device("cuda", local_rank % visible)
    if wanted.index >= visible:
        raise RuntimeSetupError(f"device {wanted} was asked for, and {visible} are visible{by}")
    return wanted


def shared_devices(identities: Mapping[int, str]) -> str | None:
    """Return a line about the ranks that share a device, None where each has its own. `identities`: of the ranks'
    devices.

    NCCL takes one rank a device ("Duplicate GPU detected"); Gloo takes any, in main memory.
    """
    ranks: dict[str, list[int]] = {}
    for rank in sorted(identities):
        ranks.setdefault(identities[rank], []).append(rank)
    shared = [held for held in ranks.values() if len(held) > 1]
    if not shared:
        return None
    told = ", ".join(name_ranks(held) for held in shared)
    return (
        f"{told} share a GPU: all ranks talk over Gloo, through main memory, since NCCL takes one rank a GPU (slower "
        "than one rank alone; to try a mesh out)"
    )
