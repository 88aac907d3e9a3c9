"""Joins the two caches of an encoder-decoder model, what the decoder wrote and what reads the encoder's output, into
one.

    before  %cross = getattr(%past_key_values, "cross_attention_cache");  %kv = %cross.update(%k, %v, 3)
    after   %kv = %past_key_values.update(%k, %v, 7)

Layer 2i of the one cache is decoder layer i's own, layer 2i + 1 its cross-attention's, of kind "cross": in the order in
which the model writes them. So the passes need to know of one cache only.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
import torch.fx
from torch.fx import Node
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel

from autodist_fx.calls.cache_kinds import CROSS
from autodist_fx.errors import TracingError
from autodist_fx.tracing.cache_layers import CacheLayer, layer_kinds

PARTS = ("self_attention_cache", "cross_attention_cache")  # of an EncoderDecoderCache
# Methods that take a layer's number, and its position among the arguments.
_LAYER_ARGUMENT = {"update": 3, "get_seq_length": 1, "get_mask_sizes": 2}


def model_cache(
    config: PretrainedConfig, layers: Sequence[CacheLayer | None], batch: int, past: int
) -> EncoderDecoderCache:
    """Return the cache as the model takes it: `past` tokens of its own in each decoder layer, nothing of the encoder
    yet."""
    own = DynamicCache(config=config) if any(":" in kind for kind in _own_kinds(config)) else DynamicCache()
    for index, layer in enumerate(layers[::2]):
        if layer is not None and past:
            own.update(*layer.make(batch, past), index, {})
    return EncoderDecoderCache(own, DynamicCache())


def written_layers(model: PreTrainedModel, inputs: Mapping[str, object]) -> tuple[CacheLayer | None, ...]:
    """Return what the model writes into each layer of the one cache when it is called with these meta tensors."""
    cache = model_cache(model.config, (), 0, 0)
    meta_buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    # Without masks: some are looked at, unless traced. They change no shape.
    given: dict[str, object] = {name: value for name, value in inputs.items() if "mask" not in name}
    given["past_key_values"] = cache
    if "use_cache" in inspect.signature(model.forward).parameters:  # among **kwargs the encoder gets it, too
        given["use_cache"] = True
    with torch.no_grad():
        torch.func.functional_call(model, meta_buffers, (), given)
    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=False)
    layers: list[CacheLayer | None] = []
    for layer in (layer for pair in pairs for layer in pair):
        key, value = layer.keys, layer.values
        known = key is not None and key.dim() == 4
        layers.append(CacheLayer(key.shape[1], key.shape[3], value.shape[3], key.dtype) if known else None)
    if not any(layers):
        raise TracingError(f"{type(model).__name__} writes nothing into its cache: trace with use_cache=False")
    return tuple(layers)


def both_kinds(config: PretrainedConfig, count: int) -> tuple[str, ...]:
    """Return the kinds of the `count` layers of the one cache, as in cache_layers.layer_kinds."""
    own = _own_kinds(config)
    of_window = any(":" in kind for kind in own)
    return tuple(CROSS if i % 2 else own[i // 2] if of_window else "full" for i in range(count))


def merge_caches(graph: torch.fx.Graph) -> None:
    """Rewrite a traced graph in place: what it asks or tells either cache becomes a call on the one it takes."""
    for node in list(graph.nodes):
        if node.op == "call_method" and node.target in _LAYER_ARGUMENT:
            part = _part(node.args[0])
            if part is not None:
                _renumber(node, int(part == PARTS[1]))
    for node in reversed(list(graph.nodes)):
        if node.op != "placeholder" and _part(node) is not None:
            node.replace_all_uses_with(node.args[0])  # handed on, or given back
            graph.erase_node(node)


def _part(value: object) -> str | None:
    """Return which cache a node stands for, None if it is none; the pair of both answers for the decoder's own."""
    if not isinstance(value, Node):
        return None
    if value.op == "placeholder":
        return PARTS[0] if value.target == "past_key_values" else None
    reads = value.op == "call_function" and value.target is getattr and value.args[1] in PARTS
    return str(value.args[1]) if reads else None


def _renumber(node: Node, is_cross: int) -> None:
    position = _LAYER_ARGUMENT[str(node.target)]
    if len(node.args) > position:
        args = list(node.args)
        args[position] = 2 * args[position] + is_cross
        node.args = tuple(args)
    elif "layer_idx" in node.kwargs or is_cross:
        layer = 2 * node.kwargs.get("layer_idx", 0) + is_cross
        node.kwargs = {**node.kwargs, "layer_idx": layer}


def _own_kinds(config: PretrainedConfig) -> tuple[str, ...]:
    try:
        return layer_kinds(config)
    except AttributeError:  # names its layers otherwise: nothing to learn from it
        return ()
