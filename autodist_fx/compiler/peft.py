"""Unwraps models that peft has put adapters into: the model inside is compiled, and its layers hold the adapters."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from autodist_fx.errors import AutodistError


def without_wrapper(model: Any) -> PreTrainedModel | PretrainedConfig:
    """Return the transformers model inside a `peft.PeftModel`; return any other model, or a config, unchanged.

    Raises AutodistError where the adapter is not in the layers but in the wrapper (prompt and prefix tuning), and for
    what is no transformers model at all.
    """
    if isinstance(model, (PreTrainedModel, PretrainedConfig)):
        return model
    get_base_model = getattr(model, "get_base_model", None)
    inside = get_base_model() if callable(get_base_model) else None
    if not isinstance(inside, PreTrainedModel):
        raise AutodistError(
            f"compile takes a transformers PreTrainedModel, a config, or a PeftModel, and got a {type(model).__name__}"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise AutodistError(
            f"the {type(model).__name__}'s adapter adds virtual tokens outside of the model's layers, where no graph "
            "of the model has them: adapters in layers (LoRA and its like) can be compiled"
        )
    return inside
