"""The `Communicator` of one rank among processes: torch.distributed over Gloo (CPU) or NCCL (CUDA)."""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.agreement import failed_wait
from autodist_fx.runtime.comm.channels import Channel, channel_text
from autodist_fx.runtime.comm.gather import (
    CHUNK_BYTES,
    CHUNKED_BYTES,
    GatherLayout,
    check_shard,
    describe,
    frozen_parts,
    gather_in_chunks,
    gather_layout,
    gather_padded,
    glue,
    with_size,
)
from autodist_fx.runtime.comm.meeting import make_group
from autodist_fx.runtime.comm.remote_error import CallBroken, ErrorReport
from autodist_fx.runtime.comm.shared_collectives import SharedCollectives
from autodist_fx.runtime.comm.shared_memory import open_shared_memory
from autodist_fx.runtime.comm.watchdog import Watchdog
from cost_model.mesh import Mesh
from passes.ops.comm import Parts

# Up to so many bytes sent per rank, an all_reduce is faster as an exchange (every rank sends its whole tensor to every
# other and adds up) than as Gloo's ring. Measured with 2 ranks on loopback, us, exchange / ring: 3 KB 88 / 415, 64 KB
# 290 / 627, 512 KB 600 / 870, 1.5 MB 1520 / 1720 and 3700 / 1270. Gloo hands a collective to a thread of its own, and a
# ring needs 2 (tp - 1) hops; a send writes to the socket at once.
EXCHANGE_BYTES = 512 * 1024


