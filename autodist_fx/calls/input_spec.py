"""The form of an input of a graph. Not in tracing, of which ranks that start from an artifact import nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Dims = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class InputForm:
    """Of one tensor: dims, each a letter or a number, and its dtype."""

    dims: Dims
    dtype: torch.dtype
