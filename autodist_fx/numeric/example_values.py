"""Inputs for a graph, made up from their forms: right in shape and range, random otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx

from autodist_fx.simulation.table_checks import lookups
from autodist_fx.tracing.input_specs import InputForm

Lengths = Mapping[str, int]  # "B", "S", "T", "E", "K": see input_forms


def make_inputs(
    whole: torch.fx.GraphModule, forms: Mapping[str, InputForm], lengths: Lengths, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """By name, for the inputs in `forms`. Positions go on where lengths["T"] - lengths["S"] tokens came before; masks
    leave out the third token of the first sequence."""
    rows = lookups(whole)
    return {name: _make(name, form, lengths, rows.get(name, 2), generator) for name, form in forms.items()}


def _make(name: str, form: InputForm, lengths: Lengths, rows: int, generator: torch.Generator) -> torch.Tensor:
    shape = [lengths[d] if isinstance(d, str) else d for d in form.dims]
    if form.dtype.is_floating_point:
        if "mask" in name:  # is added to scores, or multiplies them
            return torch.ones(shape, dtype=torch.float64)
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if "mask" in name:
        mask = torch.ones(shape, dtype=form.dtype)
        if mask.dim() == 2 and mask.shape[1] > 3:
            mask[0, 2] = 0
        return mask
    if "position" in name:
        past = lengths["T"] - lengths["S"]
        return torch.arange(past, past + shape[-1]).to(form.dtype).expand(shape).contiguous()
    if name == "logits_to_keep":
        return torch.arange(shape[0]).to(form.dtype)
    return torch.randint(0, rows, shape, generator=generator).to(form.dtype)
