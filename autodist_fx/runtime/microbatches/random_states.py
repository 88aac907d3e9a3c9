"""Random numbers of groups of rows that are generated in turns: a state for each, which the caller's state decides."""

from __future__ import annotations

from typing import Any

import torch

_MOST_SEED = 2**62


def group_seeds(count: int) -> list[int]:
    """Draw a seed for each group from the current generator of the CPU."""
    return [int(seed) for seed in torch.randint(_MOST_SEED, (count,))]


def random_state(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the generators that sampling on a device draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Any, ...], device: torch.device) -> None:
    """Set what `random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
