"""Predictions of an engine of its steps, and recompute="auto", which goes by them."""

from __future__ import annotations

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from autodist_fx.training.engine import Engine
from tests.support.models import tiny_model
from tests.support.training.one_process import adamw, text


def engine_with(limit: int | None, recompute: str = "auto") -> Engine:
    model = tiny_model("llama", torch.float64)
    return adx.train(
        model, pp=2, dp=2, microbatches=2, simulate=True, optimizer=adamw, zero_stage=1, recompute=recompute,
        max_memory=limit,
    )  # fmt: skip


def test_auto_recomputes_where_a_step_would_not_fit() -> None:
    batch = text(8, 32, 0)
    plain = engine_with(None, "none")
    with pytest.raises(AutodistError, match="call step first"):
        plain.estimate(batch)
    first = plain.step(batch)
    predicted = plain.estimate(batch)
    assert (predicted.setup.rows, predicted.rows) == (2, 8) and predicted.setup.recompute == "none"
    for memory, ranks in zip(predicted.memory, ((0, 1), (2, 3)), strict=True):
        held = max(plain.optimizer_bytes()[rank] for rank in ranks)
        assert held - 8 * 32 < memory.optimizer <= held  # AdamW counts the steps of each parameter, too

    needs = predicted.memory_bytes
    for limit, wanted in ((needs, "none"), (needs - 1, "layers")):
        engine = engine_with(limit)
        assert engine.step(batch).loss == pytest.approx(first.loss, rel=1e-9)
        found = engine.estimate(batch)
        assert found.setup.recompute == wanted
        assert (found.memory_bytes < needs) == (wanted == "layers")


def test_simulated_ranks_have_no_idle_seconds() -> None:
    engine = engine_with(None, "none")
    engine.step(text(8, 32, 0))
    with pytest.raises(AutodistError, match="simulated ranks take turns"):
        engine.idle_seconds()
