"""Rebuilds buffers that no checkpoint holds (rotary frequencies and the like), by building the model on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.modeling_utils import no_init_weights


def non_persistent_buffers(build: Callable[[], nn.Module]) -> dict[str, torch.Tensor]:
    """Return the CPU values of the buffers that the model of `build()` leaves out of its state dict, by name.

    `build` makes the model as it would on the CPU (`lambda: AutoModelForCausalLM.from_config(config)`). Its parameters
    go to the meta device one by one as they are made, uninitialised and untouched, so a model of any size costs next
    to no memory.
    """
    with no_init_weights(), _parameters_on_meta():
        model = build()
    persistent = set(model.state_dict())
    return {
        name: buffer.detach()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name not in persistent and not buffer.is_meta
    }


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Make modules register parameters on meta, buffers as they are. It patches nn.Module, so it is not thread-safe."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
