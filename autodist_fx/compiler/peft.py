"""Unwraps models that peft has put adapters into: the model inside is compiled, and its layers hold the adapters."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
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
            f"compile takes a transformers PreTrainedModel, a config, or a PeftModel, and got {_instead(model)}"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise AutodistError(
            f"the {type(model).__name__}'s adapter adds virtual tokens outside of the model's layers, where no graph "
            "of the model has them: adapters in layers (LoRA and its like) can be compiled"
        )
    return inside


def _instead(given: Any) -> str:
    """Say what was given instead of a model, and how to come to one."""
    if isinstance(given, (str, os.PathLike)):
        return (
            f"{str(given)!r}: load it with AutoModelForCausalLM.from_pretrained, or AutoConfig.from_pretrained for a "
            "plan alone; over processes, adx.from_pretrained reads the checkpoint itself"
        )
    if isinstance(given, type):
        return f"the class {given.__name__}: give one of its models, or its config"
    if isinstance(getattr(given, "model", None), PreTrainedModel):  # of a pipeline, or a trainer
        return f"a {type(given).__name__}: give its .model"
    modules = given.named_modules() if isinstance(given, nn.Module) else ()
    inside = next((name for name, module in modules if isinstance(module, PreTrainedModel)), None)
    return f"a {type(given).__name__}" + (f": give its module {inside}" if inside else "")
