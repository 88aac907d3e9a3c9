"""Communicators of tests: a transport without channels, and one that keeps what was sent as Gloo does."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld

FROM_CPU = Channel.TP_EXCHANGE  # and above: what ranks tell each other in main memory, where there are channels


class Posts:
    """The receives that all ranks of a world have posted: their channels, by (source, receiver)."""

    def __init__(self, world: ThreadWorld) -> None:
        self.world = world
        self.channels: defaultdict[tuple[int, int], list[int]] = defaultdict(list)


class WithoutChannels:
    """A rank's communicator by rendezvous: a send waits until its receive is posted, and messages between two ranks are
    matched by their order alone."""

    def __init__(self, posts: Posts, communicator: ThreadCommunicator) -> None:
        self._posts, self._communicator = posts, communicator
        self._sends: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._communicator, name)

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        if channel < FROM_CPU:
            number, posted = self._sends[to], self._posts.channels[self.rank, to]
            self._sends[to] += 1
            self._wait(lambda: len(posted) > number, to)
            assert posted[number] == channel, f"rank {to} takes channel {channel} for channel {posted[number]}"
        self._communicator.send(x, to, channel)

    def recv(self, shape: Any, dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        return self.start_recv(shape, dtype, device, source, channel)()

    def start_recv(
        self, shape: Any, dtype: torch.dtype, device: Any, source: int, channel: int
    ) -> Callable[[], torch.Tensor]:
        self._posts.channels[source, self.rank].append(channel)
        return self._communicator.start_recv(shape, dtype, device, source, channel)

    def _wait(self, ready: Callable[[], bool], to: int) -> None:
        self._posts.world.wait(self.rank, ready, lambda: f"rank {to} to post a receive")


class KeepsSends(WithoutChannels):
    """A rank's communicator that keeps what it sent until finish_sends finds that its receive was posted. `looked` is
    called there; the other's copy is made within `of_others`."""

    def __init__(
        self,
        posts: Posts,
        communicator: ThreadCommunicator,
        looked: Callable[[KeepsSends], None],
        of_others: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(posts, communicator)
        self._of_others = of_others
        self._kept: deque[tuple[torch.Tensor, int, int]] = deque()
        self._looked = looked

    @property
    def unfinished_sends(self) -> int:
        return len(self._kept)

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        if channel < FROM_CPU:
            self._kept.append((x, to, self._sends[to]))
            self._sends[to] += 1
        with self._of_others():
            there = x.clone()
        self._communicator.send(there, to, channel)

    def finish_sends(self, *, keep: int = 0) -> None:
        while len(self._kept) > keep:
            _, to, number = self._kept[0]
            self._wait(lambda to=to, number=number: len(self._posts.channels[self.rank, to]) > number, to)
            self._kept.popleft()
        self._looked(self)
