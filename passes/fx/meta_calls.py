"""Calls functions on meta tensors once for all calls that are alike: the layers of a model differ in nothing there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import BuiltinFunctionType, BuiltinMethodType, FunctionType, MethodDescriptorType
from typing import Any

import torch

_PLAIN = (int, float, bool, str, complex, type(None), type(Ellipsis), torch.dtype, torch.device, torch.memory_format)
_WRITES = frozenset({"setitem", "iadd", "isub", "imul", "itruediv", "setattr", "delitem"})
_HOMES = ("torch", "_operator")
_UNKNOWN = object()


class MetaCalls:
    """Remembers what torch's functions and methods return for arguments of these shapes, strides and dtypes, and
    returns new tensors like it."""

    def __init__(self) -> None:
        self._results: dict[Any, Any] = {}

    def __call__(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any],
        run: Callable[..., Any] | None = None,
    ) -> Any:  # fmt: skip
        """Returns what `run(function, args, kwargs)` does, or without `run` what the function does; raises what it
        raises."""
        call = run or _call
        if not _is_torchs(function):
            return call(function, args, kwargs)
        key = _key((tuple(args), dict(kwargs)))
        if key is _UNKNOWN:
            return call(function, args, kwargs)
        known = self._results.get((function, key), _UNKNOWN)
        if known is not _UNKNOWN:
            return _like(known)
        result = call(function, args, kwargs)
        if _key(result) is not _UNKNOWN:
            self._results[function, key] = result
        return result


def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return function(*args, **kwargs)


def _is_torchs(function: Any) -> bool:
    """Returns whether a function is one of torch's that writes nothing."""
    if not isinstance(function, (BuiltinFunctionType, BuiltinMethodType, MethodDescriptorType, FunctionType)):
        return False
    name = function.__name__
    if name.endswith("_") or name in _WRITES:
        return False
    owner = getattr(function, "__objclass__", None)
    home = owner.__module__ if owner is not None else getattr(function, "__module__", None) or "torch"
    return str(home).partition(".")[0] in _HOMES


def _key(value: Any) -> Any:
    """Returns a key that is equal for values alike, or _UNKNOWN."""
    if isinstance(value, torch.Tensor):
        if value.device.type != "meta" or value.layout is not torch.strided:
            return _UNKNOWN
        return "tensor", value.shape, value.stride(), value.dtype, value.requires_grad
    if isinstance(value, _PLAIN):
        return type(value), value  # 1, 1.0 and True are equal in Python and different to torch
    if isinstance(value, (tuple, list)):
        parts = [_key(item) for item in value]
    elif isinstance(value, dict):
        parts = [(name, _key(item)) for name, item in value.items()]
        if any(item is _UNKNOWN for _, item in parts):
            return _UNKNOWN
    elif isinstance(value, slice):
        parts = [_key(value.start), _key(value.stop), _key(value.step)]
    else:
        return _UNKNOWN
    return _UNKNOWN if any(part is _UNKNOWN for part in parts) else (type(value), *parts)


def _like(value: Any) -> Any:
    """Returns a tensor like one that was returned before, which has a storage of its own; or such in tuples and
    lists."""
    if isinstance(value, torch.Tensor):
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return made.requires_grad_() if value.requires_grad else made
    if type(value) in (tuple, list):
        return type(value)(map(_like, value))
    if isinstance(value, tuple) and any(isinstance(item, torch.Tensor) for item in value):
        return type(value)(map(_like, value))  # torch.return_types: of one sequence
    return value
