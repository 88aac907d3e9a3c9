"""Collectives, send and recv as a rank's graph calls them: plain functions of tensors, names and integers.

The graph never holds a process group: it prints, diffs and serialises, and runs on whichever communicator is current
in the calling thread (`using(communicator)`), be it threads of one process or torch.distributed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.fx.node

from passes.ops.comm_autograd import AllGather, AllReduce, CopyToTp, Parts
from passes.ops.losses import widened


class Communicator(Protocol):
    """The carrier of bytes between ranks. `axis` is a mesh axis ("tp"); `to` and `source` are global ranks."""

    tp_rank: int  # of the rank that it speaks for

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Returns the sum of every rank's `x` (same shape everywhere); may reuse `x`'s memory."""

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
        """Returns the whole tensor of which each rank holds `parts[rank]` along `dim` (uneven, even empty, parts
        allowed)."""

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        """Starts sending `x`, which is not changed afterwards; returns before the bytes have left."""

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        """Returns the next tensor from `source` on `channel`, for which it waits."""


@dataclass
class Tape:
    """A list of what a graph has sent and received that gradients come back of, in order; each with the other's
    global rank and the channel. What was received is a leaf to autograd."""

    sent: list[tuple[torch.Tensor, int, int]] = field(default_factory=list)
    received: list[tuple[torch.Tensor, int, int]] = field(default_factory=list)


_local = threading.local()


@contextlib.contextmanager
def using(communicator: Communicator, tape: Tape | None = None) -> Iterator[None]:
    """Makes `communicator` the one that this thread's graphs speak through, and notes on `tape` what they say."""
    before = getattr(_local, "communicator", None), getattr(_local, "tape", None)
    _local.communicator, _local.tape = communicator, tape
    try:
        yield
    finally:
        _local.communicator, _local.tape = before


def current() -> Communicator:
    """Returns this thread's communicator. Raises RuntimeError outside of `using`."""
    communicator = getattr(_local, "communicator", None)
    if communicator is None:
        raise RuntimeError(
            "a rank's graph was called outside a communicator: run it with compiled.simulate(...), under torchrun "
            "through adx.from_pretrained(...), or inside `with passes.ops.comm.using(communicator):`"
        )
    return communicator


def all_reduce(x: torch.Tensor, axis: str) -> torch.Tensor:
    """Returns the sum of `x` over the ranks of `axis`, in the shape of `x`, on each of them."""
    if _has_gradient(x):
        return AllReduce.apply(x, axis, current())
    return current().all_reduce(x, axis)


def all_gather(x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
    """Returns the whole tensor of which each rank of `axis` holds `parts[rank]`, index intervals along `dim`."""
    if _has_gradient(x):
        return AllGather.apply(x, axis, dim, parts, current())
    return current().all_gather(x, axis, dim, parts)


def copy_to_tp(x: torch.Tensor, axis: str) -> torch.Tensor:
    """Returns `x` itself, for readers of whose gradients each rank has a term: backward they are added up
    (Megatron's f)."""
    if _has_gradient(x):
        return CopyToTp.apply(x, axis, current())
    return x


def log_sum_exp(x: torch.Tensor, axis: str, dim: int, ranks: int) -> torch.Tensor:
    """Returns log(sum(exp(x))) over `dim`, of which each of the `ranks` ranks of `axis` has a part: x's shape without
    it, the same on each; in float32 where x has 16 bits. No gradient comes through it."""
    own = torch.logsumexp(widened(x.detach()), dim, keepdim=True)
    parts = tuple(((rank, rank + 1),) for rank in range(ranks))
    return torch.logsumexp(current().all_gather(own, axis, dim, parts), dim)


def _has_gradient(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def send(x: torch.Tensor, to: int, channel: int, sized: bool = False, gradient: bool = False) -> None:
    """Sends `x` to the global rank `to`. `sized`: its shape goes ahead, which the receiver cannot tell from the
    model's inputs. `gradient`: on a tape, its gradient is waited for on the way back."""
    tape = getattr(_local, "tape", None)
    if tape is not None:
        if gradient:
            tape.sent.append((x, to, channel))
        x = x.detach()
    if sized:
        current().send(torch.tensor(x.shape, device=x.device), to, channel)
    current().send(x, to, channel)


def recv(
    shape: Sequence[int | None], dtype: torch.dtype, device: Any, source: int, channel: int, gradient: bool = False
) -> torch.Tensor:
    """Returns a tensor of this shape from the global rank `source`; a dim None is of the size that the sender says.
    `gradient`: on a tape, its gradient is sent back."""
    if None in shape:
        shape = current().recv((len(shape),), torch.long, device, source, channel).tolist()
    x = current().recv(shape, dtype, device, source, channel)  # type: ignore[arg-type]
    tape = getattr(_local, "tape", None)
    if gradient and tape is not None:
        tape.received.append((x.requires_grad_(), source, channel))
    return x


COLLECTIVES = (all_reduce, all_gather, log_sum_exp)
COMM_OPS = (*COLLECTIVES, send, recv)
CALLED = (*COMM_OPS, copy_to_tp)  # by graphs: what a saved one may name as "comm.<function>"

# torch.fx drops nodes without users; a send has none, and a recv or a collective must stay matched with its peers.
for _op in COMM_OPS:
    torch.fx.node._side_effectful_functions.add(_op)