class DistCommunicator:
    """The communicator of `rank` of `mesh`, over process groups that the ranks of the mesh make by way of `store`.

    `timeout` bounds every wait. `watchdog` tells of ranks that died, and of incidents: an error of a call that a rank
    raised while others may wait for it. Those waits end with CallBroken, on all ranks, and `begin` makes new groups.
    What is between two repairs is an epoch; `scope`, alike on all ranks, tells this communicator's from another's.

    How tensors travel in the tp group may be set between calls, alike on all ranks: through memory that they share
    (`shared`; None: not), by sends to each (`exchanges`, of an all_reduce up to `exchange_bytes`), and in chunks of
    `chunk_bytes` where a rank's shard has `chunked_bytes` or more.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        device: torch.device,
        store: dist.Store,
        watchdog: Watchdog,
        timeout: timedelta = timedelta(minutes=10),
        scope: str = "mesh",
    ) -> None:
        self.mesh, self.device, self.rank = mesh, device, rank
        self._store, self._watchdog, self._timeout, self._scope = store, watchdog, timeout, scope
        self._stage, self.tp_rank = mesh.coordinates(rank)
        self._ranks = mesh.tp_group(self._stage, mesh.dp_rank(rank))
        self._replicas = mesh.dp_group(rank)
        self._peers = [r for r in range(mesh.tp) if r != self.tp_rank]
        self._alone = mesh.tp == 1
        self._sum = dist.AllreduceOptions()
        self._sum.timeout = timeout
        self.exchanges = device.type == "cpu"  # NCCL knows better itself
        self.is_captured = device.type == "cuda"  # NCCL's collectives may be part of a CUDA graph
        self.exchange_bytes = EXCHANGE_BYTES // max(1, mesh.tp - 1)
        self.chunked_bytes, self.chunk_bytes = CHUNKED_BYTES, CHUNK_BYTES
        self._last_exchange: list[Any] = []
        self._unfinished_sends: deque[tuple[Any, str]] = deque()  # and the kind of device that each was on
        self._world: dict[str, Any] = {}  # by the kind of device
        self._tp: Any = None
        self._dp: Any = None
        self._epoch, self._broken, self._noticed = 0, False, False
        self._connect()

    @property
    def _epoch_name(self) -> str:
        return f"{self._scope}/{self._epoch}"

    def _connect(self) -> None:
        """Make process groups as backends: going through the dispatcher costs some 20 us more per call."""
        store = dist.PrefixStore(f"epoch{self._epoch}", self._store)
        own, main = self.device, torch.device("cpu")
        try:
            self._world = {own.type: make_group(self._timeout, store, "world", self.rank, self.mesh.size, own)}
            if own != main:  # what a generation tells of its steps is in main memory, whatever the model is in
                self._world["cpu"] = make_group(self._timeout, store, "cpu", self.rank, self.mesh.size, main)
            if not self._alone:
                self._tp = make_group(self._timeout, store, f"tp{self._ranks[0]}", self.tp_rank, self.mesh.tp, own)
            if self.mesh.dp > 1:
                place = self._replicas.index(self.rank)
                self._dp = make_group(self._timeout, store, f"dp{self._replicas[0]}", place, self.mesh.dp, own)
        except RuntimeError as error:
            self._broken = True
            raise self._failure("connecting", range(self.mesh.size), error) from None
        self._watchdog.watch(self._epoch_name, self._break)
        self.shared = self._share_memory() if self.exchanges and not self._alone else None

    # ------------------------------------------------------------------------------------------------- incidents

    def begin(self) -> None:
        """Repair, before a call of all ranks, what an incident broke off; waits for the other ranks.

        Raises CallBroken for an incident that this rank has not raised yet: the call that failed elsewhere is this one.
        """
        if not self._broken:
            return
        report = self._watchdog.incident(self._epoch_name)
        if report is not None and not self._noticed:
            raise self._notice(report)
        self._release()
        self._epoch, self._broken, self._noticed = self._epoch + 1, False, False
        self._connect()

    def _notice(self, report: ErrorReport) -> CallBroken:
        self._noticed = True
        return CallBroken(report)

    def break_off(self, error: BaseException, call: int = 0) -> ErrorReport:
        """End what all ranks are doing, since `error` was raised here; return the first error, which counts."""
        mine, self._noticed = ErrorReport.of(self.rank, error, call), True
        counts = self._watchdog.report(self._epoch_name, mine)
        if not self._broken:
            self._break(counts)
        return counts

    def _break(self, report: ErrorReport) -> None:
        """End every wait of this epoch, in any thread; called in the watchdog's thread, or before a wait.

        Gloo closes all connections of a group when a wait of it times out: so we wait, for a millisecond, for what
        nobody sends. It has no other way to do that while another thread waits.
        """
        self._broken = True
        for kind, group in (*self._world.items(), (self.device.type, self._tp), (self.device.type, self._dp)):
            if group is None:  # released meanwhile
                continue
            if kind != "cpu":
                group.abort()
            elif group.size() > 1:
                with contextlib.suppress(RuntimeError):
                    other = (group.rank() + 1) % group.size()
                    group.recv([torch.empty(1)], other, Channel.BREAK).wait(timedelta(milliseconds=1))

    def _is_over(self, tp_rank: int) -> bool:
        """Return whether nothing comes from a rank of the tp group any more."""
        return self._broken or self._watchdog.has_left(self._ranks[tp_rank])

    def _share_memory(self) -> SharedCollectives | None:
        """Open shared memory where all of the tp group are on this machine; else None."""
        tp = self.mesh.tp

        def gather(x: torch.Tensor) -> list[torch.Tensor]:
            layout = gather_layout(tuple(((r * len(x), (r + 1) * len(x)),) for r in range(tp)))
            try:
                return self._exchange(x, 0, layout)
            except RuntimeError as error:
                raise self._failure("setting up shared memory", self._ranks, error) from None

        patient = len(os.sched_getaffinity(0)) < self.mesh.size
        memory = open_shared_memory(self.tp_rank, tp, gather, self._timeout, patient=patient, stopped=self._is_over)
        return None if memory is None else SharedCollectives(memory, self.tp_rank, tp)

    def all_reduce(self, x: torch.Tensor, axis: str) -> torch.Tensor:
        """Return the sum of `x` over this rank's tp group, or along "dp", in the memory of `x` or in new memory."""
        if axis == "dp":
            return self.start_all_reduce(x, axis)()
        if self._alone:
            return x
        if not x.is_contiguous():
            x = x.contiguous()
        nbytes = x.nbytes
        try:
            if self.shared is not None:
                return self.shared.all_reduce(x) if nbytes else x
            if self.exchanges and nbytes <= self.exchange_bytes:
                return self._sum_of_exchange(x) if nbytes else x
            self._tp.allreduce([x], self._sum).wait()
        except (RuntimeError, OSError) as error:
            raise self._failure(f"all_reduce of {describe(x)}", self._ranks, error) from None
        return x

    def start_all_reduce(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start summing `x` over the replicas (`axis` "dp"), while this rank goes on; return a function that waits for
        it, and returns the sum, in the memory of `x`."""
        return self._start_along(axis, "all_reduce", x, lambda dp: dp.allreduce([x], self._sum))

    def start_all_gather(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start filling `x`, flat, the n-th part of which is replica n's; return the same kind of function."""
        return self._start_along(axis, "all_gather", x, lambda dp: dp._allgather_base(x, self._own_part(x)))

    def start_reduce_scatter(self, x: torch.Tensor, axis: str) -> Callable[[], torch.Tensor]:
        """Start the same sum, of which this rank is to have its own part alone: others of `x` are no sums then. Gloo
        has nothing quicker than an all_reduce."""
        if self.device.type == "cpu":
            return self.start_all_reduce(x, axis)
        return self._start_along(axis, "reduce_scatter", x, lambda dp: dp._reduce_scatter_base(self._own_part(x), x))

    def _own_part(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(self.mesh.dp)[self.mesh.dp_rank(self.rank)]

    def _start_along(
        self, axis: str, name: str, x: torch.Tensor, begin: Callable[[Any], Any]
    ) -> Callable[[], torch.Tensor]:
        if axis != "dp":
            raise CommunicationError(f"an {name} is started along the axis dp; got {axis!r}")
        dp = self._dp
        if dp is None:
            return lambda: x
        return self._start(lambda: begin(dp), x, lambda: f"{name} of {describe(x)}", self._replicas)

    def _start(
        self, begin: Callable[[], Any], x: torch.Tensor, what: Callable[[], str], ranks: Sequence[int]
    ) -> Callable[[], torch.Tensor]:
        """Start something with `ranks` that fills `x`; return a function that waits for it, and returns `x`."""

        def finished() -> torch.Tensor:
            try:
                self._finish(work, x.device.type, self._timeout)
            except RuntimeError as error:
                raise self._failure(what(), ranks, error) from None
            return x

        try:
            work = begin()
        except RuntimeError as error:
            raise self._failure(what(), ranks, error) from None
        return finished

    def _sum_of_exchange(self, x: torch.Tensor) -> torch.Tensor:
        tp = self._tp
        sends = [tp.send([x], peer, Channel.TP_EXCHANGE) for peer in self._peers]
        for send in self._last_exchange:  # long since done; waiting earlier would stop us for a slower peer
            send.wait()
        self._last_exchange = sends
        if len(sends) == 1:
            total = torch.empty_like(x)
            tp.recv([total], self._peers[0], Channel.TP_EXCHANGE).wait(self._timeout)
            return total.add_(x)  # x is still on its way, so it must stay as it is
        shards = [torch.empty_like(x) for _ in self._peers]
        self._wait([(peer, tp.recv([shard], peer, Channel.TP_EXCHANGE)) for shard, peer in zip(shards, self._peers)])
        shards.insert(self.tp_rank, x)
        total = shards[0] + shards[1]  # in rank order: every rank gets the same bits
        for shard in shards[2:]:
            total.add_(shard)
        return total

    def all_gather(self, x: torch.Tensor, axis: str, dim: int, parts: Parts) -> torch.Tensor:
        """Return the whole tensor of which `x` is this rank's part along `dim`; `parts`: each tp rank's intervals."""
        layout = gather_layout(frozen_parts(parts))
        check_shard(x, dim, layout, self.tp_rank)
        if self._alone:
            return glue([x], dim, layout)
        if not x.is_contiguous():
            x = x.contiguous()
        try:
            if self.shared is not None:
                return self.shared.all_gather(x, dim, layout)
            largest = math.prod(with_size(x.shape, dim, max(layout.local_sizes))) * x.element_size()
            if self.exchanges and layout.in_rank_order and largest >= self.chunked_bytes:  # on all
                for send in self._last_exchange:
                    send.wait()
                whole, self._last_exchange = gather_in_chunks(
                    self._tp, self.tp_rank, x, dim % x.dim(), layout, self.chunk_bytes, self._wait
                )
                return whole
            shards = self._exchange(x, dim, layout) if self.exchanges else gather_padded(self._tp, x, dim, layout)
        except (RuntimeError, OSError) as error:
            raise self._failure(f"all_gather of {describe(x)} along dim {dim}", self._ranks, error) from None
        return glue(shards, dim, layout)

    def _exchange(self, x: torch.Tensor, dim: int, layout: GatherLayout) -> list[torch.Tensor]:
        """Return every rank's shard, of whatever size, in one hop."""
        tp = self._tp
        sends = [tp.send([x], peer, Channel.TP_EXCHANGE) for peer in self._peers] if x.numel() else []
        for send in self._last_exchange:
            send.wait()
        self._last_exchange = sends
        shards, receives = [], []
        for rank, size in enumerate(layout.local_sizes):
            if rank == self.tp_rank:
                shards.append(x)
                continue
            shards.append(x.new_empty(with_size(x.shape, dim, size)))
            if shards[-1].numel():
                receives.append((rank, tp.recv([shards[-1]], rank, Channel.TP_EXCHANGE)))
        self._wait(receives)
        return shards

    def _wait(self, receives: Sequence[tuple[int, Any]]) -> None:
        """Wait for receives, each with the tp rank that sends."""
        for peer, receive in receives:
            try:
                receive.wait(self._timeout)
            except RuntimeError as error:
                error.add_note(str(self._ranks[peer]))  # for _failure: whom we waited for
                raise

    def send(self, x: torch.Tensor, to: int, channel: int) -> None:
        """Start sending. NCCL knows no channels: there, two ranks must receive in the order of the sends."""
        if not x.numel():
            return
        x = x.contiguous()
        kind = x.device.type
        try:
            self._unfinished_sends.append((self._world[kind].send([x], to, channel), kind))
        except RuntimeError as error:
            raise self._failure(f"send of {describe(x)} on channel {channel_text(channel)}", (to,), error) from None

    def recv(self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int) -> torch.Tensor:
        """Return a tensor from the global rank `source`; `device` None means the rank's own."""
        return self.start_recv(shape, dtype, device, source, channel)()

    def start_recv(
        self, shape: Sequence[int], dtype: torch.dtype, device: Any, source: int, channel: int
    ) -> Callable[[], torch.Tensor]:
        """Post a receive, so that the tensor travels while this rank goes on; return a function that waits for it, and
        returns it. Without channels (NCCL), receives are posted in the order of the sends."""
        x = torch.empty(tuple(shape), dtype=dtype, device=self.device if device is None else device)
        if not x.numel():
            return lambda: x
        return self._start(
            lambda: self._world[x.device.type].recv([x], source, channel),
            x,
            lambda: f"recv of {describe(x)} on channel {channel_text(channel)}",
            (source,),
        )

    @property
    def unfinished_sends(self) -> int:
        """Return the number of sends that are not known to be received."""
        return len(self._unfinished_sends)

    def finish_sends(self, timeout: timedelta | None = None, *, keep: int = 0) -> None:
        """Let go of what was sent, but for the last `keep` sends, waiting for it where needed.

        For a moment at which the receivers are known to be past their recv, or to have posted it: Gloo tells of a
        finished send only to who waits for it.
        """
        sends = self._unfinished_sends
        try:
            while len(sends) > keep:
                self._finish(*sends[0], timeout or self._timeout)
                sends.popleft()
            if not keep:
                for send in self._last_exchange:
                    send.wait(timeout or self._timeout)
                self._last_exchange = []
        except RuntimeError as error:
            raise self._failure("an earlier send", (), error) from None

    @staticmethod
    def _finish(work: Any, kind: str, timeout: timedelta) -> None:
        """Wait. With a time-out, NCCL would stop this thread; without, the stream waits, within the group's own."""
        if kind == "cpu":
            work.wait(timeout)
        else:
            work.wait()

    def close(self) -> None:
        """Let go of the process groups. What was sent and is not received by then is lost."""
        self._broken = True
        self._release()

    def _release(self) -> None:
        self.shared = None
        self._last_exchange.clear()
        self._unfinished_sends.clear()
        self._tp = self._dp = None
        self._world = {}

    def _failure(self, what: str, ranks: Sequence[int], error: Exception) -> CommunicationError:
        report = self._watchdog.incident(self._epoch_name)
        is_late = isinstance(error, TimeoutError) or "Timed out" in str(error)
        if report is None and not is_late:
            report = self._watchdog.explain(self._epoch_name)
        if report is not None:
            return self._notice(report)
        others = [r for r in ranks if r != self.rank]
        if notes := getattr(error, "__notes__", None):
            others = [int(notes[0])]
        if isinstance(error, OSError):  # of shared memory, whose argument is the tp rank
            others = [self._ranks[error.args[0]]]
            error = TimeoutError("Timed out")
        ended = [r for r in others if self._watchdog.has_left(r)]
        return failed_wait(f"rank {self.rank}: {what}", others, ended, error, self._timeout)
