"""Converts prompts to token ids and generated ids to text, and times each token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from autodist_fx.errors import AutodistError


@dataclass(frozen=True, slots=True)
class Answer:
    """One generated answer: its token ids without padding, and its text without special tokens."""

    prompt: str
    prompt_tokens: int
    text: str
    token_ids: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class TimedStreamer(BaseStreamer):
    """Notes the time at which each step's tokens arrive, and passes them on to another streamer."""

    def __init__(self, inner: BaseStreamer | None = None) -> None:
        self._inner = inner
        self._stamps: list[float] = []

    @property
    def token_stamps(self) -> list[float]:
        """The times of the steps, as time.perf_counter() seconds;
        the prompt, which generate() streams first, has none."""
        return self._stamps[1:]

    def put(self, value: torch.Tensor) -> None:
        self._stamps.append(time.perf_counter())
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, chat: bool) -> dict[str, torch.Tensor]:
    """Tokenize prompts into input_ids and attention_mask, both int64 [prompts, tokens], padded on the tokenizer's side.

    With `chat`, each prompt is formatted as a user's turn where the tokenizer has a template for that. Raises
    AutodistError where no token comes out.
    """
    if chat and tokenizer.chat_template is not None:
        turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
        texts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        encoded = tokenizer(texts, padding=len(texts) > 1, add_special_tokens=False, return_tensors="pt")
    else:
        encoded = tokenizer(list(prompts), padding=len(prompts) > 1, return_tensors="pt")
    if encoded["input_ids"].shape[1] == 0:
        raise AutodistError("the prompt is empty: there is nothing to continue")
    return {"input_ids": encoded["input_ids"].long(), "attention_mask": encoded["attention_mask"].long()}


def split_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    inputs: dict[str, torch.Tensor],
    output: torch.Tensor,
    eos_token_ids: Sequence[int],
    *,
    after_prompt: bool = True,
) -> list[Answer]:
    """Cut generate()'s `output`, int64 [prompts, tokens], into one
    Answer per prompt, each up to and with its first eos token.

    `after_prompt`: each row begins with the prompt. In an encoder-decoder model it begins with one start token instead.
    """
    width = inputs["input_ids"].shape[1] if after_prompt else 1
    answers = []
    for prompt, mask, row in zip(prompts, inputs["attention_mask"], output[:, width:].tolist()):
        end = next((i + 1 for i, token in enumerate(row) if token in eos_token_ids), len(row))
        text = tokenizer.decode(row[:end], skip_special_tokens=True)
        answers.append(Answer(prompt, int(mask.sum()), text, row[:end]))
    return answers
