"""Dropout in training: the same masks on any mesh, in any microbatches, over the batches that a step accumulates."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import autodist_fx as adx
from tests.support.float64 import in_float64
from tests.support.graphs.eager_draws import seeded
from tests.support.models import relative_error, tiny_model
from tests.support.training.one_process import adamw, next_tokens, windows

SEED = 7
MESHES: tuple[dict[str, Any], ...] = (
    {"tp": 2, "dp": 2, "microbatches": 2}, {"pp": 2, "microbatches": 4}, {"tp": 3, "microbatches": 1},
)  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(map(str, mesh.values())))
def test_a_step_is_that_of_one_process_with_these_masks(mesh: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with in_float64():
        model = tiny_model("gpt2", n_layer=1, attn_pdrop=0.2, resid_pdrop=0.1, embd_pdrop=0.1)
        truth = copy.deepcopy(model).train()
        optimizer = adamw(truth.parameters())
        engine = adx.train(model, simulate=True, optimizer=adamw, seed=SEED, **mesh)
        for step, window in enumerate(windows(2)):
            total, loss, first_row = sum(map(next_tokens, window)), 0.0, 0
            for batch in window:
                with seeded(monkeypatch, SEED, step, first_row):
                    part = truth(**batch).loss * next_tokens(batch) / total
                part.backward()
                loss, first_row = loss + float(part.detach()), first_row + len(batch["labels"])
            optimizer.step()
            optimizer.zero_grad()
            assert abs(engine.step(window).loss - loss) <= 1e-9 * loss
        parameters = engine.gather().parameters
        for name, wanted in truth.named_parameters():
            assert relative_error(parameters[name], wanted.detach()) <= 1e-9, name
