"""Example lengths for a graph that is right for one call: at them the model's code goes the way that it goes there.

A graph is traced and normalised at two choices of lengths, and serves all lengths for which Python decides alike. For
a call at which it decides otherwise (passes/normalize/extract_guards.py) both choices are made anew, so that each
condition known so far comes out as for that call. Where no two lengths do that, the length is fixed: a number in the
graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autodist_fx.calls.input_spec import InputForm

Lengths = dict[str, int]  # by letter: "B", "S", "P", "T", "E", "K"
_NAMES = {"B": "sequences", "S": "tokens", "P": "tokens cached", "E": "what the encoder reads", "K": "positions"}


def lengths_of(forms: Mapping[str, InputForm], inputs: Mapping[str, Any], past: int) -> Lengths:
    """The lengths of a call, whose `inputs` have these forms, with `past` tokens in the cache."""
    found: Lengths = {"P": past}
    for name, form in forms.items():
        value = inputs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == len(form.dims):
            found |= {dim: n for dim, n in zip(form.dims, value.shape, strict=True) if isinstance(dim, str)}
    return with_total(found)


def with_total(lengths: Lengths) -> Lengths:
    """T is P and S."""
    return {**lengths, "T": lengths["P"] + lengths["S"]} if "S" in lengths and "P" in lengths else lengths


def another_way(model: str, lengths: Mapping[str, int], lines: Sequence[str]) -> str:
    """Words for an error."""
    said = ", ".join(f"{_NAMES[letter]}: {n}" for letter, n in lengths.items() if letter in _NAMES)
    where = " and ".join(lines)
    return f"for these lengths ({said}) {model}'s code goes another way at {where} than it was traced with"


