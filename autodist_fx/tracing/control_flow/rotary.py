"""Traces rotary embeddings whose frequencies change with the length of a sequence ("dynamic", "longrope").

transformers' `dynamic_rope_update` is a decorator of their forward: it sets `inv_freq` by the largest position, then
forward computes the table. Only the first part asks for values; it is traced by itself (value_branches.py), so that
there is one table in the graph.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import dynamic_rope_update

from autodist_fx.tracing.control_flow.value_branches import trace_both_ways


def updating_frequencies(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a forward that the decorator decorates, as it can be traced; None for any other."""
    decorated = _decorated(forward)
    return None if decorated is None else _with_update(_without_forward(decorated), inspect.unwrap(decorated))


def _decorated(forward: Any) -> Any:
    """Return the function that the decorator made, under what transformers and torch wrap around it; None without.

    What others wrap around it is of the model: then the whole is traced as any module is.
    """
    while hasattr(forward, "__wrapped__") and forward.__globals__["__name__"].startswith(("transformers.", "torch.")):
        if any(forward.__code__ is inner for inner in _CODES):
            return forward
        forward = forward.__wrapped__
    return None


_CODES = [inner for inner in dynamic_rope_update.__code__.co_consts if isinstance(inner, types.CodeType)]


def _with_update(update: Callable[..., None], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def forward(self: nn.Module, x: Any, position_ids: Any, *more: Any, **named: Any) -> Any:
        tracer = getattr(position_ids, "tracer", None)  # without one, shapes are asked for alone
        if tracer is not None:
            trace_both_ways(tracer, self, functools.partial(update, self, x, position_ids, *more, **named))
        return plain(self, x, position_ids, *more, **named)

    return forward


def _without_forward(wrapper: types.FunctionType) -> Callable[..., None]:
    cells = zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)
    closure = tuple(types.CellType(_nothing) if name == "rope_forward" else cell for name, cell in cells)
    update = types.FunctionType(wrapper.__code__, wrapper.__globals__, argdefs=wrapper.__defaults__, closure=closure)

    def updated(self: nn.Module, x: Any, *given: Any, **named: Any) -> None:
        # The frequencies that do not follow the positions are constants of the graph, where the module's own are.
        update(self, types.SimpleNamespace(device=_device(self)), *given, **named)

    return updated


def _device(module: nn.Module) -> torch.device:
    return next((buffer.device for buffer in module.buffers()), torch.device("cpu"))


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
