"""Runs a function on several ranks of this process, a thread each: no network, and a deadlock is seen at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from autodist_fx.runtime.comm.gather import describe
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.mesh import Mesh
from passes.ops.comm import Communicator, Parts, using

T = TypeVar("T")


def on_ranks(work: Callable[[int], T], *, tp: int = 1, pp: int = 1) -> list[T]:
    """Run `work(rank)` on each of tp * pp ranks; return what they return, by rank.

    In it send, recv, all_reduce and all_gather of passes.ops.comm work between these ranks. What a rank raises, this
    raises. Raises DeadlockError where each rank waits for another, and CommunicationError for messages that do not fit.
    """

    def run(rank: int, communicator: ThreadCommunicator) -> T:
        with using(communicator):
            return work(rank)

    return ThreadWorld(Mesh(tp, pp)).run(run)


def messages(work: Callable[[int], Any], *, tp: int = 1, pp: int = 1) -> list[Counter[str]]:
    """Run `work` as on_ranks does; return for each rank which messages it took part in, and how often.

    A message is "all_reduce of float32[2, 5, 16]", "send of float32[2, 16]", in the shape that this rank has of it.
    """

    def run(rank: int, communicator: ThreadCommunicator) -> Counter[str]:
        counting = _Counting(communicator)
        with using(counting):
            work(rank)
        return counting.said

    return ThreadWorld(Mesh(tp, pp)).run(run)


class _Counting(Communicator):
    """A communicator that notes what it is asked for, and hands it on."""

    def __init__(self, inner: ThreadCommunicator) -> None:
        self._inner, self.tp_rank = inner, inner.tp_rank
        self.said: Counter[str] = Counter()

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        self.said[f"all_reduce of {describe(x)}"] += 1
        return self._inner.all_reduce(x, axis)

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
        self.said[f"all_gather of {describe(x)}"] += 1
        return self._inner.all_gather(x, axis, dim, parts)

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        self.said[f"send of {describe(x)}"] += 1
        self._inner.send(x, to, channel)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        received = self._inner.recv(shape, dtype, device, source, channel)
        self.said[f"recv of {describe(received)}"] += 1
        return received


__all__ = ["messages", "on_ranks"]
