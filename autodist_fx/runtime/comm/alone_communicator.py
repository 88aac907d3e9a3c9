"""The `Communicator` of a mesh of one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.gather import frozen_parts, gather_layout, glue
from autodist_fx.runtime.comm.remote_error import ErrorReport
from passes.ops.comm import Parts


class AloneCommunicator:
    """A communicator with nobody to talk to: collectives give back what they were given."""

    rank = tp_rank = unfinished_sends = 0

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        return x

    def start_all_reduce(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        return lambda: x

    start_reduce_scatter = start_all_reduce

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        return lambda: x

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
        return glue([x], dim, gather_layout(frozen_parts(parts)))

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        raise CommunicationError(f"send to rank {to}, and this mesh has one rank")

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        raise CommunicationError(f"recv from rank {source}, and this mesh has one rank")

    def start_recv(
        self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int
    ) -> Callable[[], torch.Tensor]:
        return self.recv(shape, dtype, device, source, channel)

    def begin(self) -> None:
        pass

    def break_off(self, error: BaseException, call: int = 0) -> ErrorReport:
        return ErrorReport.of(self.rank, error, call)

    def finish_sends(self, *, keep: int = 0) -> None:
        pass

    def close(self) -> None:
        pass
