"""A split model in training against plain transformers and torch.optim in one process, in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.training.gathered import TrainingState

Batch = dict[str, torch.Tensor]
MAX_NORM = 0.5
NO_DROPOUT: dict[str, Any] = dict.fromkeys(
    ("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout_prob", "dropout_rate", "dropout",
     "attention_probs_dropout_prob", "classifier_dropout", "summary_first_dropout", "activation_dropout"), 0.0
)  # fmt: skip
adamw = functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def text(rows: int, seq: int, seed: int, vocab: int = 90) -> Batch:
    """Token ids, padded at the end by another number in each of the first rows, and the labels of a language model."""
    ids = torch.randint(3, vocab, (rows, seq), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows // 2):
        mask[row, seq - 2 - row :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def windows(steps: int, make: Callable[[int, int, int], Batch] = text) -> list[list[Batch]]:
    """The batches of each step: two, of two lengths and numbers of rows."""
    return [[make(8, 9, 2 * step), make(9, 7, 2 * step + 1)] for step in range(steps)]


def next_tokens(batch: Batch) -> int:
    """Labels that a causal language model is taught by."""
    return int((batch["labels"][:, 1:] != -100).sum())


def tokens(batch: Batch) -> int:
    return int((batch["labels"] != -100).sum())


def rows(batch: Batch) -> int:
    return len(batch["labels"])


def check_training(
    model: PreTrainedModel,
    steps: Sequence[Sequence[Batch]],
    count: Callable[[Batch], int],
    *meshes: dict[str, Any],
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
    tolerance: float = 1e-9,
) -> TrainingState:
    """Trains on each mesh (keywords of `train`) as one process does, and compares loss and norm of each step, and
    parameters and optimizer states after the last; returns these."""
    truth, made, numbers = train_in_one_process(model, steps, count, optimizer)
    for mesh in meshes:
        given = {"microbatches": 2, "optimizer": optimizer, "max_grad_norm": MAX_NORM, **mesh}
        engine = adx.train(model, simulate=True, **given)
        for window, (loss, norm) in zip(steps, numbers, strict=True):
            result = engine.step(list(window))
            assert abs(result.loss - loss) <= tolerance * abs(loss), (mesh, result, loss)
            assert abs(result.grad_norm - norm) <= tolerance * norm, (mesh, result, norm)
        state = engine.gather()
        wrong = {name: e for name, e in state_errors(state, truth, made).items() if not e <= tolerance}
        assert not wrong, f"{mesh}: {wrong}"
    return state


def train_in_one_process(
    model: PreTrainedModel,
    steps: Sequence[Sequence[Batch]],
    count: Callable[[Batch], int],
    optimizer: Callable[..., torch.optim.Optimizer] = adamw,
) -> tuple[PreTrainedModel, torch.optim.Optimizer, list[tuple[float, float]]]:
    """Returns the trained model, its optimizer, and (loss, norm of the gradient before clipping) of each step."""
    truth = copy.deepcopy(model).train()
    made = optimizer([p for p in truth.parameters() if p.requires_grad])
    numbers = []
    for window in steps:
        whole = sum(map(count, window))
        loss = sum(truth(**batch).loss * (count(batch) / whole) for batch in window)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), MAX_NORM)
        made.step()
        made.zero_grad()
        numbers.append((loss.item(), norm.item()))
    return truth, made, numbers


def state_errors(
    state: TrainingState, truth: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """The largest error of each tensor, of its own largest element, or of a millionth of the largest of its kind."""
    found = {}
    wanted = {("", name): p.detach() for name, p in truth.named_parameters()}
    for name, p in truth.named_parameters():
        wanted |= {(key, name): value for key, value in optimizer.state.get(p, {}).items()}
    largest: dict[str, float] = {}
    for (key, _), value in wanted.items():
        largest[key] = max(largest.get(key, 0.0), float(value.abs().max()))
    for (key, name), value in wanted.items():
        got = state.optimizer[name][key] if key else state.parameters[name]
        found[f"{name} {key}"] = float((got - value).abs().max()) / max(
            float(value.abs().max()), 1e-6 * largest[key]
        )
    kept = {name for name, p in truth.named_parameters() if optimizer.state.get(p)}
    assert state.optimizer.keys() == kept
    return found
