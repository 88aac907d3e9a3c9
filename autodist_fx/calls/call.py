"""One call of a model, sorted: tensors, which are inputs of a graph, and arguments, for which there is a graph each."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autodist_fx.calls.model_signature import ModelSignature
from autodist_fx.errors import AutodistError

# What a call without them gets: the others follow from the ids.
FILLED_IN = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position"})

# What every forward with **keywords takes, though its signature doesn't say so (transformers' TransformersKwargs).
OUTPUT_FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")

# The same, of tensors: how many labels a loss is divided by, where a batch is one of several (transformers' Trainer).
KEYWORD_INPUTS = ("num_items_in_batch",)


@dataclass(frozen=True, slots=True)
class Call:
    tensors: dict[str, torch.Tensor]
    fixed: dict[str, object]  # every other argument that is not as forward's signature and the config have it
    use_cache: bool
    cache: Any  # what was passed as past_key_values
    return_dict: bool


def read_call(model: ModelSignature, inputs: Mapping[str, Any], always: Mapping[str, object]) -> Call:
    """Sort the arguments of one call of a model. `always` are arguments of every call (compile's concrete_args), which
    this one may override.

    Errors: AutodistError, which names an argument that forward does not take, or that is of no use here.
    """
    given = dict(inputs)
    use_cache = bool(given.pop("use_cache", False)) or "past_key_values" in given
    cache = given.pop("past_key_values", None)
    return_dict = given.pop("return_dict", None)
    takes = (*model.argument_names, *((*OUTPUT_FLAGS, *KEYWORD_INPUTS) if model.takes_keywords else ()))
    if unknown := sorted(name for name, value in given.items() if name not in takes and value is not None):
        raise AutodistError(
            f"{model.model_class}.forward takes no {', '.join(unknown)}: it takes {', '.join(takes)}"
        )
    for name in KEYWORD_INPUTS:
        if isinstance(given.get(name), (int, float)):
            given[name] = torch.tensor(given[name])  # another one in each call
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    fixed = {name: value for name, value in always.items() if name not in tensors}
    for name, value in given.items():
        if isinstance(value, (bool, int, float, str)):
            fixed[name] = value
        elif value is not None and name not in tensors:
            raise AutodistError(f"{name} is a {type(value).__name__}: pass a tensor")
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & tensors.keys():  # the encoder may have run before
        _refuse_gaps(model, tensors, fixed)
    for name in OUTPUT_FLAGS:  # asked for in the config
        if name in takes:
            fixed.setdefault(name, bool(getattr(model.config, name, False)))
    if return_dict is None:
        return_dict = bool(getattr(model.config, "return_dict", True))
    return Call(tensors, unusual(model.parameters, fixed), use_cache, cache, bool(return_dict))


def unusual(parameters: Iterable[inspect.Parameter], fixed: Mapping[str, object]) -> dict[str, object]:
    """Those arguments that differ from what forward's `parameters` have for them."""
    defaults = {p.name: p.default for p in parameters}

    def is_usual(name: str, value: object) -> bool:
        return value is None or (name in OUTPUT_FLAGS and value is False) or value is defaults.get(name)

    return {name: value for name, value in fixed.items() if not is_usual(name, value)}


def _refuse_gaps(
    model: ModelSignature, tensors: Mapping[str, torch.Tensor], fixed: Mapping[str, object]
) -> None:
    """Raises AutodistError for what forward cannot do without, and for what it cannot have both of."""
    name, takes = model.model_class, [p.name for p in model.parameters]
    required = [p.name for p in model.parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [n for n in required if n not in tensors and n not in fixed]:
        raise AutodistError(f"{name}.forward needs {', '.join(missing)}")
    ids, embeds = "input_ids", "inputs_embeds"
    if ids in takes and embeds in takes:
        if ids in tensors and embeds in tensors:
            raise AutodistError(f"{name} got both {ids} and {embeds}: pass one of them")
        if ids not in tensors and embeds not in tensors and "encoder_outputs" not in (*tensors, *fixed):
            others = [n for n in ("pixel_values", "input_features", "input_values") if n in tensors]
            if not others:
                raise AutodistError(f"{name} got neither {ids} nor {embeds}: pass one of them")


__all__ = ["Call", "read_call", "unusual"]
