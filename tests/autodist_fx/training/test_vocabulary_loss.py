"""A loss over a vocabulary that ranks have parts of: no rank has all logits of a row, and all numbers are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import OutOfTableError
from autodist_fx.simulation.thread_communicator import ThreadCommunicator
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.training.gradients import compiled_for_training, eager_gradients, gradient_errors
from tests.support.training.one_process import NO_DROPOUT, check_training, next_tokens, text, windows

VOCAB = 1001  # no multiple of the ranks


def model_of(family: str, **changes: Any) -> Any:
    return tiny_model(family, vocab_size=VOCAB, num_hidden_layers=1, n_layer=1, **NO_DROPOUT, **changes)


@pytest.mark.drawn(2)
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"tp": 3}, {"tp": 2, "pp": 2, "recompute": "layers"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "tied llama"])  # GPT-2's tables are tied, too
def test_steps_are_those_of_one_process(family: str, mesh: dict[str, Any]) -> None:
    tied = {"tie_word_embeddings": True} if family.startswith("tied") else {}
    with in_float64():
        check_training(model_of(family.removeprefix("tied "), **tied), windows(2), next_tokens, mesh)


@pytest.mark.parametrize(("family", "tp"), [("llama", 2), ("gpt2", 3)])
def test_no_rank_gets_all_logits(family: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a number a row from each rank; all else that is gathered is as wide as a hidden state."""
    model, batch, gathered = model_of(family).float(), text(4, 9, 0), []
    right = ThreadCommunicator.all_gather

    def all_gather(self, x: torch.Tensor, *how: Any) -> torch.Tensor:
        whole = right(self, x, *how)
        gathered.append(whole.numel())
        return whole

    monkeypatch.setattr(ThreadCommunicator, "all_gather", all_gather)
    engine = adx.train(model, tp=tp, simulate=True)
    engine.step(batch)
    loss = next(op for op in engine.plan.ops if op.kind == "cross_entropy")
    assert loss.factor == "classes" and str(loss.outputs[0]) == "P"
    rows = batch["labels"].numel()
    assert gathered.count(rows * tp) == tp and max(gathered) <= rows * model.config.hidden_size < rows * VOCAB / tp


def test_a_mean_beside_logits_that_are_returned() -> None:
    """The programs of `compile`, whose loss is a mean over the labels."""
    with in_float64():
        model, batch = model_of("llama"), text(4, 9, 0)
        made = compiled_for_training(model, batch, (2, 1))
        assert next(op for op in made.plan.ops if op.kind == "cross_entropy").factor == "classes"
        wrong = gradient_errors(made.gradients(**batch), eager_gradients(model, batch))
        assert all(error <= 1e-9 for error in wrong.values()), wrong
        assert math.isclose(made.simulate(**batch).loss.item(), model(**batch).loss.item(), rel_tol=1e-9)


def test_labels_outside_the_vocabulary_are_named() -> None:
    model, batch = model_of("llama").float(), text(4, 9, 0)
    engine = adx.train(model, tp=2, simulate=True, verify=False)
    batch["labels"][1, 3] = VOCAB
    with pytest.raises(OutOfTableError, match=rf"from labels, holds {VOCAB}, and cross_entropy.* knows {VOCAB}"):
        engine.step(batch)
