"""The methods that transformers 5's generate asks of a model: a step is the last `next_sequence_length` tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationMixin

from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.runtime.family_inputs import family_inputs, of_family
from autodist_fx.runtime.generation.leader import Leader


class GenerationHooks(GenerationMixin):
    """Takes part in DistributedCausalLM, whose attributes these are."""

    family: Any
    _leader: Leader | None

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return a step's inputs, as GenerationMixin does of the cases that occur here; where the family has a method
        of its own for that, what it says. `next_sequence_length`: None for all of `input_ids`."""
        if self._leader is not None:
            self._leader.prepare_step()
        cache = kwargs.pop(CACHE_FIELD, None)  # its name is not the same in all of 5
        if self.family is not None:
            given = {"next_sequence_length": next_sequence_length, "is_first_iteration": is_first_iteration}
            return family_inputs(
                self.family, input_ids, {**kwargs, **given, CACHE_FIELD: cache, "attention_mask": attention_mask}
            )
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is not None:
            position_ids = position_ids[..., -input_ids.shape[1] :].contiguous()
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE_FIELD: cache,
            # generate hands on all that it was given; tokenizers are for its stop strings
            **{k: v for k, v in kwargs.items() if v is not None and not k.endswith("tokenizer")},
        }

    def _prepare_position_ids_for_generation(self, inputs_tensor: Any, model_kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the positions of a prompt: the family says which, where they are of several kinds."""
        own = of_family(self.family, "_prepare_position_ids_for_generation")
        prepare = super()._prepare_position_ids_for_generation if own is None else own
        return prepare(inputs_tensor, model_kwargs)

    def get_experts_implementation(self) -> dict[str, str]:
        """Return how transformers' own modules run experts, of which there are none: the ranks' graphs run them."""
        return {}
