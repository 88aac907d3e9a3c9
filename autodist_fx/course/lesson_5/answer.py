"""Lesson 5: training on a pipeline. Write the 1F1B schedule, and the two passes that it puts in order.

Fill in the four holes, then run

    autodist-fx course check 5
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from passes.ops.comm import recv, send

ACTIVATIONS, GRADIENTS = 0, 1  # channels: what goes forward, what comes back


class Action(NamedTuple):
    """A pass of this rank's stage over one microbatch: "F" is forward, "B" is backward."""

    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}"


def gpipe(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """Return GPipe's order, the same on all ranks: every forward pass, then every backward pass."""
    return [Action(kind, m) for kind in "FB" for m in range(microbatches)]


def one_f_one_b(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """Return 1F1B's order on this rank: a few forward passes, then one backward and one forward in turn, and at last
    the backward passes that are left.

    On the last rank it is F0 B0 F1 B1 ...; each rank before it goes one more forward pass ahead. Microbatches go
    forward in order, and backward in order. There are at least as many microbatches as ranks.
    """
    # hole
    ahead = ranks - rank  # the last rank goes back right after its first forward pass
    order = [Action("F", m) for m in range(ahead)]
    for m in range(microbatches):
        order.append(Action("B", m))
        if ahead + m < microbatches:
            order.append(Action("F", ahead + m))
    return order
    # end


def bubble(ranks: int, microbatches: int) -> float:
    """Return the share of a step, 0.0 to 1.0, in which a rank does nothing, where all passes take equally long.

    It is the same for GPipe and 1F1B. Draw the step of 2 ranks and 2 microbatches, and count.
    """
    # hole
    return (ranks - 1) / (microbatches + ranks - 1)
    # end


class Stage:
    """A rank's stage in training: `module` with the messages and the memory of a step.

    Microbatch m of the inputs is inputs[m]; `loss(y, m)` is its loss, a mean over the microbatch, on the last stage.
    shape: of what the stages hand over. `kept`: what the backward pass of a microbatch will need, by microbatch.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: int,
        ranks: int,
        inputs: Sequence[torch.Tensor],
        loss: Callable[[torch.Tensor, int], torch.Tensor],
        shape: tuple[int, ...],
    ) -> None:
        self.module, self.rank, self.ranks = module, rank, ranks
        self.inputs, self.loss, self.shape = inputs, loss, shape
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.most_kept = 0

    def forward(self, m: int) -> None:
        """Run microbatch m forward, and keep (x, y) of it: what the module read, and what it gave or its loss.

        The first stage reads inputs[m], others receive x from the rank before, on channel ACTIVATIONS. The last stage
        turns y into the loss, divided by the number of microbatches; others send y to the rank behind. A tensor that
        has a graph behind it is sent as y.detach(); x.requires_grad_() makes x one whose gradient autograd keeps.
        """
        # hole
        if self.is_first:
            x = self.inputs[m]
        else:
            x = recv(self.shape, torch.float64, "cpu", self.rank - 1, ACTIVATIONS).requires_grad_()
        y = self.module(x)
        if self.is_last:
            y = self.loss(y, m) / len(self.inputs)
        else:
            send(y.detach(), self.rank + 1, ACTIVATIONS)
        self.kept[m] = (x, y)
        # end

    def backward(self, m: int) -> None:
        """Run microbatch m backward, and keep nothing of it.

        The last stage starts from its loss, others from the gradient of y, which they receive from the rank behind on
        channel GRADIENTS: y.backward(gradient). All but the first send the gradient of x, x.grad, to the rank before.
        """
        # hole
        x, y = self.kept.pop(m)
        if self.is_last:
            y.backward()
        else:
            y.backward(recv(self.shape, torch.float64, "cpu", self.rank + 1, GRADIENTS))
        if not self.is_first:
            assert x.grad is not None
            send(x.grad, self.rank - 1, GRADIENTS)
        # end

    def step(self, order: Sequence[Action]) -> None:
        """Run a step's actions in order; gradients add up in the module's parameters."""
        for action in order:
            if action.kind == "F":
                self.forward(action.microbatch)
            else:
                self.backward(action.microbatch)
            self.most_kept = max(self.most_kept, len(self.kept))
