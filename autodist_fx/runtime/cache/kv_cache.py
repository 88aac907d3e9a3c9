"""The KV cache of one rank: only the layers of its stage, and only its heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import DynamicCache, PretrainedConfig

from autodist_fx.calls.cache_kinds import CROSS, one_cache
from passes.program.rank_program import RankProgram

C = TypeVar("C", bound=DynamicCache)


class ReadableCache(DynamicCache):
    """A cache whose layers can be read without writing them."""

    def read(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values [batch, heads, tokens, head size] of every token in that layer."""
        layer = self.layers[layer_idx]
        return layer.keys, layer.values


def local_cache(config: PretrainedConfig, program: RankProgram, cache_class: type[C] = ReadableCache) -> C:
    """Return an empty cache for `program`, whose layer i is the model's layer `program.cache_layers[i]`, of that
    layer's kind.

    The shapes come with the first tokens, so that the rank's own heads are all it ever holds.
    """
    if CROSS in program.cache_kinds:
        return one_cache(program.cache_kinds, cache_class)
    cache = cache_class(config=config)
    if cache.layers:  # none: the config says nothing of layers, and DynamicCache adds them as they come
        cache.layers = [cache.layers[index] for index in program.cache_layers]
    return cache


def encoder_view(cache: DynamicCache, step: RankProgram, encoder: RankProgram) -> DynamicCache:
    """Return a cache of those layers of `cache`, made for `step`, that the encoder's program writes: writing them
    writes `cache`."""
    view = ReadableCache()
    view.layers = [cache.layers[step.cache_layers.index(layer)] for layer in encoder.cache_layers]
    return view


class SplitCache(ReadableCache):
    """One rank's part of a cache that is spread over all ranks; parts of one cache have one number.

    What transformers' generation does to it on the rank that drives (reorder for beam search, crop) is announced, so
    that the others do it to theirs.
    """

    number = 0
    tokens = 0  # cached so far; a stage may hold no layer to ask
    mask: torch.Tensor | None = None  # the attention mask [batch, tokens] of the last step, where it is kept
    mask_tokens = 0
    announce: Callable[[str, SplitCache, torch.Tensor], None] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self.layers else self.tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search: `beam_idx` [batch], int64, has the row that each row continues."""
        if self.announce is not None:
            self.announce("reorder", self, beam_idx)
        super().reorder_cache(beam_idx)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens, or leave out the last ones where it is negative."""
        if self.announce is not None:
            self.announce("crop", self, torch.tensor([max_length]))
        self._crop_layers(max_length)
        self.tokens = max_length if max_length >= 0 else self.tokens + max_length

    def _crop_layers(self, max_length: int) -> None:
        super().crop(max_length)
