"""functional writes."""

from __future__ import annotations

from typing import Any

import torch.fx


def with_item(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """A copy of `x` in which x[index] is `value`."""
    changed = x.clone()
    changed[index] = value
    return changed


def copied(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What x.copy_(y) leaves in x."""
    return y.to(x.dtype).expand_as(x).clone()


def changed_by(x: torch.Tensor, method: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    """A copy of `x` after that method, which changes a tensor in place, was called on it."""
    changed = x.clone()
    getattr(changed, method)(*args, **kwargs)
    return changed
