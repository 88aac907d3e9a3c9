"""Traces models with a cache class of their own: their states become inputs and outputs, in two graphs.

    prompt  (input_ids, attention_mask)                       -> logits, state_conv_states_0, state_key_cache_1, ...
    step    (input_ids of one token, ..., state_conv_states_0, ...) -> logits, state_conv_states_0, ...

Such models do something else for a prompt than for a step after it, and their caches have attributes, lists and methods
as each model pleases. The model's own cache object is used while tracing, with proxies for its tensors, so that all its
Python runs; what is left in it at the end are the graph's outputs, and the second graph starts from the same object
with inputs in their places. States kept on modules are treated alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_kinds import STATE_PREFIX as PREFIX
from autodist_fx.tracing.versions.forwards import (
    asked_of_generate,
    is_given_cache,
    keeps_states,
    own_forward,
    takes_cache,
)

_TOKENS = 3  # of the made-up prompt that the model prepares its inputs for


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor of the cache: an input of the step's graph, an output of both. Dims are numbers, "B" or "P" (cached)."""

    name: str
    dims: tuple[int | str, ...]
    dtype: torch.dtype

    def make(self, batch: int, past: int) -> torch.Tensor:
        """Return an example, on meta."""
        sizes = {"B": batch, "P": past}
        return torch.empty([sizes[d] if isinstance(d, str) else d for d in self.dims], dtype=self.dtype, device="meta")


def has_own_cache(model_class: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Return whether the model decodes with something else than keys and values in transformers' DynamicCache."""
    if not getattr(model_class, "can_generate", lambda: False)():
        return False
    if not model_class._supports_default_dynamic_cache() or not takes_cache(model_class):
        return True
    return keeps_states(config)


@dataclass
class Prepared:
    """The answer of the model's own `prepare_inputs_for_generation`: names of tensor inputs, and the cache it made."""

    tensors: tuple[str, ...]
    cache_name: str = ""
    cache: Any = None


def prepared_prompt(model: PreTrainedModel, batch: int, accepted: list[str]) -> Prepared:
    """Return what it says for a prompt of `batch` rows, without a cache."""
    ids = torch.ones(batch, _TOKENS, dtype=torch.long)
    prepared = _prepared(model, accepted, ids, torch.arange(_TOKENS), "", None)
    if is_given_cache(type(model)):
        return Prepared(prepared.tensors, "past_key_values", DynamicCache(config=model.config))
    return prepared


def prepared_step(model: PreTrainedModel, batch: int, accepted: list[str], cache_name: str, cache: Any) -> Prepared:
    """Return what it says for one token more, with a cache."""
    ids = torch.ones(batch, _TOKENS + 1, dtype=torch.long)
    return _prepared(model, accepted, ids, torch.tensor([_TOKENS]), cache_name, cache)


def _prepared(
    model: PreTrainedModel, accepted: list[str], ids: torch.Tensor, positions: torch.Tensor, cache_name: str, cache: Any
) -> Prepared:
    cls = type(model)
    device = cls.device
    own_names = own_forward(cls)[1]
    kept = {own_names.get(cache_name, cache_name): cache} if cache_name else {}
    asked = asked_of_generate(positions, len(ids), is_first=not cache_name)
    cls.device = property(lambda self: torch.device("cpu"))  # parameters are on meta, and the cache starts with zeros
    try:
        given = model.prepare_inputs_for_generation(
            ids, attention_mask=torch.ones_like(ids), use_cache=True, **asked, **kept
        )
    finally:
        cls.device = device
    tensors = tuple(n for n, v in given.items() if isinstance(v, torch.Tensor) and n in accepted)
    for name, value in given.items():
        if name in accepted and name not in kept and value is not None and is_container(value):
            return Prepared(tensors, name, value)
    return Prepared(tensors, cache_name, cache)


# -- the tensors of a cache -------------------------------------------------------------------------------------------


def is_container(value: Any) -> bool:
    """Return whether a value is a cache, list, tuple or dict that tensors may be in."""
    if isinstance(value, (list, tuple, dict)):
        return True
    plain = isinstance(value, (torch.Tensor, Proxy, nn.Module, PretrainedConfig, type, str, torch.device, torch.dtype))
    return not plain and hasattr(value, "__dict__") and not callable(value)


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(k), v) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((str(i), v) for i, v in enumerate(value))
    else:
        yield from vars(value).items()


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor, or a proxy of one."""
    return isinstance(value, torch.Tensor) or (
        isinstance(value, Proxy) and isinstance(getattr(value, "_metadata", None), torch.Tensor)
    )


def tensors_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return (path, tensor or proxy) of everything in a cache, in order."""
    if is_tensor(value):
        yield path, value
    elif is_container(value):
        for name, item in _items(value):
            yield from tensors_of(item, f"{path}_{name}" if path else name)


def with_tensors(value: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """Return a copy of a cache in which each tensor is change(path, tensor); its other contents are shared.

    A proxy of anything else (the dtype that the cache was made with) becomes what it stands for.
    """
    if is_tensor(value):
        return change(path, value)
    if isinstance(value, Proxy):
        return getattr(value, "_metadata", None)
    if not is_container(value):
        return value
    items = {name: with_tensors(item, change, f"{path}_{name}" if path else name) for name, item in _items(value)}
    if isinstance(value, dict):
        return type(value)(zip(value, items.values(), strict=True))
    if isinstance(value, (list, tuple)):
        return type(value)(items.values())
    changed = copy.copy(value)
    vars(changed).update(items)
    return changed


def module_states(model: nn.Module, left_by_calls: Collection[str]) -> dict[tuple[str, str], Proxy]:
    """Return what modules keep as plain attributes, by (module, attribute): proxies that a trace has left there.
    Those in `left_by_calls`, paths, are of no sequence: all calls have them (value_branches.py)."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Proxy) and is_tensor(value) and f"{path}.{name}" not in left_by_calls
    }


def state_name(path: str) -> str:
    """Return the name of the graph input of a state, from its path in the cache."""
    return PREFIX + path.replace(".", "_")


def state_tensor(
    name: str, examples: tuple[torch.Tensor, torch.Tensor], sizes: Mapping[str, tuple[int, int]]
) -> StateTensor:
    """Return the StateTensor of `examples`, the tensor at two choices of the sizes "B" and "P" in `sizes`, which
    tell them from numbers."""
    symbols = {pair: symbol for symbol, pair in sizes.items() if pair[0] != pair[1]}
    dims = tuple(symbols.get(pair, pair[0]) for pair in zip(examples[0].shape, examples[1].shape, strict=True))
    return StateTensor(name, dims, examples[0].dtype)
