"""Draws inputs for a graph from its input specs: their shapes and ranges are right, their values random."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx

from autodist_fx.calls.input_spec import InputSpec, size_of
from autodist_fx.runtime.table_checks import lookups

Lengths = Mapping[str, int]  # by size symbol: "B", "S", "T", "E", "K" (docs/glossary.md)


def make_inputs(
    whole: torch.fx.GraphModule, specs: Mapping[str, InputSpec], lengths: Lengths, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Draw an input tensor for each input spec in `specs`, by name.

    Shapes take the value of each size symbol from `lengths`. Floating-point inputs are float64, all others have the
    dtype of their spec. Positions start at T - S, the number of tokens cached before; masks hide the third token of the
    first sequence.
    """
    rows = lookups(whole)
    return {name: _make(name, spec, lengths, rows.get(name, 2), generator) for name, spec in specs.items()}


def _make(name: str, spec: InputSpec, lengths: Lengths, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Draw one input; `rows` bounds the values of an integer input that indexes a table."""
    shape = [size_of(d, lengths) for d in spec.dims]
    if spec.dtype.is_floating_point:
        if "mask" in name:  # a float mask is added to scores or multiplies them: with ones both are finite
            return torch.ones(shape, dtype=torch.float64)
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if "mask" in name:
        mask = torch.ones(shape, dtype=spec.dtype)
        if mask.dim() == 2 and mask.shape[1] > 3:
            mask[0, 2] = 0
        return mask
    if "position" in name:
        past = lengths["T"] - lengths["S"]
        return torch.arange(past, past + shape[-1]).to(spec.dtype).expand(shape).contiguous()
    if name == "logits_to_keep":
        return torch.arange(shape[0]).to(spec.dtype)
    return torch.randint(0, rows, shape, generator=generator).to(spec.dtype)
