"""Runs all ranks of a mesh in one process, a thread each, for `simulate`.

Only one thread runs at a time: a rank that must wait hands its turn to the next rank that can go on. So a simulation
does the same thing in the same order every time, a deadlock is seen at once (no rank can go on), and the ranks do not
fight over Python's lock.
"""

from __future__ import annotations

import functools
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from autodist_fx.errors import CommunicationError, DeadlockError
from autodist_fx.runtime.comm.channels import channel_text
from autodist_fx.runtime.comm.gather import check_shard, describe, frozen_parts, gather_layout, glue
from autodist_fx.runtime.comm.remote_error import CallBroken, ErrorReport
from cost_model.mesh import Mesh
from passes.ops.comm import Parts

T = TypeVar("T")


class _Stopped(BaseException):
    """Ends a rank's thread after another rank's failure. No Exception, lest a model's code catches it."""


@dataclass
class _Meeting:
    """One collective of one group, while its ranks arrive."""

    said: dict[int, str] = field(default_factory=dict)  # by global rank: what it called
    shards: dict[int, torch.Tensor] = field(default_factory=dict)
    result: torch.Tensor | None = None
    taken: int = 0


class ThreadWorld:
    """The ranks of a mesh: their turns, and the tensors on their way between them. For one `run`."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self._turns = [threading.Semaphore(0) for _ in range(mesh.size)]
        self._waits: dict[int, tuple[Callable[[], bool], Callable[[], str]]] = {}  # by rank: may it go on, what for
        self._finished: set[int] = set()
        self._failure: BaseException | None = None
        self._stopping = False
        self._over = threading.Event()
        self._incident: ErrorReport | None = None  # an error of a call, until all ranks begin anew
        self._epoch, self._beginning, self._noticed = 0, set[int](), set[int]()
        # Everything below is only touched by the thread whose turn it is.
        self.mail: dict[tuple[int, int, int], deque[torch.Tensor]] = {}  # by (source, to, channel)
        self.meetings: dict[tuple[str, int, int], _Meeting] = {}  # by (axis, first rank, how many before it)

    def run(self, work: Callable[[int, ThreadCommunicator], T]) -> list[T]:
        """Run `work(rank, communicator)` of every rank; return what they return, by rank.

        What a rank raises ends all of them and is raised here, with a note that names the rank. Raises DeadlockError
        when no rank can go on, CommunicationError for a tensor that was sent and never received.
        """
        results: list[Any] = [None] * self.mesh.size
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()  # both belong to a thread

        def run_rank(rank: int) -> None:
            self._turns[rank].acquire()
            try:
                if not self._stopping:
                    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
                        results[rank] = work(rank, ThreadCommunicator(self, rank))
            except _Stopped:
                pass
            except BaseException as error:
                error.add_note(f"raised on rank {rank} ({self._place(rank)})")
                self._fail(error)
            finally:
                self._finished.add(rank)
                self._hand_on(rank)

        threads = [
            threading.Thread(target=run_rank, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(self.mesh.size)
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        try:
            self._over.wait()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C, or an alarm's
            self._stopping = True  # each rank ends when it next speaks to another
            raise
        if self._failure is not None:
            raise self._failure
        if self._incident is None:  # else what was on its way was broken off
            self._refuse_unread_mail()
        return results

    def wait(self, rank: int, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        """Let the others run until `ready()`; `what()` completes "rank 1 waits for ...". Raises CallBroken after an
        incident, since what is awaited may never come."""
        self._wait(rank, lambda: self._incident is not None or ready(), what)
        if self._incident is not None:
            self._noticed.add(rank)
            raise CallBroken(self._incident)

    def break_off(self, report: ErrorReport) -> ErrorReport:
        """End every wait; return the error that counts, which is the first one."""
        self._incident = self._incident or report
        self._noticed.add(report.rank)
        return self._incident

    def begin(self, rank: int) -> bool:
        """Wait, after an incident, for all ranks to begin anew; return whether there was one. Raises CallBroken for
        one that this rank has not raised yet."""
        if self._incident is None:
            return False
        if rank not in self._noticed:
            self._noticed.add(rank)
            raise CallBroken(self._incident)
        epoch = self._epoch
        self._beginning.add(rank)

        def all_here() -> bool:
            return self._epoch > epoch or len(self._beginning | self._finished) == self.mesh.size

        self._wait(rank, all_here, lambda: "the others to begin anew")
        if self._epoch == epoch:
            self._epoch, self._incident = epoch + 1, None
            for left in (self._beginning, self._noticed, self.mail, self.meetings):
                left.clear()
        return True

    def _wait(self, rank: int, ready: Callable[[], bool], what: Callable[[], str]) -> None:
        if self._stopping:
            raise _Stopped
        if ready():
            return
        self._waits[rank] = (ready, what)
        self._hand_on(rank)
        self._turns[rank].acquire()
        if self._stopping:
            raise _Stopped
        del self._waits[rank]

    def _hand_on(self, rank: int) -> None:
        """Give the turn to the next rank that can go on."""
        size = self.mesh.size
        others = [(rank + step) % size for step in range(1, size + 1)]
        living = [r for r in others if r not in self._finished]
        if not living:
            self._over.set()
            return
        for other in living:
            if self._stopping or other not in self._waits or self._waits[other][0]():
                self._turns[other].release()
                return
        self._fail(self._deadlock())
        self._turns[living[0]].release()

    def _fail(self, error: BaseException) -> None:
        if self._failure is None:
            self._failure = error
        self._stopping = True

    def _place(self, rank: int) -> str:
        stage, tp_rank = self.mesh.coordinates(rank)
        replica = f"dp rank {self.mesh.dp_rank(rank)}, " if self.mesh.dp > 1 else ""
        return f"stage {stage}, {replica}tp rank {tp_rank}"

    def _deadlock(self) -> DeadlockError:
        lines = [f"deadlock: none of the {self.mesh.size} ranks of {self.mesh} can go on"]
        for rank in range(self.mesh.size):
            state = "has finished" if rank in self._finished else f"waits for {self._waits[rank][1]()}"
            lines.append(f"  rank {rank} ({self._place(rank)}) {state}")
        for (source, to, channel), tensors in sorted(self.mail.items()):
            if tensors:
                what = f"{describe(tensors[0])} from rank {source} to rank {to} on channel {channel_text(channel)}"
                lines.append(f"  unread: {what}")
        return DeadlockError("\n".join(lines))

    def _refuse_unread_mail(self) -> None:
        for (source, to, channel), tensors in sorted(self.mail.items()):
            if tensors:
                raise CommunicationError(
                    f"rank {source} sent {describe(tensors[0])} to rank {to} on channel {channel_text(channel)}, "
                    f"and rank {to} finished without receiving it"
                )


class ThreadCommunicator:
    """One rank's `Communicator` in a ThreadWorld. Sums in rank order, in the tensors' dtype."""

    def __init__(self, world: ThreadWorld, rank: int) -> None:
        self._world, self.rank = world, rank
        self._stage, self.tp_rank = world.mesh.coordinates(rank)
        self._groups = {
            "tp": world.mesh.tp_group(self._stage, world.mesh.dp_rank(rank)),
            "dp": world.mesh.dp_group(rank),
        }
        self._meetings_held: Counter[str] = Counter()

    def begin(self) -> None:
        """Forget, before a call of all ranks, what an incident broke off."""
        if self._world.begin(self.rank):
            self._meetings_held.clear()

    def break_off(self, error: BaseException, call: int = 0) -> ErrorReport:
        """End what all ranks are doing, since `error` was raised here; return the error that counts, which is the
        first one."""
        return self._world.break_off(ErrorReport.of(self.rank, error, call))

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        return self._meet(x, axis, f"all_reduce of {describe(x)}", _sum)

    def start_all_reduce(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Return a function that returns the sum; here it is taken at once."""
        total = self.all_reduce(x, axis)
        return lambda: total

    unfinished_sends = 0

    def finish_sends(self, *, keep: int = 0) -> None:
        """Let go of what was sent: there is nothing to do."""

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
        layout = gather_layout(frozen_parts(parts))
        if len(layout.local_sizes) != len(self._groups["tp"]):
            ranks = len(self._groups["tp"])
            raise CommunicationError(f"all_gather of {len(layout.local_sizes)} parts by {ranks} ranks")
        check_shard(x, dim, layout, self.tp_rank)
        dim %= x.dim()
        rest = [*x.shape[:dim], "*", *x.shape[dim + 1 :]]
        said = f"all_gather along dim {dim} of {str(x.dtype).removeprefix('torch.')}{rest}".replace("'", "")
        return self._meet(x, axis, said, lambda shards: glue(shards, dim, layout))

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        world = self._world
        world.mesh.coordinates(to)  # raises MeshError on a rank that is not there
        world.mail.setdefault((self.rank, to, channel), deque()).append(x)

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        mail = self._world.mail.setdefault((source, self.rank, channel), deque())

        def wanted() -> str:
            text = f"{str(dtype).removeprefix('torch.')}{list(shape)}"
            return f"{text} from rank {source} on channel {channel_text(channel)}"

        self._world.wait(self.rank, lambda: bool(mail), wanted)
        x = mail.popleft()
        if x.shape != torch.Size(shape) or x.dtype != dtype:
            raise CommunicationError(f"rank {self.rank} expects {wanted()}, and was sent {describe(x)}")
        return x.to(device=x.device if device is None else device, copy=True)  # the receiver may write into it

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Return a function that returns `x`; its parts are taken at once."""
        mine = x.chunk(len(self._groups[axis]))[self._world.mesh.dp_rank(self.rank)]
        x.copy_(self._meet(mine, axis, f"all_gather of {describe(x)}", torch.cat))
        return lambda: x

    def start_reduce_scatter(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Return a function that returns the sum in this rank's part of `x`, and no numbers in the others."""
        own = slice(*[self._world.mesh.dp_rank(self.rank) + n for n in (0, 1)])
        parts = x.view(len(self._groups[axis]), -1)
        total = self.all_reduce(x, axis).view(parts.shape)[own].clone()
        parts.fill_(math.nan)[own] = total
        return lambda: x

    def start_recv(
        self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int
    ) -> Callable[[], torch.Tensor]:
        """Return a function that returns the tensor; here it is waited for then."""
        return functools.partial(self.recv, shape, dtype, device, source, channel)

    def _meet(
        self, x: torch.Tensor, axis: str, said: str, combine: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        """Wait for the group, each with its `x`; the last to come combines them, in rank order."""
        if axis not in self._groups:
            raise CommunicationError(f"collectives run along the axes tp and dp; got {axis!r}")
        group = self._groups[axis]
        if len(group) == 1:
            return combine([x])
        key = (axis, group[0], self._meetings_held[axis])
        self._meetings_held[axis] += 1
        meeting = self._world.meetings.setdefault(key, _Meeting())
        for other, other_said in meeting.said.items():
            if other_said != said:
                raise CommunicationError(
                    f"collective {key[2] + 1} of stage {self._stage}: rank {other} calls {other_said}, and "
                    f"rank {self.rank} {said}"
                )
        meeting.said[self.rank], meeting.shards[self.rank] = said, x
        if len(meeting.shards) == len(group):
            meeting.result = combine([meeting.shards[r] for r in group])
            meeting.shards.clear()
        self._world.wait(
            self.rank,
            lambda: meeting.result is not None,
            lambda: f"ranks {[r for r in group if r not in meeting.said]} in {said}",
        )
        assert meeting.result is not None
        meeting.taken += 1
        if meeting.taken == len(group):
            del self._world.meetings[key]
            return meeting.result
        return meeting.result.clone()  # each rank may write into its own


def _sum(shards: list[torch.Tensor]) -> torch.Tensor:
    total = shards[0]
    for shard in shards[1:]:
        total = total + shard
    return total
