"""`StepChannel`: carries messages from the rank that leads a generation to all others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.generation.step_messages import BLOCK, Message, TensorSpec
from passes.ops.comm import Communicator


class StepChannel:
    """A channel from `leader` to `followers`, global ranks; each rank of the mesh has one, and gets messages' tensors
    on its `device`. Integers cross on the CPU, without pickle.

    A message is one tensor of BLOCK integers and, where it is longer, a second one of the rest: so the other side knows
    what to receive.
    """

    def __init__(
        self, communicator: Communicator, leader: int, followers: Sequence[int], device: torch.device
    ) -> None:
        self._communicator, self._leader, self._followers = communicator, leader, tuple(followers)
        self._device = device
        self.sent = 0  # sends so far, of messages and tensors

    def say(self, message: Message) -> None:
        """Start sending a message to every follower; called on the leader."""
        packed = message.pack()
        pieces = (packed,) if packed.shape[0] == BLOCK else (packed[:BLOCK], packed[BLOCK:])
        for rank in self._followers:
            for piece in pieces:
                self._communicator.send(piece, rank, Channel.STEPS)
                self.sent += 1

    def hear(self) -> Message:
        """Return the leader's next message; waits for it. Raises CommunicationError where it is damaged."""
        return Message.unpack(self._receive(BLOCK), self._device, self._receive)

    def _receive(self, integers: int) -> torch.Tensor:
        return self._communicator.recv((integers,), torch.long, "cpu", self._leader, Channel.STEPS)

    def send(self, tensor: torch.Tensor, channel: Channel) -> None:
        """Send a tensor that a message announced, to every follower."""
        for rank in self._followers:
            self._communicator.send(tensor.contiguous(), rank, channel)
            self.sent += tensor.numel() > 0

    def receive(self, spec: TensorSpec, channel: Channel) -> torch.Tensor:
        """Return a tensor that a message of the leader's announced."""
        return self._communicator.recv(spec.shape, spec.dtype, self._device, self._leader, channel)
