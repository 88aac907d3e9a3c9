"""A softmax for attention, by a name that graphs may hold."""

from __future__ import annotations

import torch


def safe_softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Returns the softmax of x [...] along `dim`: zeros, with gradients of zero, where all there is is -inf (a query
    that may see nothing), as torch's attention has it."""
    return torch._safe_softmax(x, dim)
