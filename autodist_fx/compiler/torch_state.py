"""torch's own state while a model is compiled: what the caller has set for a computation is not for the compiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from autodist_fx.tracing.patches import PATCH_LOCK

_DEVICES = ("cpu", "cuda")


def autocast_devices() -> list[str]:
    """Kinds of devices for which the caller has torch.autocast on."""
    return [device for device in _DEVICES if torch.is_autocast_enabled(device)]


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
