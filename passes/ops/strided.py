"""as_strided as a function of values, as if the tensor were contiguous, however it lies in memory.

A rank's tensors are laid out in memory as its own ops happen to leave them (gathered, received, cut), so strides of the
whole model's tensors say nothing about them. The front end writes this in place of `x.as_strided`, and a contiguous
tensor's strides in place of `x.stride()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def strided(x: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int = 0) -> torch.Tensor:
    """Returns `x.contiguous().as_strided(size, stride, storage_offset)`."""
    return x.contiguous().as_strided(size, stride, storage_offset)
