"""Writes into a tensor as functions of values, which leave the tensor that they are given as it is."""

from __future__ import annotations

from typing import Any

import torch.fx


def with_item(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """Returns a copy of `x` in which x[index] is `value`."""
    changed = x.clone()
    changed[index] = value
    return changed


def copied(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns what x.copy_(y) leaves in x: `y` in the shape and dtype of `x`."""
    return y.to(x.dtype).expand_as(x).clone()


def changed_by(x: torch.Tensor, method: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Returns a copy of `x` after a method was called on it that changes a tensor in place."""
    changed = x.clone()
    getattr(changed, method)(*args, **kwargs)
    return changed
