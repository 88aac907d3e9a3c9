"""Exchanges tensors between the ranks of one machine through memory that they share.

A rank writes its tensor into a slot of its own and then the number of the exchange into its counter; the others wait
for the counter and read the slot. Two slots a rank, taken in turns: who begins exchange n + 1 has read all of n, so
when everyone is seen to have begun n + 1, the slots of n may be written again. Nothing else needs to be agreed upon.

Measured with 2 ranks on 2 cores: see CPU_GLOO in cost_model/costs/hardware.py (`autodist-fx measure` does it anew). A
socket on loopback takes several hundred microseconds for the 3 KB of a decode step, since the system wakes the other
side up.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch

_BOOT = Path("/proc/sys/kernel/random/boot_id")
SLOT_BYTES = 1024 * 1024
_LINE = 64  # bytes of a cache line: counters of two ranks never share one
_TOKEN_START, _TOKEN_BYTES = 4080, 16  # at the end of the first page; before it, the counters of up to 63 ranks
_SLOTS_START = 4096
_SPINS = 2000  # looks at a counter, some 0.1 ms, before the core is offered to others
_YIELDS = 500  # then so many times offered, before sleeping
_SHAPES_KEPT = 64  # of tensors that all ranks have alike
_SHORTEST_SLEEP, _LONGEST_SLEEP = 20e-6, 1e-3  # seconds

# A plain store of the data, then one of the counter, is seen in this order by other cores on x86; elsewhere it is not.
_ORDERED_STORES = ("x86_64", "amd64")

GatherBytes = Callable[[torch.Tensor], Sequence[torch.Tensor]]


class SharedMemory:
    """One rank's access to the memory that the ranks of a tp group share. Made by `open_shared_memory`."""

    def __init__(
        self,
        memory: mmap.mmap,
        rank: int,
        ranks: int,
        timeout: timedelta,
        *,
        patient: bool,
        stopped: Callable[[int], bool] | None = None,
    ) -> None:
        self._rank, self._peers, self._timeout = rank, [r for r in range(ranks) if r != rank], timeout
        self._stopped = stopped or _never
        self._counters = memoryview(memory)[: ranks * _LINE].cast("q")  # [rank * 8]: exchanges that it has begun
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._ranks, self._count = ranks, 0
        self._typed: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._alike: dict[tuple[torch.dtype, torch.Size], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._spins = 0 if patient else _SPINS

    def exchange(self, x: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Return every rank's tensor, flat, in rank order; `lengths` are their numbers of elements.

        x: contiguous, at most SLOT_BYTES. All are views of shared memory that hold until this rank's next exchange.
        Raises TimeoutError, whose argument is the rank that did not come, or InterruptedError, with the same argument,
        when `stopped(rank)` says that it will not.
        """
        self._count = count = self._count + 1
        slots = (self._typed.get(x.dtype) or self._typed_slots(x.dtype))[count % 2]
        if x.numel():
            slots[self._rank][: x.numel()].copy_(x.view(-1))
        self._meet(count)
        return [slot[:length] for slot, length in zip(slots, lengths)]

    def exchange_alike(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return every rank's tensor, in rank order, where all are of x's shape; as `exchange` does, in half the time
        for what a decode step exchanges: the views are kept."""
        self._count = count = self._count + 1
        views = (self._alike.get((x.dtype, x.shape)) or self._alike_views(x.dtype, x.shape))[count % 2]
        views[self._rank].copy_(x)
        self._meet(count)
        return views

    def _alike_views(self, dtype: torch.dtype, shape: torch.Size) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if len(self._alike) >= _SHAPES_KEPT:
            self._alike.clear()
        slots, count = self._typed.get(dtype) or self._typed_slots(dtype), shape.numel()
        found = tuple([slot[:count].view(shape) for slot in slots[turn]] for turn in (0, 1))
        self._alike[dtype, shape] = found  # type: ignore[assignment]
        return found  # type: ignore[return-value]

    def _meet(self, count: int) -> None:
        """Say that this rank's tensor is there, and wait for the others'."""
        counters = self._counters
        counters[self._rank * 8] = count
        for peer in self._peers:
            at = peer * 8
            for _ in range(self._spins):
                if counters[at] >= count:
                    break
            else:
                if counters[at] < count:
                    self._wait(peer, count)

    def _typed_slots(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        def slot(rank: int, turn: int) -> torch.Tensor:
            start = _SLOTS_START + (2 * rank + turn) * SLOT_BYTES
            return self._bytes[start : start + SLOT_BYTES].view(dtype)

        self._typed[dtype] = tuple([slot(rank, turn) for rank in range(self._ranks)] for turn in (0, 1))  # type: ignore[assignment]
        return self._typed[dtype]

    def _wait(self, peer: int, count: int) -> None:
        counters, at = self._counters, peer * 8
        for _ in range(_YIELDS):
            if counters[at] >= count:
                return
            os.sched_yield()
        deadline, pause = time.monotonic() + self._timeout.total_seconds(), _SHORTEST_SLEEP
        while counters[at] < count:
            time.sleep(pause)
            pause = min(pause * 1.2, _LONGEST_SLEEP)
            if self._stopped(peer) and counters[at] < count:  # read anew: what it did last, it did before it ended
                raise InterruptedError(peer)
            if time.monotonic() > deadline:
                raise TimeoutError(peer)


def open_shared_memory(
    rank: int,
    ranks: int,
    gather: GatherBytes,
    timeout: timedelta,
    *,
    patient: bool = False,
    stopped: Callable[[int], bool] | None = None,
) -> SharedMemory | None:
    """Open the memory that the `ranks` of a group share, of which we are `rank`; None, for all of them, if it cannot be
    had.

    That is so when they are not on one machine, in containers that do not see each other's processes, short of memory,
    or on a processor that reorders stores. `gather` returns every rank's bytes (equally many from each), in rank order;
    all ranks call it twice. `patient` ranks offer their core at once while they wait: for more ranks than cores, where
    who keeps looking keeps the awaited one from running. `stopped(rank)` ends a wait for one.

    The memory has no name in any folder: rank 0 makes it, and the others map it by way of rank 0's open file. So
    nothing is left of it, however and whenever the processes end.
    """
    token, memory, file = secrets.token_bytes(_TOKEN_BYTES), None, -1
    if rank == 0 and possible(ranks):
        memory, file = _create(token, ranks)
    place = struct.pack("<qq", os.getpid(), file)
    told = gather(_as_tensor(_machine() + place + (token if memory is not None else bytes(_TOKEN_BYTES))))
    first = bytes(told[0].tolist())
    machines, token = {bytes(t[:32].tolist()) for t in told}, first[48:]
    if rank > 0 and len(machines) == 1 and any(token) and possible(ranks):
        pid, theirs = struct.unpack("<qq", first[32:48])
        memory = _attach(pid, theirs, token, ranks)
    try:
        everyone = all(bool(t.item()) for t in gather(_as_tensor(bytes([memory is not None]))))
    finally:
        if file >= 0:  # who has mapped it keeps it
            os.close(file)
    if not everyone or memory is None or len(machines) > 1:
        return None
    return SharedMemory(memory, rank, ranks, timeout, patient=patient, stopped=stopped)


def _never(rank: int) -> bool:
    return False


def possible(ranks: int = 2) -> bool:
    """Return whether this machine has such memory, for so many ranks."""
    fits = ranks * _LINE <= _TOKEN_START
    return fits and hasattr(os, "memfd_create") and platform.machine().lower() in _ORDERED_STORES


def _machine() -> bytes:
    """Return 32 bytes that are equal on ranks of one machine, since its last start."""
    boot = _BOOT.read_text() if _BOOT.exists() else secrets.token_hex()
    return hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).digest()


def _size(ranks: int) -> int:
    return _SLOTS_START + 2 * ranks * SLOT_BYTES


def _create(token: bytes, ranks: int) -> tuple[mmap.mmap | None, int]:
    """Return the memory, with `token` in it, and the file descriptor that it can be mapped by; (None, -1) without
    room."""
    file = -1
    try:
        file = os.memfd_create("autodist_fx", os.MFD_CLOEXEC)
        os.posix_fallocate(file, 0, _size(ranks))  # room that is missing is found out now, and not by a signal later
        memory = mmap.mmap(file, _size(ranks))
    except OSError:
        if file >= 0:
            os.close(file)
        return None, -1
    memory[_TOKEN_START:_SLOTS_START] = token
    return memory, file


def _attach(pid: int, file: int, token: bytes, ranks: int) -> mmap.mmap | None:
    """Map the memory of rank 0's process; None where that process has no such file: in another container its number
    is another process's, or nobody's."""
    try:
        mine = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    try:
        memory = mmap.mmap(mine, _size(ranks))
    except (OSError, ValueError):
        return None
    finally:
        os.close(mine)
    return memory if memory[_TOKEN_START:_SLOTS_START] == token else None


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)
