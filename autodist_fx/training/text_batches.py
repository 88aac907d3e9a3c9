"""Reads texts to be trained on from a JSON-lines file, and deals them into batches whose order follows from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from autodist_fx.errors import AutodistError

IGNORED = -100  # a label that no loss counts
_KINDS = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'


@dataclass(frozen=True, slots=True)
class Row:
    """The token ids of one text, and the label of each."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Return the texts of a file, one a line: {"text"}, all of whose tokens are taught, {"prompt", "completion"}, of
    which the completion is, or {"messages"}, through the tokenizer's chat template; of each the first `max_length`
    tokens.

    Raises AutodistError, which names the line.
    """
    rows = []
    for number, fields in _lines(path):
        try:
            row = _row(fields, tokenizer)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AutodistError(f"{path}:{number} is none of {_KINDS}: {error}") from error
        if len(row.ids) > 1:
            rows.append(Row(row.ids[:max_length], row.labels[:max_length]))
    if not rows:
        raise AutodistError(f"{path} has no text: write one a line, {_KINDS}")
    return rows


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    fields = json.loads(line)
                    if not isinstance(fields, dict):
                        raise AutodistError(f"{path}:{number} is no JSON object: write {_KINDS}")
                    yield number, fields
    except (OSError, UnicodeDecodeError) as error:
        raise AutodistError(f"cannot read {path}: {error}") from error
    except ValueError as error:
        raise AutodistError(f"{path} holds a line that is no JSON: {error}") from error


def _row(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Row:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if "messages" in fields:
        text = tokenizer.apply_chat_template(fields["messages"], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return Row(tuple(ids), tuple(ids))
    if "prompt" in fields:
        prompt = tokenizer(fields["prompt"])["input_ids"]
        answer = tokenizer(fields["completion"], add_special_tokens=False)["input_ids"] + end
        return Row((*prompt, *answer), (*[IGNORED] * len(prompt), *answer))
    ids = tokenizer(fields["text"])["input_ids"] + end
    return Row(tuple(ids), tuple(ids))


class TextBatches:
    """The batches of a run over `rows`: `rows_a_batch` at each step, in another order in each epoch; what is left over
    at the end of one is left out. Raises AutodistError for fewer rows than a batch has."""

    def __init__(self, rows: Sequence[Row], rows_a_batch: int, seed: int, pad_id: int) -> None:
        if len(rows) < rows_a_batch:
            raise AutodistError(f"there are {len(rows)} texts, and a batch has {rows_a_batch}: give more, or ask less")
        self._rows, self._rows_a_batch, self._seed, self._pad_id = rows, rows_a_batch, seed, pad_id
        self.steps_an_epoch = len(rows) // rows_a_batch

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return the batch of a step, from 0: input_ids, attention_mask and labels, int64 [rows, tokens], padded on the
        right."""
        epoch, place = divmod(step, self.steps_an_epoch)
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(self._seed + epoch)).tolist()
        first = place * self._rows_a_batch
        chosen = [self._rows[number] for number in order[first : first + self._rows_a_batch]]
        width = max(len(row.ids) for row in chosen)
        ids = torch.full((len(chosen), width), self._pad_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for number, row in enumerate(chosen):
            length = len(row.ids)
            ids[number, :length], mask[number, :length] = torch.tensor(row.ids), 1
            labels[number, :length] = torch.tensor(row.labels)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def facts(self) -> dict[str, Any]:
        """Return what decides the batches, to be compared when a run goes on."""
        digest = hashlib.sha256(json.dumps([[row.ids, row.labels] for row in self._rows]).encode()).hexdigest()[:16]
        return {"texts": digest, "rows a batch": self._rows_a_batch, "seed": self._seed}
