"""transformers' Trainer over an engine: the same losses, norms, rates, evaluations and weights as in one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import autodist_fx as adx
from autodist_fx.errors import AutodistError, CheckpointError
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.training.trainer import Notes, Texts, arguments


def near(a: dict[int, Any], b: dict[int, Any]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.allclose(torch.tensor(a[n]), torch.tensor(b[n]), rtol=1e-9, atol=1e-10) for n in a)


def test_curve_evaluations_and_weights_are_those_of_one_process(tmp_path: Path) -> None:
    """Steps of two batches, of which the last in an epoch has one; stopped after step 4, resumed on another mesh."""
    with in_float64():
        model = tiny_model("llama", num_hidden_layers=1)
        truth, wanted = copy.deepcopy(model), Notes()
        plain = transformers.Trainer(
            truth, arguments(tmp_path / "plain", save_strategy="no"), train_dataset=Texts(), eval_dataset=Texts(6),
            callbacks=[wanted],
        )  # fmt: skip
        plain.train()
        assert len(wanted.steps) == 6 and len(wanted.evaluations) == 2

        notes = Notes()
        given: dict[str, Any] = {"train_dataset": Texts(), "eval_dataset": Texts(6), "simulate": True}
        trainer = adx.Trainer(model, arguments(tmp_path / "split"), callbacks=[notes], tp=2, **given)
        trainer.train()
        assert near(notes.steps, wanted.steps) and near(notes.evaluations, wanted.evaluations)
        parameters = trainer.engine.gather().parameters
        for name, p in truth.named_parameters():
            assert torch.allclose(parameters[name], p, rtol=1e-9, atol=1e-9), name
        loaded = type(model).from_pretrained(tmp_path / "split" / "checkpoint-6")
        assert all(torch.equal(parameters[name], p) for name, p in loaded.named_parameters())

        resumed = Notes()
        other = arguments(tmp_path / "split", per_device_train_batch_size=2, save_total_limit=1)
        trainer = adx.Trainer(model, other, callbacks=[resumed], dp=2, **given)
        trainer.train(resume_from_checkpoint=str(tmp_path / "split" / "checkpoint-4"))
        assert near(resumed.steps, {n: line for n, line in wanted.steps.items() if n > 4})
        assert [path.name for path in (tmp_path / "split").iterdir()] == ["checkpoint-6"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor=0.1.* is not for a split model: the engine"),
        ({"bf16": True}, r"bf16=True.*: load the model with dtype=torch.bfloat16"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0"),
        ({"optim": "adafactor"}, "Adafactor steps whole tensors"),
    ],
)
def test_arguments_that_would_not_mean_what_they_mean(changes: Any, message: str, tmp_path: Path) -> None:
    model = tiny_model("llama", torch.float32, num_hidden_layers=1)
    with pytest.raises(AutodistError, match=message):
        adx.Trainer(model, arguments(tmp_path, eval_strategy="no", **changes), train_dataset=Texts()).train()


def test_losses_and_checkpoints_of_others(tmp_path: Path) -> None:
    class Weighted(adx.EngineTrainer, transformers.Trainer):
        def compute_loss(self, *_: Any, **__: Any) -> Any:
            raise NotImplementedError

    model = tiny_model("llama", torch.float32, num_hidden_layers=1)
    with pytest.raises(AutodistError, match=r"Weighted.compute_loss computes a loss outside of the model"):
        Weighted(model, arguments(tmp_path, eval_strategy="no"))
    trainer = adx.Trainer(model, arguments(tmp_path, eval_strategy="no"), train_dataset=Texts())
    model.save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(CheckpointError, match=r"checkpoint-1 holds no run of an engine"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
