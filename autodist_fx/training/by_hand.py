"""`loss.backward()` by hand on one stage of one replica: a rank's module, called like the model.

The loss that a call returns is a node of autograd whose backward pass goes back through the rank's graph, and pays the
sums that ranks owe each other. So what is added to `.grad` is each time the whole gradient of that call, however many
calls are accumulated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx
from torch import nn

from autodist_fx.runtime.table_checks import lookups_checked
from autodist_fx.runtime.training.backward import go_back
from autodist_fx.runtime.training.gradient_sums import pay_sums
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from autodist_fx.runtime.training.stage import LOSS
from passes.ops.comm import Tape, using
from passes.program.rank_program import RankProgram

Gradients = list[torch.Tensor | None]


class RankModel(nn.Module):
    """A rank's share of a model; its parameters are the rank's slices. `Engine.model_for` makes it."""

    def __init__(self, graph_module: torch.fx.GraphModule, call: Callable[[Mapping[str, Any]], Any]) -> None:
        super().__init__()
        self.graph_module = graph_module
        self._call = call

    def forward(self, **batch: Any) -> Any:
        """Return the model's output with its `loss` for this batch, the same on all ranks, for `loss.backward()` on all
        of them; nothing else of the output. Raises what `Engine.step` raises for a batch."""
        return self._call(batch)


def loss_by_hand(program: RankProgram, inputs: Mapping[str, Any], communicator: TrainingCommunicator) -> torch.Tensor:
    """Return the loss of a rank's program, whose backward pass gives the rank's parameters their gradients."""
    tape, graph = Tape(), program.graph_module
    with lookups_checked(graph, inputs), using(communicator, tape), torch.enable_grad():
        loss = graph(**inputs)[LOSS]
    trained = {name: p for name, p in graph.named_parameters() if p.requires_grad}

    def gradients() -> Gradients:
        found = go_back(tape, communicator, loss, list(trained.values()))
        own = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
        pay_sums(program, own, communicator)
        return [own.get(name) for name in trained]

    return _Loss.apply(gradients, loss.detach(), *trained.values())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: Callable[[], Gradients], loss: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *of_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = of_loss
        return (None, None, *(None if g is None else g * factor for g in ctx.gradients()))
