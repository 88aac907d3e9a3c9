"""Facts about how a model family generates: who counts positions, whose `generate` runs, whether there is a cache."""

from __future__ import annotations

import inspect

from transformers import GenerationMixin, PreTrainedModel

from autodist_fx.tracing import has_own_cache, takes_cache


def follow_mask(model_class: type[PreTrainedModel]) -> bool:
    """True if generate passes position_ids that count the tokens shown by the attention mask, as GenerationMixin does.

    False for a family with a `prepare_inputs_for_generation` that names no positions: its model counts positions
    itself, left padding included.
    """
    prepare = model_class.prepare_inputs_for_generation
    if prepare is GenerationMixin.prepare_inputs_for_generation:
        return True
    text = inspect.getsource(prepare)
    return "position_ids" in text or "super()" in text


def has_own_generate(model_class: type[PreTrainedModel]) -> bool:
    """True if the family has a `generate` of its own (as Whisper,
    for long recordings), not transformers' common one."""
    owner = next((cls for cls in model_class.__mro__ if "generate" in cls.__dict__), GenerationMixin)
    return owner is not GenerationMixin


# The methods by which transformers' generate asks a model what its next step is given.
_ASKED = (
    "prepare_inputs_for_generation", "_prepare_position_ids_for_generation", "_expand_inputs_for_generation",
    "_update_model_kwargs_for_generation",
)  # fmt: skip


def prepares_own_inputs(model_class: type[PreTrainedModel]) -> bool:
    """Return whether the family itself says what its model is given at a step of generating, and not transformers; also
    where it reads images or sounds, which a prompt's step alone is given."""
    methods = ((getattr(model_class, name, None), getattr(GenerationMixin, name, None)) for name in _ASKED)
    modalities = getattr(model_class, "input_modalities", "text")
    reads_more = bool({modalities} - {"text"} if isinstance(modalities, str) else set(modalities) - {"text"})
    return reads_more or any(own is not None and own is not common for own, common in methods)


def is_asked(model: PreTrainedModel, *, with_encoder: bool) -> bool:
    """Return whether ranks that generate ask the model's own code how: a model with an encoder, where it has a
    generate of its own; one without, where it prepares the inputs of steps with a KV cache."""
    if with_encoder:
        return has_own_generate(type(model))
    return prepares_own_inputs(type(model)) and not has_own_cache(type(model), model.config)


def keeps_cache(model: PreTrainedModel) -> bool:
    """True if forward takes a cache: of keys and values, or a recurrent cache of the model's own."""
    return takes_cache(type(model)) or has_own_cache(type(model), model.config)


def last_logits_only(model: PreTrainedModel) -> dict[str, object]:
    """Return the argument of forward that asks for the last position's logits alone; {} where forward has none."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def step_arguments(model: PreTrainedModel) -> dict[str, object]:
    """Return the arguments of forward that a step of generating is traced with: the last position's logits alone, and
    no router logits, of which a config may ask, and whose loss is of whole sequences."""
    asked = getattr(model.config, "output_router_logits", False)
    return {**last_logits_only(model), **({"output_router_logits": False} if asked else {})}
