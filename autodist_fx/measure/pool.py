"""Memory for what is measured: weights that lie in no cache, as in a model, and tensors that do, as activations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

POOL_BYTES = 192 * 1024**2  # some times the last-level cache of a core: what comes round again has left it
_ALIGNMENT = 64  # elements


class Pool:
    """Tensors of one dtype on one device, of small random numbers."""

    def __init__(self, dtype: torch.dtype, device: torch.device, nbytes: int = POOL_BYTES) -> None:
        self.dtype, self.device = dtype, device
        # Small numbers, so that long sums stay finite; the same ones again and again, since drawing them takes time.
        drawn = torch.empty(min(2**18, nbytes // dtype.itemsize), dtype=dtype, device=device).uniform_(-0.02, 0.02)
        self._memory = drawn.repeat(nbytes // dtype.itemsize // drawn.numel())
        self._at = 0
        self._warm: dict[tuple[int, ...], torch.Tensor] = {}

    def cold(self, shape: Sequence[int]) -> torch.Tensor:
        """Return a tensor that was not touched since the whole pool was."""
        length = prod(shape)
        if length > self._memory.numel():
            raise ValueError(f"{tuple(shape)} is more than the pool has")
        if self._at + length > self._memory.numel():
            self._at = 0
        found = self._memory[self._at : self._at + length].view(*shape)
        self._at += -(-length // _ALIGNMENT) * _ALIGNMENT
        return found

    def warm(self, shape: Sequence[int]) -> torch.Tensor:
        """Return a tensor that is the same for each call, so that it is in cache where it fits."""
        key = tuple(shape)
        if key not in self._warm:
            if sum(x.numel() for x in self._warm.values()) + prod(key) > self._memory.numel():
                self._warm.clear()
            self._warm[key] = torch.empty(key, dtype=self.dtype, device=self.device).uniform_(-1.0, 1.0)
        return self._warm[key]
