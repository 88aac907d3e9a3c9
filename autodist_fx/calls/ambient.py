"""Refuses torch state that the caller has set around a call and that would change what a model computes."""

from __future__ import annotations

import torch

from autodist_fx.errors import AutodistError

_DEVICES = ("cpu", "cuda")


def autocast_devices() -> list[str]:
    """List the device types for which the caller has torch.autocast on, in this thread."""
    return [device for device in _DEVICES if torch.is_autocast_enabled(device)]


def refuse_autocast(purpose: str) -> None:
    """Raise AutodistError under torch.autocast: a graph has neither the parts of a model that switch it off (rotary
    positions) nor tensors of other dtypes between stages."""
    if devices := autocast_devices():
        raise AutodistError(
            f"{purpose} computes in the dtypes that the model has, and torch.autocast is on ({', '.join(devices)}): "
            "call it outside of autocast, with the model converted by .to(torch.bfloat16)"
        )
