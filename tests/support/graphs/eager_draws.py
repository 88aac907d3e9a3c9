"""Models in training mode with the random numbers of split programs: the truth that these are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from passes.ops.random import keep_mask, random_state, seeded_uniform

_attention = F.scaled_dot_product_attention
ROWS_FIRST = (0, 1, 1)


class _Draws:
    """Stands in for torch's random functions in eager code. Ops are numbered as they come; rows lie along dim 0."""

    def __init__(self, state: torch.Tensor) -> None:
        self.state, self.count = state, 0

    def _number(self) -> int:
        self.count += 1
        return self.count - 1

    def dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return x
        rows = None if x.shape[0] == 1 else ROWS_FIRST  # [1, heads, ...]: a bias that is the same for all
        return x * keep_mask(self.state, self._number(), p, x.shape, rows) / (1 - p)

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
        is_causal: bool = False, **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Attention by the weights that torch's own gives for values of one at one place each."""
        places = torch.eye(k.shape[-2], dtype=v.dtype).expand(*k.shape[:-1], -1)
        weights = _attention(q, k, places, attn_mask, 0.0, is_causal, **more)
        times = q.shape[-3] // v.shape[-3]
        return self.dropout(weights, dropout_p) @ v.repeat_interleave(times, -3)

    def rand(self, *sizes: Any, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        shape = sizes[0] if isinstance(sizes[0], (tuple, list)) else sizes
        return seeded_uniform(self.state, self._number(), shape, dtype or torch.get_default_dtype(), row=ROWS_FIRST)


@contextlib.contextmanager
def seeded(monkeypatch: Any, seed: int, step: int, first_row: int = 0) -> Iterator[_Draws]:
    """Let eager code draw what split programs draw by `seed`, `step` and `first_row`."""
    draws = _Draws(random_state(seed, step, first_row))
    with monkeypatch.context() as patch:
        patch.setattr(F, "dropout", draws.dropout)
        patch.setattr(F, "scaled_dot_product_attention", draws.attention)
        patch.setattr(torch, "rand", draws.rand)
        yield draws
