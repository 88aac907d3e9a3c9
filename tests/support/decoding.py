"""Prompts and steps of a simulated model with a KV cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PreTrainedModel

from autodist_fx.api.compiled_model import CompiledModel
from tests.support.models import padded_batch

IDS, _ = padded_batch(seq=9)


def positions_of(model: PreTrainedModel, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Position ids that skip the padding, for models that take them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def decoded_logits(
    compiled: CompiledModel, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, prefill: int = 5
) -> torch.Tensor:
    """Logits of a prefill of some tokens, then of one token after the other."""
    positions = positions_of(model, mask)
    cache, logits = None, []
    for start, stop in [(0, prefill), *((at, at + 1) for at in range(prefill, ids.shape[1]))]:
        step = compiled.simulate(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            past_key_values=cache,
            **{name: value[:, start:stop] for name, value in positions.items()},
        )
        cache = step.past_key_values
        logits.append(step.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(logits, 1)


def decoded_artifact(compiled: Any) -> list[torch.Tensor]:
    """A prompt and two steps; then another, shorter prompt."""
    cache, found = None, []
    for start, stop in ((0, 7), (7, 8), (8, 9)):
        step = compiled.simulate(input_ids=IDS[:, start:stop], past_key_values=cache)
        cache = step.past_key_values
        found.append(step.logits)
    return [*found, compiled.simulate(input_ids=IDS[:, :4], past_key_values=None).logits]
