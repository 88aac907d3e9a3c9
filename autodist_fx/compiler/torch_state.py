"""torch's own state while a model is compiled, and while it runs: what the caller has set for a computation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from autodist_fx.calls.ambient import autocast_devices, refuse_autocast
from autodist_fx.tracing.hooks import refuse_global_hooks
from autodist_fx.tracing.patches import PATCH_LOCK


def refuse_ambient(purpose: str) -> None:
    """Raises AutodistError where something that the caller has set would change what a model computes, and is not in
    the graphs for `purpose` ("simulate"): torch.autocast, and hooks of all modules."""
    refuse_global_hooks()
    refuse_autocast(purpose)


@contextlib.contextmanager
def compiler_state() -> Iterator[None]:
    """In here torch.autocast and torch.inference_mode are off, and no other thread compiles; also a decorator.

    What is made in inference mode can never be trained, and autocast would give the constants of a graph other dtypes.
    """
    with PATCH_LOCK, contextlib.ExitStack() as undo:
        for device in autocast_devices():
            undo.callback(torch.set_autocast_enabled, device, True)
            torch.set_autocast_enabled(device, False)
        if torch.is_inference_mode_enabled():
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())  # which leaving inference mode switches on
        yield
