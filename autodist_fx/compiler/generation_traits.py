"""Whose positions a family generates with where rows are padded on the left."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin, PreTrainedModel

from autodist_fx.tracing import has_own_cache


def follow_mask(model_class: type[PreTrainedModel]) -> bool:
    """Whether generate tells the model its positions, counting the tokens that the mask shows, as GenerationMixin does.

    Else, with a `prepare_inputs_for_generation` of the family's own that names no positions, the model counts for
    itself, and padding with it.
    """
    prepare = model_class.prepare_inputs_for_generation
    if prepare is GenerationMixin.prepare_inputs_for_generation:
        return True
    text = inspect.getsource(prepare)
    return "position_ids" in text or "super()" in text


def has_own_generate(model_class: type[PreTrainedModel]) -> bool:
    """Whether the family generates by code of its own (of long recordings, say), and not by transformers' generate."""
    owner = next((cls for cls in model_class.__mro__ if "generate" in cls.__dict__), GenerationMixin)
    return owner is not GenerationMixin


def keeps_cache(model: PreTrainedModel) -> bool:
    """Whether its forward takes what it made of the tokens before."""
    return "past_key_values" in inspect.signature(model.forward).parameters or has_own_cache(type(model), model.config)


def last_logits_only(model: PreTrainedModel) -> dict[str, object]:
    """Generating needs the logits of the last position; the argument that says so, where forward has it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

