"""Kinds of KV cache layers ("full", "sliding:4096", "chunked:8192", "cross"), and a DynamicCache made of them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

STATE_PREFIX = "state_"  # begins names of graph inputs and outputs that are tensors of a model's own recurrent cache
CROSS = "cross"  # keys and values of an encoder's output, written once per prompt


def one_cache(kinds: Sequence[str], cache_class: type[DynamicCache] = DynamicCache) -> DynamicCache:
    """Make an empty cache that has one layer for each kind. A kind
    that ends in ":N" gets a layer with a window of N tokens."""
    cache = cache_class()
    for kind in kinds:
        name, _, window = kind.partition(":")
        cache.layers.append(DynamicSlidingWindowLayer(sliding_window=int(window)) if window else DynamicLayer())
    return cache
