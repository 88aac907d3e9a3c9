"""`StaticKeyValues`: keys and values of constant size and place, which a captured step reads and writes."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from autodist_fx.runtime.cache.kv_cache import SplitCache

_UNWRITTEN = 100.0  # in a trial of a program: a number that shows in every result that it gets into


class StaticKeyValues:
    """The layers of one rank's cache, each with room for `capacity` tokens, as a rank's program calls a cache.

    `past` [1] and `past_tokens` [], one memory, hold how many tokens were cached before a step: it writes behind them.
    The cache that a generation knows has views of these layers as its keys and values, so that whatever changes it
    (beams, crop) makes new ones, which are then copied in.
    """

    def __init__(self, cache: SplitCache, layers: int, capacity: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.layers = [
                tuple(_room(x, capacity) for x in (layer.keys, layer.values)) for layer in cache.layers[:layers]
            ]
            self.past = torch.zeros(1, dtype=torch.long, device=device)
            self.past_tokens = self.past.view(())
        self.capacity = capacity
        self._views: list[tuple[torch.Tensor, torch.Tensor]] = []  # what the cache had after the last step
        self._cache: weakref.ref[SplitCache] | None = None

    # ------------------------------------------------------------------------------------------- as programs call it

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Write one token's keys and values [batch, heads, 1, size]; return those of all `capacity` tokens."""
        for room, new in zip(self.layers[layer_idx], (keys, values), strict=True):
            room.index_copy_(2, self.past, new)
        return self.layers[layer_idx]

    def read(self, layer_idx: int) -> Any:
        """Return the keys and values of all `capacity` tokens."""
        return self.layers[layer_idx]

    # -------------------------------------------------------------------------------------------- for who runs a step

    def begin(self, cache: SplitCache, past: int) -> None:
        """Hold the first `past` tokens of `cache`, copied where they are not these layers' own."""
        self.past.fill_(past)
        mine = self._cache is not None and self._cache() is cache
        for index, rooms in enumerate(self.layers):
            layer = cache.layers[index]
            if mine and self._views and layer.keys is self._views[index][0] and layer.values is self._views[index][1]:
                continue
            for room, held in zip(rooms, (layer.keys, layer.values), strict=True):
                room[:, :, :past].copy_(held[:, :, :past])

    def fill_unwritten(self, past: int, value: float = _UNWRITTEN) -> None:
        """Put one number wherever no token's keys and values are."""
        for rooms in self.layers:
            for room in rooms:
                room[:, :, past:].fill_(value)

    def end(self, cache: SplitCache, past: int) -> None:
        """Let `cache` have the tokens after a step: views of these layers, `past` + 1 tokens long."""
        self._views = [tuple(room[:, :, : past + 1] for room in rooms) for rooms in self.layers]
        self._cache = weakref.ref(cache)
        for layer, (keys, values) in zip(cache.layers, self._views):
            layer.keys, layer.values = keys, values
            if hasattr(layer, "cumulative_length"):  # of one with a window, which is wider than this
                layer.cumulative_length = past + 1


def _room(held: torch.Tensor, capacity: int) -> torch.Tensor:
    return torch.zeros(*held.shape[:2], capacity, held.shape[3], dtype=held.dtype, device=held.device)
