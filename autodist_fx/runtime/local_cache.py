"""The KV cache of one rank: only the layers of its stage, and only its heads."""

from __future__ import annotations

from transformers import DynamicCache, PretrainedConfig

from passes.program import RankProgram


def local_cache(config: PretrainedConfig, program: RankProgram) -> DynamicCache:
    """An empty cache for `program`, whose layer i is the model's layer `program.cache_layers[i]`, of that layer's kind.

    The shapes come with the first tokens, so that the rank's own heads are all it ever holds.
    """
    cache = DynamicCache(config=config)
    if cache.layers:  # none: the config says nothing of layers, and DynamicCache adds them as they come
        cache.layers = [cache.layers[index] for index in program.cache_layers]
    return cache
