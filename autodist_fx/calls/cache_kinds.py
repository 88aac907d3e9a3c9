"""Kinds of KV cache layers ("full", "sliding:4096", "chunked:8192", "cross"), and a cache made of them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

STATE_PREFIX = "state_"  # of inputs and outputs that are tensors of a cache of the model's own
CROSS = "cross"  # filled once, with what an encoder gives


def one_cache(kinds: Sequence[str], cache_class: type[DynamicCache] = DynamicCache) -> DynamicCache:
    """An empty cache with a layer for each kind."""
    cache = cache_class()
    for kind in kinds:
        name, _, window = kind.partition(":")
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=int(window)) if window else DynamicLayer())
    return cache
