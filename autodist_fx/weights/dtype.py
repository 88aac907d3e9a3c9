"""Resolves the dtype in which a model's weights are loaded."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from autodist_fx.errors import AutodistError


def wanted_dtype(dtype: torch.dtype | str | None, config: PretrainedConfig) -> torch.dtype:
    """Return the dtype for the weights: `dtype` if it names one,
    else the config's; float32 where the config has none (GGUF).

    Raises AutodistError for a name that is no floating-point dtype.
    """
    named = config.dtype if dtype in (None, "auto") else dtype
    if named is None:
        return torch.float32
    resolved = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else named
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise AutodistError(f"no dtype {named!r} for weights: choose auto, float32, bfloat16, float16 or float64")
    return resolved
