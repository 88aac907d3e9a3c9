"""Five steps of AdamW with clipping, accumulation over two lengths, and padding: on every mesh as in one process."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import autodist_fx as adx
from autodist_fx.errors import AutodistError
from cost_model.errors import ScheduleError
from tests.support.float64 import in_float64
from tests.support.models import tiny_model
from tests.support.seq2seq import tiny_seq2seq
from tests.support.training.one_process import (
    NO_DROPOUT,
    adamw,
    check_training,
    next_tokens,
    text,
    tokens,
    windows,
)

MESHES = [
    {"tp": 2}, {"pp": 2}, {"dp": 2}, {"tp": 2, "pp": 2, "schedule": "gpipe"}, {"tp": 2, "dp": 2}, {"pp": 2, "dp": 2},
    {"tp": 2, "pp": 2, "dp": 2}, {"tp": 3}, {"pp": 3, "schedule": "gpipe"}, {"pp": 2, "schedule": "interleaved_1f1b"},
    {"tp": 2, "pp": 2, "dp": 2, "schedule": "interleaved_zero_bubble", "stages_per_rank": 1},
]  # fmt: skip


@pytest.mark.one_for_each("family")
@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "-".join(map(str, mesh.values())))
@pytest.mark.parametrize("family", ("llama", "qwen3", "phi3"))
def test_decoders(family: str, mesh: dict[str, Any]) -> None:
    with in_float64():
        check_training(tiny_model(family, **NO_DROPOUT), windows(5), next_tokens, mesh)


def test_a_tied_embedding_on_two_stages_stays_one() -> None:
    with in_float64():
        model = tiny_model("gpt2", **NO_DROPOUT)
        assert model.lm_head.weight is model.transformer.wte.weight
        check_training(model, windows(5), next_tokens, {"tp": 2, "pp": 2, "dp": 2})


def test_an_encoder_decoder() -> None:
    def make(count: int, seq: int, seed: int) -> dict[str, torch.Tensor]:
        given = text(count, seq, seed)
        return {**given, "labels": text(count, 5, seed + 50)["labels"]}

    with in_float64():
        check_training(tiny_seq2seq("t5", **NO_DROPOUT), windows(5, make), tokens, {"tp": 2, "pp": 2})


def test_adapters_alone_are_trained() -> None:
    with in_float64():
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(tiny_model("llama"), config).get_base_model()
        state = check_training(model, windows(2), next_tokens, {"tp": 2, "pp": 2})
        assert set(state.optimizer) == {name for name in state.parameters if "lora_" in name}


def test_frozen_parameters_and_a_frozen_stage() -> None:
    with in_float64():
        model = tiny_model("llama")
        for parameter in (*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()):
            parameter.requires_grad_(False)
        model.model.layers[1].mlp.requires_grad_(False)
        state = check_training(model, windows(2), next_tokens, {"tp": 2, "pp": 2, "cuts": ["model.layers.1"]})
        assert torch.equal(state.parameters["model.embed_tokens.weight"], model.model.embed_tokens.weight)


def test_without_clipping_and_with_a_schedule_of_learning_rates() -> None:
    with in_float64():
        model, batch = tiny_model("llama"), text(4, 9, 0)
        engine = adx.train(
            model, tp=2, simulate=True, optimizer=adamw,
            lr_scheduler=lambda made: torch.optim.lr_scheduler.LinearLR(made, 0.5, 1.0, 2),
        )  # fmt: skip
        truth = tiny_model("llama").train()
        made = adamw(truth.parameters())
        warm_up = torch.optim.lr_scheduler.LinearLR(made, 0.5, 1.0, 2)
        for _ in range(3):
            engine.step(batch)
            truth(**batch).loss.backward()
            made.step()
            made.zero_grad()
            warm_up.step()
        got = engine.gather().parameters["lm_head.weight"]
        torch.testing.assert_close(got, truth.lm_head.weight.detach(), rtol=1e-9, atol=1e-12)


def test_graphs_of_other_inputs_train_the_same_weights() -> None:
    """Also within one step: each batch has a graph of its own."""
    with in_float64():
        plain, placed = text(8, 9, 0), text(8, 7, 1)
        placed["position_ids"] = torch.arange(7).expand(8, 7) + 1
        model = tiny_model("llama", num_hidden_layers=1)
        check_training(model, [[plain], [plain, placed], [placed]], next_tokens, {"tp": 2, "dp": 2})


def test_one_rank_is_this_process() -> None:
    with in_float64():
        model, batch = tiny_model("llama", num_hidden_layers=1), text(4, 9, 0)
        engine = adx.train(model, microbatches=2, optimizer=adamw)
        assert engine.step(batch).loss == pytest.approx(model(**batch).loss.item(), rel=1e-9)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_refusals_leave_the_model_as_it_was() -> None:
    model = tiny_model("llama", torch.float32)
    engine = adx.train(model, pp=2, microbatches=4, simulate=True, optimizer=adamw)
    with pytest.raises(AutodistError, match="call step first"):
        engine.gather()
    batch = text(4, 9, 0)
    engine.step(batch)
    before = engine.gather()
    refused = [
        (text(3, 9, 0), "input_ids has 3 rows, which cannot be dealt to 4 microbatches"),
        ({**batch, "colour": batch["labels"]}, "takes no colour"),
        ({"input_ids": batch["input_ids"]}, "returned no loss: give what it computes one from"),
        ({**batch, "labels": torch.full_like(batch["labels"], -100)}, "no label of this batch counts"),
        ("tokens", "step takes a batch"),
    ]
    for given, message in refused:
        with pytest.raises(AutodistError, match=message):
            engine.step(given)  # type: ignore[arg-type]
    after = engine.gather()
    assert all(torch.equal(after.parameters[name], value) for name, value in before.parameters.items())


def test_a_loss_that_is_not_finite_steps_nothing() -> None:
    model = tiny_model("gpt2", torch.float32, **NO_DROPOUT)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = torch.inf
    engine = adx.train(model, tp=2, pp=2, simulate=True, optimizer=adamw)
    named = r"the loss is nan \(transformer.h.1.mlp.c_fc.weight is not finite\): nothing was stepped"
    with pytest.raises(AutodistError, match=named):
        engine.step(text(2, 9, 0))
    assert torch.equal(engine.gather().parameters["transformer.wte.weight"], model.lm_head.weight)


def test_hooks_optimizers_and_schedules_that_do_not_fit() -> None:
    model = tiny_model("llama", torch.float32)
    hook = model.lm_head.weight.register_hook(lambda gradient: gradient / 2)
    with pytest.raises(AutodistError, match=r"a hook of lm_head.weight's gradient is called while a model is trained"):
        adx.train(model, tp=2, simulate=True)
    hook.remove()
    hook = model.lm_head.register_full_backward_hook(lambda module, inner, outer: None)
    with pytest.raises(AutodistError, match=r"lm_head.* is called while a model is trained"):
        adx.train(model, tp=2, simulate=True)
    hook.remove()
    with pytest.raises(ScheduleError, match="there is no schedule 'fifo'"):
        adx.train(model, pp=2, schedule="fifo", simulate=True)
    with pytest.raises(AutodistError, match="LBFGS steps whole tensors"):
        adx.train(model, tp=2, simulate=True, optimizer=torch.optim.LBFGS).step(text(2, 9, 0))
    with pytest.raises(AutodistError, match="optimizer is a str: give a function"):
        adx.train(model, tp=2, simulate=True, optimizer="adamw")


def test_training_by_hand_is_of_one_stage() -> None:
    model, batch = tiny_model("llama", torch.float32, num_hidden_layers=2), text(2, 9, 0)
    for mesh in ({"pp": 2}, {"dp": 2}):
        with pytest.raises(AutodistError, match=r"and this mesh is .*=2.*: use engine\.step"):
            adx.train(model, simulate=True, **mesh).model_for(batch)  # type: ignore[arg-type]
    with pytest.raises(AutodistError, match=r"simulated ranks run a step at a time: use engine\.step"):
        adx.train(model, tp=2, simulate=True).model_for(batch)


def test_training_by_hand_alone() -> None:
    with in_float64():
        model, batch = tiny_model("llama", num_hidden_layers=1), text(4, 9, 0)
        split = adx.train(model).model_for(batch)
        for _ in range(2):
            split(**batch).loss.backward()
            model(**batch).loss.backward()
        gradients = [[p.grad for p in each.parameters()] for each in (split, model)]
        norms = [torch.nn.utils.get_total_norm(own) for own in gradients]
        assert abs(norms[0] - norms[1]) <= 1e-9 * norms[1]
