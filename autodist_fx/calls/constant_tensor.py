"""`ConstantTensor`: a small tensor of a call whose values are part of a graph, written as a text.

Sizes of images in patches (image_grid_thw) and the like are such: a model's Python makes loops and splits of them, and
each combination of values has a graph of its own, as each combination of Python arguments has.
"""

from __future__ import annotations

import json

import torch

_MOST_ELEMENTS = 4096


class ConstantTensor(str):
    """A tensor's dtype and values, "int64[[1, 4, 6]]": equal texts are equal tensors, and JSON takes it."""

    __slots__ = ()

    @classmethod
    def of(cls, tensor: torch.Tensor) -> ConstantTensor:
        """Write an integer or boolean tensor of any shape."""
        return cls(f"{str(tensor.dtype).removeprefix('torch.')}{json.dumps(tensor.tolist())}")

    def tensor(self) -> torch.Tensor:
        """Read the tensor that `of` wrote, on the CPU."""
        dtype, bracket, values = self.partition("[")
        return torch.tensor(json.loads(bracket + values), dtype=getattr(torch, dtype))


def may_be_constant(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is small enough, and of integers or booleans, to be part of a graph; one of no dims is a
    length."""
    whole = not tensor.is_floating_point() and not tensor.is_complex()
    return whole and tensor.dim() > 0 and tensor.numel() <= _MOST_ELEMENTS
