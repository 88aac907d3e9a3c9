"""The tests of lesson 5. The truth is torch's Schedule1F1B for the order, and loss.backward() of the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from autodist_fx.course.grading import Check
from autodist_fx.course.ranks import on_ranks
from autodist_fx.runtime.training.schedules import make_schedule
from cost_model.schedule.timeline import StageCosts, chain, simulate

SIZES = ((1, 3), (2, 2), (2, 4), (3, 3), (3, 5), (4, 6))  # (ranks, microbatches)
WIDTH, ROWS = 5, 2


def like_torch(answer: Any) -> None:
    for ranks, microbatches in SIZES:
        schedule = make_schedule("1f1b", ranks, microbatches)
        for rank, actions in enumerate(schedule.actions):
            wanted = [f"{action.kind.value}{action.microbatch}" for action in actions]
            got = [str(action) for action in answer.one_f_one_b(rank, ranks, microbatches)]
            assert got == wanted, (
                f"rank {rank} of {ranks}, {microbatches} microbatches: {' '.join(got)}\ntorch: {' '.join(wanted)}"
            )


def idle_share(answer: Any) -> None:
    for ranks, microbatches in SIZES:
        schedule = make_schedule("1f1b", ranks, microbatches)
        timeline = simulate(schedule, [StageCosts(1.0, 0.5, 0.5)] * ranks, chain(ranks))
        got = answer.bubble(ranks, microbatches)
        assert abs(got - timeline.idle_share) < 1e-9, (
            f"bubble({ranks}, {microbatches}) is {got:.3f}, and in the simulated step ranks are idle for "
            f"{timeline.idle_share:.3f} of the time"
        )


def _layers(ranks: int) -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Tanh()) for _ in range(ranks)]


def _batch(microbatches: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(6)
    made = torch.randn(2, microbatches, ROWS, WIDTH, dtype=torch.float64, generator=generator)
    return list(made[0]), list(made[1])


def _step(answer: Any, order: Any, ranks: int, microbatches: int) -> list[Any]:
    """A step over ranks; returns their stages."""
    inputs, targets = _batch(microbatches)

    def work(rank: int) -> Any:
        def loss(y: torch.Tensor, m: int) -> torch.Tensor:
            return F.mse_loss(y, targets[m])

        stage = answer.Stage(_layers(ranks)[rank], rank, ranks, inputs, loss, (ROWS, WIDTH))
        stage.step(order(rank, ranks, microbatches))
        return stage

    return on_ranks(work, pp=ranks)


def _assert_gradients(answer: Any, order: Any, ranks: int, microbatches: int) -> None:
    inputs, targets = _batch(microbatches)
    whole = nn.Sequential(*_layers(ranks))
    F.mse_loss(whole(torch.cat(inputs)), torch.cat(targets)).backward()
    for rank, stage in enumerate(_step(answer, order, ranks, microbatches)):
        for name, parameter in stage.module.named_parameters():
            wanted = whole[rank].get_parameter(name).grad
            assert parameter.grad is not None, f"rank {rank}: {name} has no gradient"
            ratio = float((parameter.grad / wanted).mean())
            close = torch.allclose(parameter.grad, wanted, rtol=1e-9, atol=1e-12)
            assert close, f"rank {rank} of {ranks}: {name}'s gradient is not the whole model's ({ratio:.3g} times)"


def gradients_of_gpipe(answer: Any) -> None:
    _assert_gradients(answer, answer.gpipe, 2, 3)


def gradients_of_1f1b(answer: Any) -> None:
    _assert_gradients(answer, answer.one_f_one_b, 3, 4)


def little_is_kept(answer: Any) -> None:
    for order, wanted in ((answer.gpipe, [6, 6, 6]), (answer.one_f_one_b, [3, 2, 1])):
        stages = _step(answer, order, 3, 6)
        kept = [stage.most_kept for stage in stages]
        said = f"with {order.__name__} the ranks keep {kept} of 6 microbatches at most"
        assert kept == wanted, f"{said}, and not {wanted}"
        assert not any(stage.kept for stage in stages), "after a step something is still kept"


CHECKS = (
    Check("1F1B's order is that of torch's Schedule1F1B", like_torch),
    Check("the bubble is what a simulated step has", idle_share),
    Check("GPipe on two ranks gives the gradients of the whole model", gradients_of_gpipe),
    Check("1F1B on three ranks gives them, too", gradients_of_1f1b),
    Check("1F1B keeps as many microbatches as there are ranks from here on", little_is_kept),
)
