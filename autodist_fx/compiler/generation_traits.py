"""Whose positions a family generates with where rows are padded on the left."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin, PreTrainedModel


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
