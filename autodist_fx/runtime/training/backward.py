"""Goes back through a stage: gradients of what it sent come in, those of what it received go out.

A stage is one piece to autograd: what it receives are leaves, what it sends are roots beside the loss. After its
forward pass a rank waits for the gradients of all that it has sent, goes back through its graph once, and sends each
leaf's gradient back to where it came from. Later stages never wait for earlier ones, so that nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autodist_fx.runtime.comm.channels import Channel
from passes.ops.comm import Communicator, Tape


def go_back(
    tape: Tape, communicator: Communicator, loss: torch.Tensor | None, parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Run a rank's backward pass; return the gradient that it has of each parameter, None where nothing of the loss
    depends on it.

    `tape` is of its forward pass; `loss`, of one element, is None on a rank that has none.
    """
    roots, known = ([], []) if loss is None else ([loss], [torch.ones_like(loss)])
    for x, to, channel in tape.sent:
        gradient = communicator.recv(x.shape, x.dtype, x.device, to, Channel.GRADIENTS + channel)
        if x.requires_grad:
            roots.append(x)
            known.append(gradient)
    leaves = [x for x, _, _ in tape.received]
    wanted = [*parameters, *leaves]
    found: list[torch.Tensor | None] = [None] * len(wanted)
    if roots and wanted:
        # in this thread: one for all ranks of a simulation on a GPU would wait for itself
        with torch.autograd.set_multithreading_enabled(False):
            found = list(torch.autograd.grad(roots, wanted, known, allow_unused=True))
    for (x, source, channel), gradient in zip(tape.received, found[len(parameters) :], strict=True):
        back = torch.zeros_like(x) if gradient is None else gradient.contiguous()
        communicator.send(back, source, Channel.GRADIENTS + channel)
    return found[: len(parameters)]
