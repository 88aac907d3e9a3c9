"""One rank of an engine over Gloo, against one process. `training_worker.py tp pp dp schedule directory`: tp * pp * dp
ranks, which save in that directory, and go on on a mesh where pp and dp have changed places."""

import os
import sys

import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError, DisagreementError
from autodist_fx.runtime.comm.process_group import leave
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.training.one_process import (
    MAX_NORM,
    NO_DROPOUT,
    adamw,
    next_tokens,
    state_errors,
    text,
    train_in_one_process,
    windows,
)

tp, pp, dp = map(int, sys.argv[1:4])
schedule = sys.argv[4]
rank = int(os.environ["RANK"])
with in_float64():
    model, steps = tiny_model("gpt2", **NO_DROPOUT), windows(3)
    truth, optimizer, numbers = train_in_one_process(model, steps, next_tokens)
    engine = adx.train(
        model, tp=tp, pp=pp, dp=dp, schedule=schedule, microbatches=2, optimizer=adamw, max_grad_norm=MAX_NORM,
        device="cpu", timeout=60,
    )  # fmt: skip
    for number, (window, (loss, norm)) in enumerate(zip(steps, numbers)):
        if number == 2:  # what one rank finds ends the step on all; then all go on
            wrong = [{**batch, "input_ids": batch["input_ids"] + 1000 * (rank == 1)} for batch in window]
            longer = [{name: x[:, : x.shape[1] - (rank == 1)] for name, x in batch.items()} for batch in window]
            for given in (wrong, longer):
                with pytest.raises(DisagreementError, match="the ranks do not agree: batch"):
                    engine.step(given)
            with pytest.raises(AutodistError, match=r"input_ids holds 10\d\d, and transformer.wte has 128 rows"):
                engine.step([{**batch, "input_ids": batch["input_ids"] + 1000} for batch in window])
        result = engine.step(window)
        assert abs(result.loss - loss) <= 1e-9 * loss and abs(result.grad_norm - norm) <= 1e-9 * norm, (result, loss)
        if number == 0:
            engine.save(sys.argv[5], data=number, background=True)
    engine.wait_for_save()
    other = adx.train(
        model, tp=tp, pp=dp, dp=pp, microbatches=2, optimizer=adamw, max_grad_norm=MAX_NORM, device="cpu", timeout=60
    )
    assert other.load(sys.argv[5]) == adx.Resumed(1, 0)
    result = other.step(steps[1])
    other.save_pretrained(sys.argv[5])
    if rank == 0:
        wanted = model.from_pretrained(sys.argv[5]).named_parameters()
    gathered = other.gather().parameters
    assert rank or all(torch.equal(gathered[name], p) for name, p in wanted)
    assert abs(result.loss - numbers[1][0]) <= 1e-9 * result.loss and result.step == 2
    wrong = {name: e for name, e in state_errors(engine.gather(), truth, optimizer).items() if not e <= 1e-9}
    assert not wrong, wrong
    with pytest.raises(AutodistError, match="has 1 row, which cannot be dealt"):
        engine.step(text(1, 9, 0))
leave()
