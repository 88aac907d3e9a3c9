"""Handles torch's ambient state (autocast, inference mode,
global hooks), which the caller may have set around our calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from autodist_fx.calls.ambient import autocast_devices, refuse_autocast
from autodist_fx.tracing.hooks import refuse_global_hooks
from autodist_fx.tracing.patches import PATCH_LOCK


def refuse_ambient(purpose: str) -> None:
    """Raise AutodistError where torch.autocast or global module hooks would change
    what the model computes: the graphs for `purpose` ("simulate") do not have them."""
    refuse_global_hooks()
    refuse_autocast(purpose)


@contextlib.contextmanager
def compiler_state() -> Iterator[None]:
    """Switch torch.autocast and torch.inference_mode off, and keep other threads from compiling; also a decorator.

    Tensors made in inference mode can never be trained, and autocast would give a graph's constants other dtypes.
    """
    with PATCH_LOCK, contextlib.ExitStack() as undo:
        for device in autocast_devices():
            undo.callback(torch.set_autocast_enabled, device, True)
            torch.set_autocast_enabled(device, False)
        if torch.is_inference_mode_enabled():
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())  # leaving inference mode would switch gradients on
        yield
