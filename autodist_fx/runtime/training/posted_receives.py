"""`PostedReceives`: the receives that a rank has posted ahead, so that messages travel while it computes.

They are posted in the order of the sends (cost_model/schedule/messages.py), which a transport without channels needs.
A message's shape is known ahead: forward it follows from the microbatch's inputs, as the program's own recv has it;
backward it is that of what was sent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.channels import channel_text
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from cost_model.plan.data import Hop
from cost_model.schedule.messages import StageValue
from passes.fx.arguments import argument
from passes.ops.comm import COMM_OPS, recv, send
from passes.program.rank_program import RankProgram


class PostedReceives:
    """The tensors that a rank will receive, by the rank that sends each and its channel, in the order of posting.
    `waited_seconds`: for how long the rank has done nothing but wait for them."""

    def __init__(self, communicator: TrainingCommunicator) -> None:
        self._communicator = communicator
        self.waited_seconds = 0.0
        self._posted: dict[tuple[int, int], deque[Callable[[], torch.Tensor]]] = {}

    def post(
        self, shape: Sequence[int | None], dtype: torch.dtype, device: Any, source: int, channel: int
    ) -> None:
        """Post a receive of a tensor. Where a dim is None, the shape that goes ahead is waited for here; a transport
        that posts nothing waits for the tensor, too."""
        posted, began = self._posted.setdefault((source, channel), deque()), time.perf_counter()
        if None in shape:
            ahead = self._communicator.recv((len(shape),), torch.long, device, source, channel)
            posted.append(lambda: ahead)
            shape = ahead.tolist()
        posted.append(self._communicator.start_recv(shape, dtype, device, source, channel))  # type: ignore[arg-type]
        self.waited_seconds += time.perf_counter() - began

    def take(self, shape: Sequence[int], source: int, channel: int) -> torch.Tensor:
        """Return the next tensor of a channel, for which it waits. Raises CommunicationError where none was posted, or
        one of another shape."""
        posted, began = self._posted.get((source, channel)), time.perf_counter()
        x = posted.popleft()() if posted else None
        self.waited_seconds += time.perf_counter() - began
        if x is None or tuple(x.shape) != tuple(shape):
            found = "none was posted" if x is None else f"the one posted is of shape {list(x.shape)}"
            raise CommunicationError(
                f"a tensor of shape {list(shape)} of rank {source} is wanted on channel {channel_text(channel)}, and "
                f"{found}"
            )
        return x


def stage_values(hops: Sequence[Hop], programs: Mapping[int, RankProgram]) -> list[StageValue]:
    """Return what stages send to each other, in the order of channels; of what the stages of `programs` send, whether
    its gradient comes back is known, and of the rest it is taken for granted."""
    returned = {
        (stage, program.mesh.coordinates(argument(node, 1, "to"))[0], argument(node, 2, "channel")): bool(
            node.kwargs.get("gradient")
        )
        for stage, program in programs.items()
        for node in program.graph_module.graph.nodes
        if node.target is send
    }
    return [
        StageValue(h.source, h.target, h.channel, returned.get((h.source, h.target, h.channel), True), h.op)
        for h in sorted(hops, key=lambda hop: hop.channel)
    ]


def arrival(
    program: RankProgram, source: int, channel: int, inputs: Mapping[str, Any]
) -> tuple[tuple[int | None, ...], torch.dtype, Any]:
    """Return shape, dtype and device of what a program receives of the program of rank `source` on a channel, given the
    microbatch's inputs. A dim is None where the sender says it."""
    wanted = (source, channel)
    node = next(
        n
        for n in program.graph_module.graph.nodes
        if n.target is recv and (argument(n, 3, "source"), argument(n, 4, "channel")) == wanted
    )
    shape, dtype, device = (argument(node, at, name) for at, name in enumerate(("shape", "dtype", "device")))
    known: dict[Node, Any] = {}

    def value(asked: Node) -> Any:
        if asked not in known:
            known[asked] = inputs[str(asked.target)] if asked.op == "placeholder" else computed(asked)
        return known[asked]

    def computed(asked: Node) -> Any:
        if asked.op != "call_function" or asked.target in COMM_OPS:
            raise CommunicationError(f"{node} is received in a shape that follows from {asked}, which is no input's")
        return asked.target(*map_arg(asked.args, value), **map_arg(asked.kwargs, value))

    return tuple(map_arg(shape, value)), dtype, map_arg(device, value)
