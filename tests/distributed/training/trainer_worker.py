"""One of two ranks (tp=2) of a Trainer over an engine, against one process. `trainer_worker.py directory`."""

import copy
import os
import sys
from pathlib import Path

import torch
import transformers

import autodist_fx as adx
from autodist_fx.runtime.comm.process_group import leave
from autodist_fx.trainer.one_process import as_one_process
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.training.one_process import adamw, text
from tests.support.training.trainer import Notes, Texts, arguments

directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
with in_float64():
    model = tiny_model("llama", num_hidden_layers=1)
    truth, notes = copy.deepcopy(model), Notes()
    given = {"train_dataset": Texts(), "eval_dataset": Texts(6), "callbacks": [notes]}
    trainer = adx.Trainer(model, arguments(directory), tp=2, device="cpu", timeout=60, **given)
    trainer.train()
    losses = [notes.steps[step][0] for step in sorted(notes.steps)] if rank == 0 else []
    parameters, evaluated = trainer.engine.gather().parameters, trainer.evaluate()["eval_loss"]
    if rank == 0:
        wanted, alone = Notes(), arguments(directory / "plain", save_strategy="no")
        as_one_process(alone)
        plain = transformers.Trainer(
            truth, alone, train_dataset=Texts(), eval_dataset=Texts(6), callbacks=[wanted]
        )  # fmt: skip
        plain.train()
        assert torch.allclose(torch.tensor(losses), torch.tensor([wanted.steps[n][0] for n in sorted(wanted.steps)]))
        assert abs(evaluated - plain.evaluate()["eval_loss"]) <= 1e-9
        for name, p in truth.named_parameters():
            assert torch.allclose(parameters[name], p, rtol=1e-9, atol=1e-9), name
        assert sorted(path.name for path in directory.iterdir()) == [f"checkpoint-{n}" for n in (2, 4, 6)] + ["plain"]
    trainer.engine.meet()

    # by hand, two batches accumulated
    model, truth = tiny_model("llama", num_hidden_layers=1), tiny_model("llama", num_hidden_layers=1).train()
    engine = adx.train(model, tp=2, device="cpu", timeout=60)
    split = engine.model_for(text(2, 9, 0))
    optimizers = [adamw(split.parameters()), adamw(truth.parameters())]
    for step in range(3):
        for batch in (text(4, 9, step), text(2, 7, step)):
            losses = [each(**batch).loss for each in (split, truth)]
            (losses[0] / 2).backward()
            (losses[1] / 2).backward()
            assert abs(losses[0] - losses[1]) <= 1e-9
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    parameters = engine.gather().parameters
    assert all(torch.allclose(parameters[name], p, rtol=1e-9, atol=1e-9) for name, p in truth.named_parameters())
leave()
