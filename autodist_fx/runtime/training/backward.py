"""Goes back through a stage: gradients of what it sent come in, those of what it received go out.

A stage is one piece to autograd: what it receives are leaves, what it sends are roots beside the loss. After its
forward pass a rank waits for the gradients of all that it has sent, goes back through its graph once, and sends each
leaf's gradient back to where it came from; those of its parameters, which nobody waits for, may follow in a pass of
their own. Later stages never wait for earlier ones, so that nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.training.autograd.split_backward import WeightGradients, backward_inputs
from passes.ops.comm import Communicator, Tape


def go_back(
    tape: Tape, communicator: Communicator, loss: torch.Tensor | None, parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Run a rank's backward pass; return the gradient that it has of each parameter, None where nothing of the loss
    depends on it.

    `tape` is of its forward pass; `loss`, of one element, is None on a rank that has none.
    """
    roots, known = _awaited(tape, communicator, loss)
    wanted = [*parameters, *(x for x, _, _ in tape.received)]
    found: list[torch.Tensor | None] = [None] * len(wanted)
    if roots and wanted:
        # in this thread: one for all ranks of a simulation on a GPU would wait for itself
        with torch.autograd.set_multithreading_enabled(False):
            found = list(torch.autograd.grad(roots, wanted, known, allow_unused=True))
    _send_back(tape, communicator, found[len(parameters) :])
    return found[: len(parameters)]


def go_back_to_inputs(
    tape: Tape, communicator: Communicator, loss: torch.Tensor | None, parameters: Sequence[torch.Tensor]
) -> WeightGradients:
    """Run the part of the same pass that other ranks wait for; return what is left of it, which sends nothing."""
    roots, known = _awaited(tape, communicator, loss)
    found, left = backward_inputs(roots, known, [x for x, _, _ in tape.received], parameters)
    _send_back(tape, communicator, found)
    return left


def _awaited(
    tape: Tape, communicator: Communicator, loss: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return (what a backward pass starts from, the gradient of each), when all of these have come."""
    roots, known = ([], []) if loss is None else ([loss], [torch.ones_like(loss)])
    for x, to, channel in tape.sent:
        gradient = communicator.recv(x.shape, x.dtype, x.device, to, Channel.GRADIENTS + channel)
        if x.requires_grad:
            roots.append(x)
            known.append(gradient)
    return roots, known


def _send_back(tape: Tape, communicator: Communicator, gradients: Sequence[torch.Tensor | None]) -> None:
    """Send the gradients of what was received to where it came from: zeros where nothing depends on it."""
    for (x, source, channel), gradient in zip(tape.received, gradients, strict=True):
        back = torch.zeros_like(x) if gradient is None else gradient.contiguous()
        communicator.send(back, source, Channel.GRADIENTS + channel)
