"""Describes what a rank was called with by short texts that tell its call from any other: shapes, dtypes and
digests."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from autodist_fx.calls.tensor_digest import tensor_digest
from autodist_fx.runtime.cache.kv_cache import SplitCache

_OF_MODEL = "the model's "  # begins what a call goes by and is no argument of it
_MAY_DIFFER = ("streamer",)  # each rank shows the tokens as it likes
_MOST_DEEP = 3


def arguments_of(signature: inspect.Signature, model: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict:
    """Return the arguments that are not None, by name, however they were passed. Raises TypeError as the call would."""
    given: dict[str, Any] = {}
    bound = signature.bind(model, *args, **kwargs)
    for name, value in list(bound.arguments.items())[1:]:
        kind = signature.parameters[name].kind
        given.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    found = {name: value for name, value in given.items() if value is not None and name not in _MAY_DIFFER}
    found[f"{_OF_MODEL}microbatches"] = getattr(model, "microbatches", 1)
    if "synced_gpus" in signature.parameters:  # of generate, whose defaults are the model's
        found[f"{_OF_MODEL}generation_config"] = getattr(model, "generation_config", None)
    return found


def facts_of_call(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return a text for each argument, and one for their names."""
    names = sorted(name for name in arguments if not name.startswith(_OF_MODEL))
    facts = {"the list of arguments": ", ".join(names) or "empty"}
    for name in sorted(arguments):
        facts |= dict(_facts(name, arguments[name], 0))
    return facts


def _facts(name: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, torch.Tensor):
        yield name, f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} {tensor_digest(value)}"
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        text = repr(value)
        yield name, text if len(text) <= 80 else f"{text[:60]}... sha256 {_sha(text.encode())}"
    elif isinstance(value, GenerationConfig):
        yield name, f"GenerationConfig sha256 {_sha(json.dumps(value.to_dict(), default=str, sort_keys=True).encode())}"
    elif isinstance(value, SplitCache):
        yield name, f"cache {value.number} of {value.tokens} tokens"
    elif isinstance(value, Mapping) and depth < _MOST_DEEP:
        yield name, f"{type(value).__name__} of {len(value)}"
        for key in value:
            yield from _facts(f"{name}[{key!r}]", value[key], depth + 1)
    elif isinstance(value, (list, tuple, set, frozenset)) and depth < _MOST_DEEP:
        inner = "\n".join(f"{k} {v}" for item in value for k, v in _facts("", item, depth + 1))
        kinds = sorted({type(item).__name__ for item in value})
        digest = f" sha256 {_sha(inner.encode())}" if inner else ""
        yield name, f"{type(value).__name__} of {len(value)} {', '.join(kinds)}{digest}"
    else:
        yield name, getattr(value, "__qualname__", type(value).__qualname__)


def _sha(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
