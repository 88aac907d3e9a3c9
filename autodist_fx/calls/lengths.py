"""Lengths of a call by size symbol, and the error for lengths whose guards come out otherwise than in the traced graph.

A graph is traced and normalised at two choices of lengths, and serves all lengths at which its guards come out alike.
For a call at which one comes out otherwise (passes/normalize/extract_guards.py) two new choices are made, so that every
guard known so far comes out as it does for that call (compiler/guard_examples.py). Where no two different values of a
length do that, the length is fixed: it is a number in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autodist_fx.calls.input_spec import InputSpec, is_symbol

Lengths = dict[str, int]  # by size symbol: "B", "S", "P", "T", "E", "K" (docs/glossary.md)
_NAMES = {"B": "sequences", "S": "tokens", "P": "tokens cached", "E": "what the encoder reads", "K": "positions"}


def tokens_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Return the step's tokens [batch, tokens, ...]: a decoder's, where an encoder has its own."""
    names = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
    return next(inputs[name] for name in names if name in inputs)


def lengths_of(specs: Mapping[str, InputSpec], inputs: Mapping[str, Any], past: int) -> Lengths:
    """Return the lengths of a call by size symbol.

    Reads each tensor of `inputs` against its input spec in `specs`; `past` is the number of tokens in the cache.
    """
    found: Lengths = {"P": past}
    for name, spec in specs.items():
        value = inputs.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == len(spec.dims):
            found |= {dim: n for dim, n in zip(spec.dims, value.shape, strict=True) if is_symbol(dim)}
    return with_total(found)


def with_total(lengths: Lengths) -> Lengths:
    """Return `lengths` with T = P + S added, where both are there."""
    return {**lengths, "T": lengths["P"] + lengths["S"]} if "S" in lengths and "P" in lengths else lengths


def guards_text(model: str, lengths: Mapping[str, int], lines: Sequence[str]) -> str:
    """Return the sentence of an error: at `lengths`, the guards of
    `model` at these lines of its source come out otherwise."""
    said = ", ".join(f"{_NAMES[symbol]}: {n}" for symbol, n in lengths.items() if symbol in _NAMES)
    where = " and ".join(lines)
    return f"for these sizes ({said}) the guards of {model} at {where} come out otherwise than in the traced graph"


