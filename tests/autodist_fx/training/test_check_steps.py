"""compare_steps: silent on what is right, and it names step and parameter for known bugs of trainers, planted here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import autodist_fx as adx
from autodist_fx.runtime.training import rank_trainer
from autodist_fx.runtime.training.flat_weights import FlatWeights
from autodist_fx.simulation.thread_communicator import ThreadCommunicator
from autodist_fx.training import engine as engines
from autodist_fx.training.check_steps import MAX_NORM, adamw, compare_steps, drawn_model, tolerance_of, truth_of
from cost_model.errors import VerificationError
from passes.ops.comm_autograd import CopyToTp
from tests.support.models import tiny_config
from tests.support.moe import SIZES

STEPS, EXPERTS = 2, 5
Plant = Callable[[pytest.MonkeyPatch], None]


COMMON = {"simulate": True, "optimizer": adamw, "max_grad_norm": MAX_NORM, "verify": False, "microbatches": 2}


def compared(plant: Plant = lambda monkeypatch: None, moe: bool = False, **mesh: int) -> list[str]:
    """Compares STEPS steps of a Llama with tied tables, or of a Mixtral; returns the tensor of each step that differs
    most."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}  # so that two ranks have as much each
    llama = tiny_config("llama", num_hidden_layers=2, tie_word_embeddings=True, **heads)
    model = drawn_model(tiny_config("mixtral", **{**SIZES, "num_hidden_layers": 1}) if moe else llama)
    truth, said = truth_of(model, adx.train(model, **COMMON))
    assert said.startswith("transformers and torch.optim")
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        engine = adx.train(model, **COMMON, **mesh)
        rows = 2 * mesh.get("dp", 1) + 1
        return [done.tensor for done in compare_steps(model, engine, truth, STEPS, rows, tolerance_of(model))]


def clip_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rank_trainer.total
    monkeypatch.setattr(rank_trainer, "total", lambda c, mesh, rank, mine: (right(c, mesh, rank, mine)[0], mine[1]))


def loss_of_one_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = engines.loss_inputs
    monkeypatch.setattr(engines, "loss_inputs", lambda parts: right(parts[:1]))


def sums_paid_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rank_trainer.pay_sums_of

    def twice(*given) -> None:
        right(*given)
        right(*given)

    monkeypatch.setattr(rank_trainer, "pay_sums_of", twice)


def sums_not_paid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_trainer, "pay_sums_of", lambda *given: None)  # tied copies are stepped apart


def replicas_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadCommunicator, "start_all_reduce", lambda self, x, axis: lambda: x)


def routers_gradient_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank keeps its own term of the gradient of routing weights, [tokens, experts a token]."""
    right = CopyToTp.backward

    def backward(ctx, gradient: torch.Tensor):
        return (gradient, None, None) if gradient.shape[-1] <= EXPERTS else right(ctx, gradient)

    monkeypatch.setattr(CopyToTp, "backward", staticmethod(backward))


def replicas_of_another_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over dp go over the ranks of a tp group, of which there are as many."""
    right = ThreadCommunicator.start_all_reduce
    monkeypatch.setattr(ThreadCommunicator, "start_all_reduce", lambda self, x, axis: right(self, x, "tp"))


def stale_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that the other replica has stepped never comes."""
    monkeypatch.setattr(FlatWeights, "gather", lambda self, communicator: None)


@pytest.mark.drawn(2)
@pytest.mark.parametrize(
    ("plant", "mesh"),
    [
        (clip_by_rank, {"pp": 2}),
        (loss_of_one_microbatch, {"pp": 2}),
        (sums_paid_twice, {"pp": 2}),
        (sums_not_paid, {"pp": 2}),
        (replicas_not_summed, {"dp": 2}),
        (replicas_of_another_group, {"tp": 2, "dp": 2}),
        (stale_weights, {"dp": 2, "zero_stage": 1}),
        (routers_gradient_not_summed, {"tp": 2, "moe": True}),
    ],
)
def test_planted_bugs_are_named(plant: Plant, mesh: dict[str, int]) -> None:
    with pytest.raises(VerificationError, match=r"^step [12]: (the norm|the loss|model\.|lm_head).* (is|differs)"):
        compared(plant, **mesh)


@pytest.mark.parametrize("mesh", [{"tp": 2, "pp": 2}, {"dp": 2, "zero_stage": 1}, {"tp": 2, "moe": True}])
def test_what_is_right_is_right(mesh: dict[str, int]) -> None:
    assert len(compared(**mesh)) == STEPS


def test_masks_drawn_alike_for_all_rows_are_named() -> None:
    """A model with dropout is held against one rank, in which nothing is planted."""
    model = drawn_model(tiny_config("gpt2", n_layer=1))
    truth, said = truth_of(model, adx.train(model, **COMMON))
    assert said.startswith("one rank")
    assert len(list(compare_steps(model, adx.train(model, tp=2, **COMMON), truth, 1, 5, 1e-9))) == 1
    truth, _ = truth_of(model, adx.train(model, **COMMON))
    wrong = adx.train(model, tp=2, **COMMON)
    right = engines.random_state
    step = wrong.step

    def planted(window) -> object:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(engines, "random_state", lambda seed, number, row: right(seed, number, 0))
            return step(window)

    wrong.step = planted
    with pytest.raises(VerificationError, match="step 1: the loss is"):
        list(compare_steps(model, wrong, truth, 1, 5, 1e-9))
