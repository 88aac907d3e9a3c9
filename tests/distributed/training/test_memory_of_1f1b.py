"""1F1B over two real processes: a rank holds what the plan says, whatever the number of microbatches; GPipe grows."""

from __future__ import annotations

import pytest
import torch

import autodist_fx as adx
from autodist_fx.training.engine import Engine
from tests.support.forked import on_processes
from tests.support.models import tiny_model
from tests.support.training.live_bytes import LiveBytes
from tests.support.training.one_process import adamw, text

pytestmark = pytest.mark.distributed
ROWS, LENGTH, MICROBATCHES = 2, 48, 8
WITHIN = 0.15  # of what is measured


def test_the_most_that_a_rank_holds() -> None:
    def most(engine: Engine, batch: dict[str, torch.Tensor]) -> int:
        """The bytes of tensors that a step makes, beside weights and states, at their most."""
        engine.step(batch)  # makes the optimizer's states
        with LiveBytes() as live:
            engine.step(batch)
        return live.most

    def work(rank: int) -> tuple[int, int, int]:
        model = tiny_model("llama", torch.float32, num_hidden_layers=4)
        batch = text(ROWS * MICROBATCHES, LENGTH, 0)
        found = []
        for schedule in ("1f1b", "gpipe"):
            engine = adx.train(
                model, pp=2, schedule=schedule, microbatches=MICROBATCHES, optimizer=adamw, verify=False,
                device="cpu", timeout=60,
            )  # fmt: skip
            found.append(most(engine, batch))
            if schedule == "1f1b":
                memory = engine.estimate(batch).memory[rank]
        return found[0], found[1], memory.gradients + memory.activations + memory.transient

    for rank, ends in enumerate(on_processes(2, work)):
        assert isinstance(ends, tuple), ends
        one_f_one_b, gpipe, predicted = ends
        assert predicted == pytest.approx(one_f_one_b, rel=WITHIN), (rank, ends)
        assert gpipe > 2 * one_f_one_b, (rank, ends)
