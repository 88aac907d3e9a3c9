"""The methods that the generate of transformers 4.57, and of the first of 5, asks of a model: a step is the tokens at
`cache_position`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from autodist_fx.runtime.cache.kv_cache import SplitCache
from autodist_fx.runtime.family_inputs import family_inputs
from autodist_fx.runtime.generation.leader import GrowingMask, Leader


class GenerationHooks(GenerationMixin):
    """Takes part in DistributedCausalLM, whose attributes these are."""

    family: Any
    _leader: Leader | None
    _told_positions: bool

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: SplitCache | None = None,
        attention_mask: torch.Tensor | None = None,
        cache_position: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return a step's inputs, as GenerationMixin does, which spends 0.2 ms a token on cases that do not occur
        here; where the family has a method of its own for that, what it says."""
        assert cache_position is not None
        if self._leader is not None:
            self._leader.prepare_step()
        # The first of 5 say that, too.
        first = {name: kwargs.pop(name) for name in ("is_first_iteration",) if name in kwargs}
        if self.family is not None:
            given = {"past_key_values": past_key_values, "attention_mask": attention_mask, **first}
            return family_inputs(self.family, input_ids, {**kwargs, **given, "cache_position": cache_position})
        tokens = cache_position.shape[0]
        if past_key_values is not None and input_ids.shape[1] != tokens:
            input_ids = input_ids[:, -tokens:]
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is None and attention_mask is not None and self._told_positions:
            mask = GrowingMask() if self._leader is None else self._leader.mask
            position_ids = mask.positions(attention_mask, cached=past_key_values is not None)
        if position_ids is not None and past_key_values is not None:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "position_ids": position_ids.contiguous() if position_ids is not None else None,
            "past_key_values": past_key_values,
            "cache_position": cache_position,
            # generate hands on all that it was given; tokenizers are for its stop strings
            **{k: v for k, v in kwargs.items() if v is not None and not k.endswith("tokenizer")},
        }
