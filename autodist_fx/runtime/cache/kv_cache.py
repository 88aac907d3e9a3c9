"""The KV cache of one rank: only the layers of its stage, and only its heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from autodist_fx.calls.cache_kinds import CROSS, one_cache
from autodist_fx.runtime.cache.growing_layer import GrowingLayer
from passes.program.rank_program import RankProgram

C = TypeVar("C", bound="ReadableCache")

class ReadableCache(DynamicCache):
    """A cache whose layers can be read without writing them, and some of which may hold lengths alone.

    `counting` layers, its last (`RankProgram.length_kinds`), have a byte for a token, in which nothing stands: so they
    answer and are changed as transformers' layers are. No graph writes them: `count` does, after each step.
    """

    counting = 0

    def count(self, input_ids: torch.Tensor) -> None:
        """Let the counting layers know the tokens of a step that has run: int64 [batch, tokens]."""
        if self.counting:
            tokens = torch.zeros(input_ids.shape[0], 1, input_ids.shape[1], 1, dtype=torch.uint8)
            for layer in self.layers[-self.counting :]:
                layer.update(tokens, tokens)

    def read(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values [batch, heads, tokens, head size] of every token in that layer."""
        layer = self.layers[layer_idx]
        return layer.keys, layer.values


def local_cache(config: PretrainedConfig, program: RankProgram, cache_class: type[C] = ReadableCache) -> C:
    """Return an empty cache for `program`, whose layer i is the model's layer `program.cache_layers[i]`, of that
    layer's kind.

    The shapes come with the first tokens, so that the rank's own heads are all it ever holds. A layer that keeps all
    tokens has room for more of them (GrowingLayer).
    """
    cache = one_cache(program.cache_kinds, cache_class) if CROSS in program.cache_kinds else cache_class(config=config)
    if cache.layers and max(program.cache_layers, default=-1) >= len(cache.layers):  # some are the model's to add
        cache = one_cache(program.cache_kinds, cache_class)
    elif cache.layers:
        cache.layers = [cache.layers[index] for index in program.cache_layers]
    if program.length_kinds:
        if not cache.layers:  # the config says nothing of layers, and DynamicCache adds them as they come
            cache = one_cache(program.cache_kinds, cache_class)
        cache.layers += one_cache(program.length_kinds).layers
        cache.counting = len(program.length_kinds)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def one_of_each_kind(config: PretrainedConfig) -> tuple[Any, ...]:
    """Return empty layers of the cache of the whole model, one of each class and window."""
    try:
        layers = DynamicCache(config=config).layers
    except AttributeError:  # it names its layers otherwise
        layers = []
    kinds = {(type(layer), getattr(layer, "sliding_window", None)): layer for layer in layers}
    return tuple(kinds.values()) or (DynamicLayer(),)


def encoder_view(cache: DynamicCache, step: RankProgram, encoder: RankProgram) -> DynamicCache:
    """Return a cache of those layers of `cache`, made for `step`, that the encoder's program writes: writing them
    writes `cache`."""
    view = ReadableCache()
    view.layers = [cache.layers[step.cache_layers.index(layer)] for layer in encoder.cache_layers]
    return view


class SplitCache(ReadableCache):
    """One rank's part of a cache that is spread over all ranks; parts of one cache have one number.

    What transformers' generation does to it on the rank that drives (reorder for beam search, crop) is announced, so
    that the others do it to theirs. What it is asked of the whole model's layers, it answers of `kinds_of_all`
    (one_of_each_kind), since a stage may hold none of some kind, or none at all.
    """

    number = 0
    tokens = 0  # cached so far
    batch = 0  # rows of the last step
    mask: torch.Tensor | None = None  # the attention mask [batch, tokens] of the last step, where it is kept
    mask_tokens = 0
    announce: Callable[[str, SplitCache, torch.Tensor], None] | None = None
    kinds_of_all: tuple[Any, ...] = (DynamicLayer(),)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self.layers else self.tokens

    def note(self, input_ids: torch.Tensor) -> None:
        """Count the tokens of a step that has run, int64 [batch, tokens]."""
        self.batch, tokens = input_ids.shape
        self.tokens += tokens
        self.count(input_ids)

    @property
    def is_linear(self) -> list[bool]:
        """True, for each kind of layer, where it keeps states alone, and no keys."""
        return [hasattr(layer, "conv_states") and not isinstance(layer, CacheLayerMixin) for layer in self.kinds_of_all]

    @property
    def is_croppable(self) -> bool:
        """True if every layer of the model can forget tokens whenever it is asked to (transformers 5)."""
        return all(layer.is_croppable for layer in self.kinds_of_all)

    def activate_past_recording(self) -> None:
        """Let layers with a window keep what `crop` may bring back (transformers 5); to be called on every rank."""
        for layer in (*self.layers, *self.kinds_of_all):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows for beam search: `beam_idx` [batch], int64, has the row that each row continues."""
        if self.announce is not None:
            self.announce("reorder", self, beam_idx)
        super().reorder_cache(beam_idx)
        self.batch = beam_idx.shape[0]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, int64 or bool [rows]."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Let each row be followed by copies of itself."""
        self.reorder_cache(torch.arange(self.batch).repeat_interleave(repeats))

    def crop(self, argument: int) -> None:
        """Forget the last tokens. `argument` is what the installed transformers takes: minus their number, or with 4.57
        the number that stays, too. Raises, on every rank, what one of the model's layers raises that cannot."""
        left = self._length_after("crop", argument)
        if self.announce is not None:
            self.announce("crop", self, torch.tensor([argument]))
        if self.tokens:
            self._crop_layers(argument)
        self.tokens = left

    def _crop_layers(self, argument: int) -> None:
        super().crop(argument)

    def reset(self) -> None:
        """Forget all tokens, or what the installed transformers forgets; to be called on every rank."""
        left = self._length_after("reset")
        super().reset()
        self.tokens, self.mask, self.mask_tokens = left, None, 0

    def _length_after(self, method: str, *args: Any) -> int:
        """Return the tokens left when `method` was called: tried on a layer of each kind, of the same length and
        without numbers, so that all ranks come to the same answer, or error."""
        left = self.tokens
        for layer in copy.deepcopy(self.kinds_of_all):
            if isinstance(layer, CacheLayerMixin):
                example = torch.empty(1, 1, self.tokens, 1, device="meta")
                layer.update(example, example)
            getattr(layer, method)(*args)
            if isinstance(layer, CacheLayerMixin):
                left = layer.get_seq_length()
        return left
