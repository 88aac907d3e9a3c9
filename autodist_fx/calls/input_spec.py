"""Dims and dtype of one graph input.

This file lives outside autodist_fx.tracing so that a rank started from an artifact never imports the tracer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch

Dims = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """The input spec of one graph input: its dtype, and its dims, each a number, a size symbol ("B", "S", ...) or
    a multiple of one ("S*8": eight frames of sound for each token)."""

    dims: Dims
    dtype: torch.dtype


def size_of(dim: str | int, lengths: Mapping[str, int]) -> int:
    """Return the size of a dim, by the lengths of the size symbols."""
    if isinstance(dim, int):
        return dim
    symbol, times = parts_of(dim)
    return lengths[symbol] * times


def is_symbol(dim: str | int) -> TypeGuard[str]:
    """Return whether a dim is a size symbol itself."""
    return isinstance(dim, str) and "*" not in dim


def parts_of(dim: str) -> tuple[str, int]:
    """Return the size symbol of a dim, and how many times its length the size is."""
    symbol, _, times = dim.partition("*")
    return symbol, int(times or 1)
