"""What a rank's graph says to other ranks: plain functions of tensors, names and integers.

The graph never holds a process group: it prints, diffs and serialises, and runs on whichever communicator is current
in the calling thread (`using(communicator)`), be it threads of one process or torch.distributed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.fx.node

Parts = Sequence[Sequence[tuple[int, int]]]  # per tp rank, the intervals of the gathered dim it holds


class Communicator(Protocol):
    """What carries the bytes. `axis` is a mesh axis ("tp"); `to` and `source` are global ranks."""

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """The sum of every rank's `x` (same shape everywhere); may reuse `x`'s memory."""

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
        """The whole tensor of which each rank holds `parts[rank]` along `dim` (uneven, even empty, parts allowed)."""

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        """Start sending; `x` is not changed afterwards. Returns before the bytes have left."""

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        """The next tensor from `source` on `channel`; waits for it."""


_local = threading.local()


@contextlib.contextmanager
def using(communicator: Communicator) -> Iterator[None]:
    """Make `communicator` the one that this thread's graphs speak through."""
    before = getattr(_local, "communicator", None)
    _local.communicator = communicator
    try:
        yield
    finally:
        _local.communicator = before


def current() -> Communicator:
    communicator = getattr(_local, "communicator", None)
    if communicator is None:
        raise RuntimeError(
            "a rank's graph was called outside a communicator: run it with compiled.simulate(...), under torchrun "
            "through adx.from_pretrained(...), or inside `with passes.comm_ops.using(communicator):`"
        )
    return communicator


def all_reduce(x: torch.Tensor, axis: str) -> torch.Tensor:
    return current().all_reduce(x, axis)


def all_gather(x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
    return current().all_gather(x, axis, dim, parts)


def send(x: torch.Tensor, to: int, channel: int, sized: bool = False) -> None:
    """`sized`: its shape goes ahead, which the receiver cannot tell from the model's inputs."""
    if sized:
        current().send(torch.tensor(x.shape, device=x.device), to, channel)
    current().send(x, to, channel)


def recv(
    shape: Sequence[int | None], dtype: torch.dtype, device: Any, source: int, channel: int
) -> torch.Tensor:
    """A dim None is of the length that the sender says."""
    if None in shape:
        shape = current().recv((len(shape),), torch.long, device, source, channel).tolist()
    return current().recv(shape, dtype, device, source, channel)  # type: ignore[arg-type]


COLLECTIVES = (all_reduce, all_gather)
COMM_OPS = (*COLLECTIVES, send, recv)

# torch.fx drops nodes without users; a send has none, and a recv or a collective must stay matched with its peers.
for _op in COMM_OPS:
    torch.fx.node._side_effectful_functions.add(_op)
