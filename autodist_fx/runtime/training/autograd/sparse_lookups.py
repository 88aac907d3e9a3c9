"""Gives lookups gradients of the rows that were looked up alone: the dense gradient of a table of 32000 x 768 is 98 MB
for each microbatch, mostly zeros, in memory that is new to the process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

_ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class SparseLookups(TorchFunctionMode):
    """Lets lookups in tables of parameters on the CPU have sparse gradients (torch.sparse_coo), which dense ones of the
    same parameter add up with; not where the gradient of a row depends on how often it was looked up."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.embedding:
            return func(*args, **(kwargs or {}))
        call = {**dict(zip(_ARGUMENTS, args)), **(kwargs or {})}
        weight: torch.Tensor = call["weight"]
        on_cpu = weight.is_leaf and weight.device.type == "cpu"
        if on_cpu and not call.get("scale_grad_by_freq") and call.get("max_norm") is None:
            call["sparse"] = True
        return func(**call)


__all__ = ["SparseLookups"]
