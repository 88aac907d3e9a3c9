"""Finds what a model writes into its KV cache: kinds of the layers from the config, shapes by asking the model
itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_kinds import one_cache
from autodist_fx.tracing.patches import kept_tensors

_PROBE_BATCH, _PROBE_SEQ = 2, 3


@dataclass(frozen=True, slots=True)
class CacheLayer:
    """One layer of a KV cache: keys are [batch, heads, tokens, key_dim], values [batch, heads, tokens, value_dim]."""

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    def make(self, batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of that many tokens, on meta."""
        key = torch.empty(batch, self.heads, tokens, self.key_dim, dtype=self.dtype, device="meta")
        return key, key.new_empty(batch, self.heads, tokens, self.value_dim)


def new_cache(config: PretrainedConfig, added_kinds: Sequence[str] = ()) -> DynamicCache:
    """Return the empty cache that transformers' generate makes for this config, and behind it one layer for each of
    `added_kinds`."""
    cache = DynamicCache(config=config)
    cache.layers += one_cache(added_kinds).layers
    return cache


def layer_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the kind of each cache layer: "full", "sliding:<window>" or "chunked:<size>", the window and the size
    in tokens."""
    decoder = config.get_text_config(decoder=True)
    return _kinds(new_cache(config).layers, getattr(decoder, "layer_types", None) or ())


def _kinds(layers: Sequence[Any], layer_types: Sequence[str]) -> tuple[str, ...]:
    kinds = []
    for index, layer in enumerate(layers):
        if not getattr(layer, "is_sliding", False):
            kinds.append("full")
        elif index < len(layer_types) and layer_types[index] == "chunked_attention":
            kinds.append(f"chunked:{layer.sliding_window}")
        else:
            kinds.append(f"sliding:{layer.sliding_window}")
    return tuple(kinds)


def cache_layers(model: PreTrainedModel) -> tuple[tuple[CacheLayer | None, ...], tuple[str, ...]]:
    """Return what each cache layer receives from the model, None for a layer that it never writes; and the kinds of
    layers, the last of these, that the model adds itself to those of its config (one for each run of a layer, say).

    `model` has its parameters on meta and is called within `traceable`. Runs its forward once on meta tensors, so that
    grouped heads, latent attention and layers that share their keys need no knowledge of config names; a model that
    cannot be run like this is taken to be what the config's usual names say.
    """
    cache, complete = _cache_after_one_call(model)
    layers: list[CacheLayer | None] = []
    for layer in cache.layers:
        key, value = layer.keys, layer.values
        if key is None or key.dim() != 4:
            layers.append(None)
        else:
            layers.append(CacheLayer(key.shape[1], key.shape[3], value.shape[3], key.dtype))
    if not any(layers):
        return _layers_by_config(model), ()
    if not complete:  # the layers that it did not get to are taken to be like the last one that it did
        last = max(i for i, layer in enumerate(layers) if layer is not None)
        layers[last + 1 :] = [layers[last]] * (len(layers) - last - 1)
    listed = len(new_cache(model.config).layers)  # 0 where DynamicCache adds each when it is first written
    return tuple(layers), _kinds(cache.layers[listed:], ()) if listed else ()


def _cache_after_one_call(model: PreTrainedModel) -> tuple[DynamicCache, bool]:
    """Return the cache, and whether the call came to its end: one that looks at values stops in the first layer that
    does."""
    cache = new_cache(model.config)
    ids = torch.empty(_PROBE_BATCH, _PROBE_SEQ, dtype=torch.long, device="meta")
    inputs = {
        "input_ids": ids,
        "attention_mask": ids,
        "position_ids": ids,
        "past_key_values": cache,
        "cache_position": ids[0],
        "use_cache": True,
    }
    taken = inspect.signature(model.forward).parameters
    meta_buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad(), kept_tensors(model):
            given = {name: value for name, value in inputs.items() if name in taken}
            torch.func.functional_call(model, meta_buffers, (), given)
    except Exception:
        return cache, False
    return cache, True


def _layers_by_config(model: PreTrainedModel) -> tuple[CacheLayer | None, ...]:
    decoder = model.config.get_text_config(decoder=True)
    query_heads = decoder.num_attention_heads
    heads = getattr(decoder, "num_key_value_heads", None) or query_heads
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // query_heads
    return (CacheLayer(heads, head_dim, head_dim, model.dtype),) * len(new_cache(model.config).layers)
