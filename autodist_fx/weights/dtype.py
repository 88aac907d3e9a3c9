"""dtype."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from autodist_fx.errors import AutodistError


def wanted_dtype(dtype: torch.dtype | str | None, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the weights: as named, else the config's (a GGUF file's has none: float32, what it is turned into).

    Raises AutodistError for a text that names none.
    """
    said = config.dtype if dtype in (None, "auto") else dtype
    if said is None:
        return torch.float32
    found = getattr(torch, said.removeprefix("torch."), None) if isinstance(said, str) else said
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise AutodistError(f"no dtype {said!r} for weights: choose auto, float32, bfloat16, float16 or float64")
    return found
