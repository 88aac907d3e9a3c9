"""One call of a model, split into tensors (inputs of the graph)
and Python arguments (each combination has its own graph)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from autodist_fx.calls.cache_names import cache_argument
from autodist_fx.calls.model_signature import ModelSignature
from autodist_fx.errors import AutodistError

# Inputs that a generating variant is traced with whether or not a call passes them: all others follow from the ids.
FILLED_IN = frozenset({"input_ids", "attention_mask", "position_ids", "cache_position"})

# Flags that every forward with **kwargs takes, though its signature does not name them (TransformersKwargs).
OUTPUT_FLAGS = ("output_hidden_states", "output_attentions", "output_router_logits")

# Tensors that every forward with **kwargs takes. transformers' Trainer passes the number of labels that the loss is
# divided by when it accumulates gradients over several batches.
KEYWORD_INPUTS = ("num_items_in_batch",)


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of one forward call, sorted by `read_call`."""

    tensors: dict[str, torch.Tensor]
    fixed: dict[str, object]  # Python arguments that differ from the defaults of forward's signature and the config
    use_cache: bool
    cache: Any  # the object passed as past_key_values (or cache), or None
    return_dict: bool
    filled_in: frozenset[str] = FILLED_IN  # what of these the call may leave to us; a call without a cache nothing

    def counted_by_model(self) -> Call:
        """Return the call as one whose positions, which it leaves out, are the model's own to count: none are filled
        in."""
        return replace(self, filled_in=self.filled_in - {"position_ids"})

    @property
    def way_out(self) -> str:
        """Return the end of an error that there is no graph for this call: how it could do with another; "" if it
        cannot."""
        if "position_ids" in self.filled_in | self.tensors.keys():
            return ""
        return "; or pass position_ids, which this model counts by its tokens or mask where they are left out"

    def with_mask(self, past: int) -> dict[str, torch.Tensor]:
        """Return the tensors, with the mask of ones that is filled in for a call which has a cache of `past` tokens."""
        ids = self.tensors.get("input_ids")
        if not self.use_cache or ids is None or "attention_mask" in self.tensors:
            return self.tensors
        return {**self.tensors, "attention_mask": ids.new_ones(ids.shape[0], past + ids.shape[1])}


def read_call(model: ModelSignature, inputs: Mapping[str, Any], always: Mapping[str, object]) -> Call:
    """Split the arguments of one forward call into tensors and Python arguments.

    `always` holds arguments of every call (compile's concrete_args); `inputs` may override them.

    Raises AutodistError that names an argument which forward does not take, or which has no use here.
    """
    arguments = dict(inputs)
    cache_name = cache_argument(arguments)
    use_cache = bool(arguments.pop("use_cache", False)) or cache_name is not None
    cache = arguments.pop(cache_name) if cache_name is not None else None
    return_dict = arguments.pop("return_dict", None)
    accepted = (*model.argument_names, *((*OUTPUT_FLAGS, *KEYWORD_INPUTS) if model.takes_keywords else ()))
    if unknown := sorted(name for name, value in arguments.items() if name not in accepted and value is not None):
        raise AutodistError(
            f"{model.model_class}.forward takes no {', '.join(unknown)}: it takes {', '.join(accepted)}"
        )
    for name in KEYWORD_INPUTS:
        if isinstance(arguments.get(name), (int, float)):
            arguments[name] = torch.tensor(arguments[name])  # a graph input, since its value changes from call to call
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    fixed = {name: value for name, value in always.items() if name not in tensors}
    for name, value in arguments.items():
        if isinstance(value, (bool, int, float, str)):
            fixed[name] = value
        elif value is not None and name not in tensors:
            raise AutodistError(f"{name} is a {type(value).__name__}: pass a tensor")
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & tensors.keys():  # the encoder may have run before
        _refuse_gaps(model, tensors, fixed)
    for name in OUTPUT_FLAGS:  # a flag that the call leaves out has the config's value
        if name in accepted:
            fixed.setdefault(name, bool(getattr(model.config, name, False)))
    if return_dict is None:
        return_dict = bool(getattr(model.config, "return_dict", True))
    return Call(tensors, unusual(model.parameters, fixed), use_cache, cache, bool(return_dict))


def step_call(tensors: Mapping[str, torch.Tensor], fixed: Mapping[str, object]) -> Call:
    """Return the call of a step over ranks, which has a cache, and positions unless its model counts them."""
    return Call(dict(tensors), dict(fixed), use_cache=True, cache=None, return_dict=True).counted_by_model()


def by_name(names: Sequence[str], positional: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; `names` are those of the positional ones, of which None is as if left
    out. Raises TypeError, as Python does, for too many, or one that is given twice."""
    if len(positional) > len(names):
        raise TypeError(f"forward takes {len(names)} positional arguments, and got {len(positional)}")
    given = dict(keywords)
    for name, value in zip(names, positional):
        if value is None:
            continue
        if given.get(name) is not None:
            raise TypeError(f"forward got {name} by position and by name")
        given[name] = value
    return given


def unusual(parameters: Iterable[inspect.Parameter], fixed: Mapping[str, object]) -> dict[str, object]:
    """Return the entries of `fixed` that differ from the defaults of forward's `parameters`."""
    defaults = {p.name: p.default for p in parameters}

    def is_usual(name: str, value: object) -> bool:
        return value is None or (name in OUTPUT_FLAGS and value is False) or value is defaults.get(name)

    return {name: value for name, value in fixed.items() if not is_usual(name, value)}


def _refuse_gaps(
    model: ModelSignature, tensors: Mapping[str, torch.Tensor], fixed: Mapping[str, object]
) -> None:
    """Raise AutodistError where an argument is missing that forward
    requires, or where two given arguments exclude each other."""
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


__all__ = ["Call", "by_name", "read_call", "step_call", "unusual"]
