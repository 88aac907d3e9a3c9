"""`ReplicaCommunicator`: carries what one stage's program says to the ranks that run the other stages of its replica.

A program is emitted for a mesh of stages and tp ranks, and knows neither of dp nor of how many stages a rank has. Its
peers are ranks of that mesh; here they become ranks of the mesh that runs. What goes to a program of the same rank is
handed over in memory. Microbatches of one hop follow each other in order on its channel, since a stage runs them in
one order, forward and backward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.channels import channel_text
from cost_model.mesh import Mesh
from passes.ops.comm import Communicator, Parts


class TrainingCommunicator(Communicator, Protocol):
    """A communicator that also speaks along dp, posts receives ahead, and knows when what was sent has arrived."""

    def start_all_reduce(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start the sum of `x` along `axis`; the function returned waits for it and returns it."""

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start filling `x`, flat, of which each rank of `axis` has made the part of its number, all of one size; the
        function returned waits for it and returns it."""

    def start_reduce_scatter(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start the sum of `x`, flat, along `axis`, of which this rank wants its part alone; the function returned
        waits for it and returns `x`, the other parts of which mean nothing then."""

    def start_recv(
        self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int
    ) -> Callable[[], torch.Tensor]:
        """Post a receive; the function returned waits for the tensor and returns it."""

    @property
    def unfinished_sends(self) -> int:
        """The number of sends that are not known to be received, and that it keeps."""

    def finish_sends(self, *, keep: int = 0) -> None:
        """Let go of what was sent, but for the last `keep` sends, when the others have received it."""


class Posted(Protocol):
    """Receives that were posted ahead (posted_receives.py)."""

    def take(self, shape: Sequence[int], source: int, channel: int) -> torch.Tensor:
        """Return the next tensor of the global rank `source` on a channel, for which it waits."""


Letters = dict[tuple[int, int, int], deque[torch.Tensor]]  # by (source, to, channel), in ranks of the programs' mesh


def runs_on(mesh: Mesh, stage_ranks: Sequence[int], dp_rank: int) -> Callable[[int], int]:
    """Return the function that says which rank of `mesh` runs the program of a rank of the programs' mesh;
    `stage_ranks[s]` is the pipeline rank that has stage s."""

    def global_rank(program_rank: int) -> int:
        stage, tp_rank = divmod(program_rank, mesh.tp)
        return mesh.rank(stage_ranks[stage], tp_rank, dp_rank)

    return global_rank


class ReplicaCommunicator:
    """The Communicator of the program of `program_rank`, over `communicator`, which is rank `rank`'s.

    `letters` and `posted`, which has the receives from other ranks, are shared by the programs of one rank; without
    `posted` a receive is posted when it is waited for.
    """

    def __init__(
        self,
        communicator: TrainingCommunicator,
        rank: int,
        program_rank: int,
        global_rank: Callable[[int], int],
        letters: Letters,
        posted: Posted | None,
    ) -> None:
        self._communicator, self._rank, self._program_rank = communicator, rank, program_rank
        self._posted = posted
        self._global_rank, self._letters = global_rank, letters
        self.tp_rank = communicator.tp_rank
        self.all_reduce = communicator.all_reduce
        self.all_gather: Callable[[torch.Tensor, str, int, Parts], torch.Tensor] = communicator.all_gather

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        other = self._global_rank(to)
        if other == self._rank:
            self._letters.setdefault((self._program_rank, to, channel), deque()).append(x)
        else:
            self._communicator.send(x, other, channel)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        other = self._global_rank(source)
        if other != self._rank:
            if self._posted is None:
                return self._communicator.recv(shape, dtype, device, other, channel)
            return self._posted.take(shape, other, channel)
        letters = self._letters.get((source, self._program_rank, channel))
        if not letters:
            raise CommunicationError(
                f"rank {self._rank}: the program of rank {self._program_rank} expects a tensor of that of rank "
                f"{source}, on channel {channel_text(channel)}, which the schedule runs later"
            )
        return letters.popleft().clone()  # the receiver may write into it
