"""Dims and dtype of one graph input.

This file lives outside autodist_fx.tracing so that a rank started from an artifact never imports the tracer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Dims = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The input spec of one graph input: its dtype, and its dims, each a number or a size symbol ("B", "S", ...)."""

    dims: Dims
    dtype: torch.dtype
