"""Inputs of a model for a task: seeded, with padding, and long enough for windows to matter."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from model_coverage.shrink import VOCAB

BATCH, SEQ, PREFILL, PADDED = 2, 13, 8, 2
FIRST_ID = 3  # ids below are special
Inputs = dict[str, torch.Tensor]


def inputs_for(model: PreTrainedModel, task: str, *, padded: bool = True) -> Inputs:
    """What forward is called with, by name; only what its signature takes."""
    accepted = inspect.signature(model.forward).parameters
    inputs = _MAKERS[task](model, torch.Generator().manual_seed(7), padded)
    return {name: value for name, value in inputs.items() if name in accepted}


def _ids(model: PreTrainedModel, seq: int, generator: torch.Generator) -> torch.Tensor:
    vocab = min(int(getattr(model.config.get_text_config(decoder=True), "vocab_size", VOCAB)), VOCAB)
    codebooks = getattr(model.config, "num_codebooks", 1) if hasattr(model, "build_delay_pattern_mask") else 1
    return torch.randint(FIRST_ID, vocab, (BATCH * codebooks, seq), generator=generator)


def _causal(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """The first sequence is padded on the left, as for generating."""
    ids = _ids(model, SEQ, generator)
    mask = torch.ones(BATCH, SEQ, dtype=torch.long)
    mask[0, : PADDED * padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _text(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    """The first sequence is padded on the right."""
    ids = _ids(model, SEQ, generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -PADDED:] = 0
        ids[0, -PADDED:] = model.config.pad_token_id or 0
    return {"input_ids": ids, "attention_mask": mask}


def _encoder_decoder(model: PreTrainedModel, generator: torch.Generator, padded: bool) -> Inputs:
    return {**_text(model, generator, padded), "decoder_input_ids": _ids(model, SEQ - 4, generator)}


_MAKERS: dict[str, Callable[[PreTrainedModel, torch.Generator, bool], Inputs]] = {
    "causal-lm": _causal,
    "seq2seq-lm": _encoder_decoder,
    "masked-lm": _text,
    "sequence-classification": _text,
}
