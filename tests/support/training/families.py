"""Tiny models of many families, each with the batches that it is trained on and what its loss counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from tests.support.encoders import tiny_encoder
from tests.support.models import tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.seq2seq import tiny_seq2seq
from tests.support.training.one_process import NO_DROPOUT, Batch, next_tokens, rows, text, tokens, windows


def task(family: str, layers: int, steps: int) -> tuple[PreTrainedModel, list[list[Batch]], Callable[[Batch], int]]:
    """A model of so many layers, in float64, the batches of each step, and what of a batch counts in its loss."""
    changes: dict[str, Any] = {**NO_DROPOUT, "num_hidden_layers": layers}
    if family == "t5":
        return tiny_seq2seq("t5", layers=layers, **NO_DROPOUT), windows(steps, _translation), tokens
    if family == "bert":
        model = tiny_encoder("BertForSequenceClassification", "bert", **{**changes, "num_labels": 3})
        return model, windows(steps, _classes), rows
    if family in ("mixtral", "deepseek_v3"):
        return tiny_moe_model(family, **changes), windows(steps), next_tokens
    return tiny_model(family, **changes, n_layer=layers), windows(steps), next_tokens


def _translation(count: int, seq: int, seed: int) -> Batch:
    return {**text(count, seq, seed), "labels": text(count, 5, seed + 50)["labels"]}


def _classes(count: int, seq: int, seed: int) -> Batch:
    given = text(count, seq, seed)
    return {**given, "labels": given["input_ids"][:, 0] % torch.tensor(3)}
