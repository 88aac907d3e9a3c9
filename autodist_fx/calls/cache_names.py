"""Names of a call's KV cache: `past_key_values` in graphs and in transformers 4.57, `cache` in transformers 5.

A call may use any of them, with either version.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

from autodist_fx.errors import AutodistError

CACHE_ARGUMENTS = ("past_key_values", "cache", "cache_params")
# What the installed transformers calls it in its outputs and in what generate hands from step to step.
CACHE_FIELD = next(field.name for field in fields(CausalLMOutputWithPast) if field.name in CACHE_ARGUMENTS)


def cache_argument(names: Collection[str]) -> str | None:
    """Return the one of `names` that is a cache, None where none is. Raises AutodistError where several are."""
    given = [name for name in CACHE_ARGUMENTS if name in names]
    if len(given) > 1:
        raise AutodistError(f"the call has both {' and '.join(given)}: pass one of them")
    return given[0] if given else None


def cache_of(output: Any) -> Any:
    """Return the cache in an output of transformers (or of ours), None where it has none."""
    return getattr(output, CACHE_FIELD, None)
