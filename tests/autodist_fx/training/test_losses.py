"""Losses of other tasks: each mean over what counts in the whole batch, and what is no mean over microbatches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import autodist_fx as adx
from tests.support.encoders import tiny_encoder
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.moe import tiny_moe_model
from tests.support.training.one_process import (
    MAX_NORM,
    NO_DROPOUT,
    Batch,
    adamw,
    check_training,
    next_tokens,
    rows,
    state_errors,
    text,
    windows,
)


@pytest.mark.parametrize("classes", (1, 3))
def test_a_regression_and_a_classifier(classes: int) -> None:
    def make(count: int, seq: int, seed: int) -> Batch:
        given = text(count, seq, seed)
        generator = torch.Generator().manual_seed(seed)
        label = torch.randn(count, generator=generator) if classes == 1 else given["input_ids"][:, 0] % classes
        return {**given, "labels": label}

    with in_float64():
        model = tiny_encoder("BertForSequenceClassification", "bert", num_labels=classes, **NO_DROPOUT)
        check_training(model, windows(3, make), rows, {"tp": 2, "dp": 2})


def test_two_means_that_count_other_rows() -> None:
    """Start and end positions of answers; those outside of the text do not count."""

    def make(count: int, seq: int, seed: int) -> Batch:
        given, generator = text(count, seq, seed), torch.Generator().manual_seed(seed)
        ends = {name: torch.randint(0, seq + 3, (count,), generator=generator) for name in ("start", "end")}
        return {name: given[name] for name in ("input_ids", "attention_mask")} | {
            f"{name}_positions": x for name, x in ends.items()
        }

    with in_float64():
        model = tiny_encoder("BertForQuestionAnswering", "bert", **{**NO_DROPOUT, "num_labels": 2})
        truth = copy.deepcopy(model).train()
        engine = adx.train(model, tp=2, dp=2, microbatches=2, optimizer=adamw, simulate=True)
        window = windows(1, make)[0]
        loss = torch.zeros(())
        for name in ("start", "end"):
            counted = sum(int((b[f"{name}_positions"] < b["input_ids"].shape[1]).sum()) for b in window)
            for batch in window:
                scores, seq = truth(**batch)[f"{name}_logits"], batch["input_ids"].shape[1]
                positions = batch[f"{name}_positions"].clamp(max=seq)
                loss = loss + F.cross_entropy(scores, positions, ignore_index=seq, reduction="sum") / counted / 2
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in truth.parameters()])
        result = engine.step(window)
        assert abs(result.loss - loss.item()) <= 1e-9 and abs(result.grad_norm - norm.item()) <= 1e-9


def test_a_balance_of_experts_is_averaged_over_microbatches() -> None:
    with in_float64():
        model = tiny_moe_model(
            "mixtral", num_hidden_layers=1, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.1,
            **NO_DROPOUT,
        )  # fmt: skip
        truth = copy.deepcopy(model).train()
        made = adamw(truth.parameters())
        engine = adx.train(
            model, tp=2, dp=2, microbatches=2, optimizer=adamw, max_grad_norm=MAX_NORM, simulate=True
        )
        for window in windows(2):
            parts = [dict(zip(b, piece)) for b in window for piece in zip(*(x.tensor_split(4) for x in b.values()))]
            counted, loss = sum(map(next_tokens, parts)), torch.zeros(())
            for part in parts:
                output = truth(**part)
                balance = 0.1 * output.aux_loss
                loss = loss + (output.loss - balance) * next_tokens(part) / counted + balance / len(parts)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(truth.parameters(), MAX_NORM)
            made.step()
            made.zero_grad()
            result = engine.step(window)
            assert abs(result.loss - loss.item()) <= 1e-9 and abs(result.grad_norm - norm.item()) <= 1e-9
        assert max(state_errors(engine.gather(), truth, made).values()) <= 1e-9


def test_a_number_of_items_that_the_caller_counts() -> None:
    with in_float64():
        model, batch = tiny_model("gpt2", num_hidden_layers=1, **NO_DROPOUT), text(8, 9, 0)
        items = torch.tensor(17)
        wanted = model(**batch, num_items_in_batch=items).loss.item()
        engine = adx.train(model, dp=2, microbatches=2, simulate=True)
        assert abs(engine.step({**batch, "num_items_in_batch": items}).loss - wanted) <= 1e-9
