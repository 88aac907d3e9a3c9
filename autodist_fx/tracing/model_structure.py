"""`structure_of`: reads all that a trace of a model depends on, without the values of its parameters and buffers.

Two structures of one model are equal as long as a new trace would give the same graph. It differs after what changes
modules, names, shapes, dtypes, ties or `requires_grad`, the mode (train or eval), the config, an attribute of a module
(an adapter that is switched, its scaling), a hook or a forward that is patched, what these reach, or torch's default
dtype. Values of parameters and buffers are
inputs of a graph; tensors that are neither become its constants, so that their contents count.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import types
from collections import OrderedDict
from collections.abc import Collection, Hashable, Mapping, Set
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from autodist_fx.tracing.hooks import own_forward, reached
from autodist_fx.tracing.meta_model import holds_tensors, names_left_by_calls
from autodist_fx.tracing.patches import FLAGS_SET_FOR_TRACING, PATCH_LOCK
from autodist_fx.tracing.versions.capturing_hooks import INSTALLED, captures_outputs

_PLAIN = frozenset((type(None), bool, int, str, bytes, complex, type, torch.dtype, torch.device))
_CONTAINERS = frozenset((dict, OrderedDict, set))
_APART = (  # equal to themselves alone: what these hold is not read
    types.ModuleType, logging.Logger, PreTrainedTokenizerBase, torch.optim.Optimizer,
)  # fmt: skip
_FLAGS = frozenset((*FLAGS_SET_FOR_TRACING, *(f"_{name}" for name in FLAGS_SET_FOR_TRACING)))


def structure_of(model: nn.Module | PretrainedConfig, left_by_calls: Collection[str] = ()) -> Hashable:
    """Read the structure of a model, or of a config, as it stands: a few ten milliseconds for 1000 modules.

    `left_by_calls`: paths of attributes and buffers that calls of the model change ("model.rotary_emb.inv_freq"), as a
    split of it does with its own. They do not count.
    """
    left: dict[nn.Module, set[str]] = {}
    modules = dict(model.named_modules()) if isinstance(model, nn.Module) and left_by_calls else {}
    for parent, _, name in (path.rpartition(".") for path in left_by_calls):
        if parent in modules:  # else the model has changed since
            left.setdefault(modules[parent], set()).add(name)
    with PATCH_LOCK:  # a trace in another thread replaces the forward of classes while it lasts
        return torch.get_default_dtype(), _Reader(left).value(model)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Itself:
    """An object that is equal to itself alone; it is kept, so that no other object gets its id meanwhile."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class _Reader:
    """Reads one model. What it meets a second time it refers to by number, which keeps ties and ends circles."""

    def __init__(self, left_by_calls: Mapping[nn.Module, Set[str]]) -> None:
        self._left = left_by_calls
        self._numbers: dict[int, int] = {}

    def value(self, value: Any) -> Hashable:
        """Return a value as plain data that can be compared."""
        if type(value) in _PLAIN or isinstance(value, (Enum, type)):
            return type(value), value  # with the type, for 1 == True
        if isinstance(value, float):
            return float, repr(value)  # nan is not equal to itself
        if isinstance(value, tuple):
            return type(value), *map(self.value, value)
        if id(value) in self._numbers:
            return "seen", self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, torch.Tensor):
            return contents_of(value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(map(self.value, value))
        if isinstance(value, Mapping):
            return type(value), *((self.value(key), self.value(item)) for key, item in value.items())
        if isinstance(value, list):
            return type(value), *map(self.value, value)
        return self._object(value)

    def _object(self, value: Any) -> Hashable:
        if isinstance(value, functools.partial):
            return functools.partial, self.value(value.func), self.value(value.args), self.value(value.keywords)
        if isinstance(value, types.MethodType):
            return types.MethodType, _Itself(value.__func__), self.value(value.__self__)
        if isinstance(value, GenerationConfig):
            return GenerationConfig
        if isinstance(value, np.ndarray):
            return np.ndarray, value.shape, value.dtype.str, _digest(value)
        if isinstance(value, types.FunctionType):  # of a hook, say, which adds a vector times a number
            return _Itself(value), *reached(value, modules=False)
        if isinstance(value, _APART):
            return _Itself(value)
        attributes = getattr(value, "__dict__", None)
        if not isinstance(attributes, dict):
            return _Itself(value)
        skipped = _FLAGS if isinstance(value, PretrainedConfig) else frozenset[str]()
        return type(value), *((n, self.value(attributes[n])) for n in sorted(attributes) if n not in skipped)

    def _module(self, module: nn.Module) -> Hashable:
        found: list[Any] = [type(module), type(module).forward]
        attributes, left = vars(module), self._left.get(module, frozenset())
        for name in sorted(set(attributes) - left - {INSTALLED}):
            value = attributes[name]
            if type(value) in _CONTAINERS and not value:
                continue  # most are: a module has a dozen kinds of hooks
            if name == "forward" and own_forward(module) is None:
                continue  # its class's, put back (4.57, after a call that captured outputs)
            if name.endswith("_hooks") and isinstance(value, Mapping):  # by numbers that grow with each hook
                hooks = [hook for hook in value.values() if not captures_outputs(hook)]
                found += [(name, *map(self.value, hooks))] if hooks else []
            elif name in ("_parameters", "_buffers"):
                found.append((name, *((k, self._registered(item)) for k, item in value.items() if k not in left)))
            elif not (holds_tensors(value) and name in names_left_by_calls(type(module))):
                found.append((name, self.value(value)))
        return tuple(found)

    def _registered(self, tensor: torch.Tensor | None) -> Hashable:
        if tensor is None:
            return None
        number = self._numbers.setdefault(id(tensor), len(self._numbers))
        return type(tensor), tuple(tensor.shape), tensor.dtype, tensor.requires_grad, number


def contents_of(tensor: torch.Tensor) -> Hashable:
    """Return shape, dtype and values of a tensor; on meta there are no values."""
    facts = type(tensor), tuple(tensor.shape), tensor.dtype, tensor.requires_grad
    if tensor.is_meta:
        return facts
    if tensor.layout != torch.strided or tensor.is_quantized:
        return *facts, _Itself(tensor), tensor._version
    plain = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return *facts, _digest(plain.numpy())


def _digest(values: np.ndarray[Any, Any]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).digest()
