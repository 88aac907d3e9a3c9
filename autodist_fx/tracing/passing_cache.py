"""A KV cache that keeps nothing, for models that need one to hand keys and values from layer to layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel


class PassingCache(DynamicCache):
    """A cache that gives back what it gets: a forward pass with it is one over the whole sequence at once.

    Where later layers attend to the keys and values of earlier ones, the cache carries them, even in a call that wants
    no cache back; called without one, such a model falls back to projections that it never uses otherwise, and computes
    something else than it does by default.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *more: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that it is given."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: nothing is cached."""
        return 0

    def get_mask_sizes(self, tokens: Any, layer_idx: int) -> tuple[int, int]:
        """Return (tokens to attend to, the first one's position). `tokens`: their number, or (4.57) their positions."""
        known = getattr(tokens, "_metadata", tokens)  # a proxy has any attribute
        return (tokens.shape[0] if isinstance(known, torch.Tensor) else tokens), 0


def shares_keys_by_cache(model: PreTrainedModel) -> bool:
    """Return whether later layers of the model take the keys and values of earlier ones from a cache. In transformers 5
    they are handed on as an argument of attention, shared_kv_states, and there is no need of one."""
    if not getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        return False
    kinds = {type(module) for module in model.modules()}
    return not any("shared_kv_states" in inspect.signature(kind.forward).parameters for kind in kinds)
