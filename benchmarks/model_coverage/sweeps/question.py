"""One thing that is asked of a model, whole or split, and how an answer of the split one is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from model_coverage.inputs import Inputs
from model_coverage.verdict import Entry


@dataclass(frozen=True, slots=True)
class Question:
    """`ask(model)` gives plain tensors; `judge(answer)` says right or wrong. Where transformers itself has no answer,
    `unasked` is the entry that says so. `call`: the arguments, of a call of forward, and `expected` its outputs."""

    name: str
    ask: Callable[[Any], Any]
    judge: Callable[[Any], Entry]
    unasked: Entry | None = None
    call: Inputs = field(default_factory=dict)
    expected: dict[str, torch.Tensor] = field(default_factory=dict)


def not_in_transformers(name: str, reason: str) -> Question:
    """Returns what stands for a question that transformers does not answer."""
    entry = {"verdict": "none", "reason": f"transformers itself: {' '.join(reason.split())[:200]}"}
    return Question(name, lambda model: None, lambda answer: entry, entry)
