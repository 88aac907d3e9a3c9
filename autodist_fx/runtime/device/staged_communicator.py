"""The communicator of ranks that share a GPU: tensors on it travel through main memory, over the CPU's communicator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from autodist_fx.runtime.comm.dist_communicator import DistCommunicator
from autodist_fx.runtime.comm.remote_error import ErrorReport
from autodist_fx.runtime.device.cuda import to_device, to_host
from passes.ops.comm import Parts


class StagedCommunicator:
    """A communicator over `inner`, whose device is the CPU, for tensors on `device` or in main memory.

    What a method of DistCommunicator returns in the memory of `x`, this one does, too.
    """

    def __init__(self, inner: DistCommunicator, device: torch.device) -> None:
        self._inner, self.device = inner, device
        self.mesh, self.rank, self.tp_rank = inner.mesh, inner.rank, inner.tp_rank

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return the sum of `x` over this rank's tp group, or along "dp", on the device of `x`."""
        return _like(x, self._inner.all_reduce(_host(x), axis))

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
        """Return the whole tensor of which `x` is this rank's part along `dim`."""
        return _like(x, self._inner.all_gather(_host(x), axis, dim, parts))

    def start_all_reduce(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start summing `x` over the replicas; return a function that waits for it, and returns `x`, the sum."""
        return self._started(self._inner.start_all_reduce, x, axis)

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start filling `x`, flat, the n-th part of which is replica n's; return the same kind of function."""
        return self._started(self._inner.start_all_gather, x, axis)

    def start_reduce_scatter(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start the same sum, of which this rank is to have its own part alone."""
        return self._started(self._inner.start_reduce_scatter, x, axis)

    @staticmethod
    def _started(start: Callable[[torch.Tensor, str], Callable[[], torch.Tensor]], x: torch.Tensor, axis: str) -> Any:
        finish = start(_host(x), axis)
        return lambda: x.copy_(finish())

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        """Start sending."""
        self._inner.send(_host(x), to, channel)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        """Return a tensor from the global rank `source`; `device` None means the rank's own."""
        return self.start_recv(shape, dtype, device, source, channel)()

    def start_recv(
        self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int
    ) -> Callable[[], torch.Tensor]:
        """Post a receive; return a function that waits for it, and returns the tensor."""
        finish = self._inner.start_recv(shape, dtype, torch.device("cpu"), source, channel)
        wanted = self.device if device is None else torch.device(device)
        return lambda: finish() if wanted.type == "cpu" else to_device(finish(), wanted)

    def begin(self) -> None:
        """Repair, before a call of all ranks, what an incident broke off."""
        self._inner.begin()

    def break_off(self, error: BaseException, call: int = 0) -> ErrorReport:
        """End what all ranks are doing, since `error` was raised here; return the first error, which counts."""
        return self._inner.break_off(error, call)

    @property
    def unfinished_sends(self) -> int:
        """Return the number of sends that are not known to be received."""
        return self._inner.unfinished_sends

    def finish_sends(self, timeout: timedelta | None = None, *, keep: int = 0) -> None:
        """Let go of what was sent, but for the last `keep` sends, waiting for it where needed."""
        self._inner.finish_sends(timeout, keep=keep)

    def close(self) -> None:
        """Let go of the process groups."""
        self._inner.close()


def _host(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in main memory, a copy of its own where it comes from a device."""
    (there,) = to_host([x])
    return there


def _like(x: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return what came back in main memory on the device of `x`."""
    return found if x.device.type == "cpu" else to_device(found, x.device)
