"""Conversions of a model's outputs between the flat names of graphs and the nested containers of transformers.

    nested  {"logits": x, "hidden_states": (a, b)}
    flat    {"logits": x, "hidden_states.0": a, "hidden_states.1": b}

Each tensor of the flat form is an output of its own, and may come out of a pipeline stage of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from autodist_fx.calls.cache_names import CACHE_FIELD
from autodist_fx.calls.call import Call


@dataclass
class CallOutput(CausalLMOutputWithPast):
    """The output of a call of a model. The attributes of CausalLMOutputWithPast are None where the call has no such
    output, as in transformers' own classes; others, as `aux_loss`, are there where the model gives them."""


def flat(outputs: Any) -> dict[str, Any]:
    """Flatten nested dicts, tuples and lists into one dict with dotted
    names. Leaves of any type, None too, are kept as they are."""
    if not isinstance(outputs, Mapping):
        outputs = dict(enumerate(outputs)) if isinstance(outputs, (tuple, list)) else {"0": outputs}
    found: dict[str, Any] = {}
    for name, value in outputs.items():
        if isinstance(value, (Mapping, tuple, list)) and value:
            found.update({f"{name}.{below}": x for below, x in flat(value).items()})
        else:
            found[str(name)] = value
    return found


def nested(outputs: Mapping[str, Any], order: Iterable[str]) -> CallOutput:
    """Invert `flat`, in the order of the flat names `order`; numeric names become tuples, all others ModelOutputs."""
    found = CallOutput()
    for name, value in _nested({name: outputs[name] for name in order if name in outputs}).items():
        found[CACHE_FIELD if name == "past_key_values" else name] = value
    return found


def returned(call: Call, outputs: Mapping[str, Any], order: Iterable[str]) -> CallOutput | tuple[Any, ...]:
    """Return what the model returns of flat `outputs`, in that order:"""
    kept = {name: value for name, value in outputs.items() if call.use_cache or name != "past_key_values"}
    found = nested(kept, dict.fromkeys((*order, *outputs)))
    return found if call.return_dict else found.to_tuple()


def _nested(outputs: Mapping[str, Any]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    found: dict[str, Any] = {}
    for name, value in outputs.items():
        first, _, rest = name.partition(".")
        found[first] = value
        if rest:
            groups.setdefault(first, {})[rest] = value
    for first, group in groups.items():
        inside = _nested(group)
        found[first] = tuple(inside.values()) if all(k.isdecimal() for k in inside) else ModelOutput(inside)
    return found


def merged(of_ranks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the flat outputs of several ranks: each output comes
    from the first rank that has it (a tp group's ranks agree)."""
    found: dict[str, Any] = {}
    for outputs in of_ranks:
        for name, value in outputs.items():
            found.setdefault(name, value)
    return found
