"""Lets sliding cache layers keep all tokens while the graphs of a prompt and of a step are traced.

A layer that drops what has left its window counts the tokens in a Python number, which a graph of states cannot hold,
and hands on as many keys as there are, up to the window. With all keys there is one length, that of the cache, and the
mask hides those before the window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

Patch = Callable[[Any, str, Any], None]  # (owner, name, value), undone when tracing is over


def keep_all_tokens(patch: Patch) -> None:
    """Patch transformers' sliding layers to keep and to count tokens as its others do."""
    for name in ("update", "get_mask_sizes", "get_seq_length"):
        patch(DynamicSlidingWindowLayer, name, vars(DynamicLayer)[name])
