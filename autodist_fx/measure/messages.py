"""Messages between ranks, as the runtime carries them: collectives of a tp group, sends between stages, sums over
replicas.

Each is measured in a program that computes in between, a product with a weight of 6 MB. So its seconds have what ranks
wait for each other, and that what they compute puts the messages' memory out of their caches.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from autodist_fx.measure.chain import Clock
from autodist_fx.measure.pool import Pool
from autodist_fx.runtime.comm.process_group import JoinedRank
from passes.ops.comm import Parts, all_gather, all_reduce, using

_MESSAGE_BYTES = (2**12, 2**15, 2**18, 2**21, 2**24)
_REPLICA_BYTES = (2**18, 2**22, 2**25)  # of gradients' buckets
_WIDTH = 1024  # bytes of a row: 4 KiB in float32
_WEIGHT = (2048, 768)
_PAIRS, _REPEATS = 8, 9
_LEAST_SECONDS = 1e-6


@dataclass(frozen=True, slots=True)
class Messages:
    """The communicators of a rank on three meshes of all ranks, and what else messages are measured with."""

    joined: JoinedRank
    by_stage: JoinedRank
    by_replica: JoinedRank
    pool: Pool
    clock: Clock

    @property
    def ranks(self) -> int:
        """Ranks that take part."""
        return self.joined.mesh.size

    def compute(self) -> Callable[[], object]:
        """Return what is computed between two messages, on a weight that no cache has."""
        return functools.partial(F.linear, self.pool.warm((1, _WEIGHT[1])), self.pool.cold(_WEIGHT))

    def tensor(self, nbytes: int) -> torch.Tensor:
        """Return zeros, which stay so however often they are added up: x [rows, _WIDTH]."""
        width = min(_WIDTH, nbytes // self.pool.dtype.itemsize)
        rows = max(1, nbytes // self.pool.dtype.itemsize // width)
        return torch.zeros(rows, width, dtype=self.pool.dtype, device=self.pool.device)


def message_tables(messages: Messages) -> dict[str, list[dict[str, Any]]]:
    """Return the tables of the links between the ranks of a stage ("tp"), and between stages and replicas ("pp")."""
    return {
        "tp": [
            _table("all_reduce", messages, _MESSAGE_BYTES, _all_reduce),
            _table("all_gather", messages, _MESSAGE_BYTES, _all_gather),
        ],
        "pp": [
            _table("send", messages, _MESSAGE_BYTES, _send),
            _table("all_reduce", messages, _REPLICA_BYTES, _over_replicas),
        ],
    }


def _table(
    kind: str, messages: Messages, sizes: Sequence[int], seconds: Callable[[Messages, int], float]
) -> dict[str, Any]:
    values = [max(_LEAST_SECONDS, seconds(messages, nbytes)) for nbytes in sizes]
    axes = [[float(messages.ranks)], list(map(float, sizes))]
    return {"kind": kind, "dtype": "", "axes": axes, "seconds": values, "fixed_seconds": 0.0}


def _all_reduce(messages: Messages, nbytes: int) -> float:
    x = messages.tensor(nbytes)
    return _between(messages, lambda: all_reduce(x, "tp"))


def _all_gather(messages: Messages, nbytes: int) -> float:
    """Along the last dim, as the layers of a model do; `nbytes` are of the whole."""
    whole = messages.tensor(nbytes)
    parts = _parts(whole.shape[-1], messages.ranks)
    start, stop = parts[messages.joined.rank][0]
    x = whole[:, start:stop].contiguous()
    return _between(messages, lambda: all_gather(x, "tp", 1, parts))


def _over_replicas(messages: Messages, nbytes: int) -> float:
    x = messages.tensor(nbytes)
    return _between(messages, lambda: messages.by_replica.communicator.start_all_reduce(x, "dp")())


def _parts(size: int, ranks: int) -> Parts:
    edges = [size * r // ranks for r in range(ranks + 1)]
    return tuple(((a, b),) for a, b in itertools.pairwise(edges))


def _between(messages: Messages, message: Callable[[], object]) -> float:
    """Return what a message adds to the seconds of a program that computes in between."""
    with using(messages.joined.communicator):
        message()
        differences = []
        for _ in range(_REPEATS):
            work = [messages.compute() for _ in range(2 * _PAIRS)]
            plain = messages.clock.seconds(lambda work=work: [step() for step in work[:_PAIRS]])  # type: ignore[misc]
            both = messages.clock.seconds(
                lambda work=work: [(step(), message()) for step in work[_PAIRS:]]  # type: ignore[misc]
            )
            differences.append((both - plain) / _PAIRS)
    return statistics.median(differences)


def _send(messages: Messages, nbytes: int) -> float:
    """Half of there and back between ranks 0 and 1, of which each computes while the other waits."""
    rank, communicator = messages.by_stage.rank, messages.by_stage.communicator
    if rank > 1:
        for _ in range(_REPEATS):
            messages.clock.seconds(lambda: None)
        return _LEAST_SECONDS
    x, other = messages.tensor(nbytes), 1 - rank

    def receive() -> None:
        communicator.recv(x.shape, x.dtype, None, other, 0)

    spent: list[float] = []

    def compute(work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        messages.clock.finish()
        spent.append(time.perf_counter() - began)

    def there_and_back(work: Sequence[Callable[[], object]]) -> None:
        for step in work:
            if rank:
                receive()
            compute(step)
            communicator.send(x, other, 0)
            if not rank:
                receive()

    rounds = []
    for _ in range(_REPEATS):
        spent.clear()
        whole = messages.clock.seconds(functools.partial(there_and_back, [messages.compute() for _ in range(_PAIRS)]))
        rounds.append((whole - 2 * sum(spent)) / _PAIRS / 2)
        communicator.finish_sends()
    return statistics.median(rounds)
