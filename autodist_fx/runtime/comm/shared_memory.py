"""Exchanging tensors between the ranks of one machine through memory that they share.

A rank writes its tensor into a slot of its own and then the number of the exchange into its counter; the others wait
for the counter and read the slot. Two slots a rank, taken in turns: who begins exchange n + 1 has read all of n, so
when everyone is seen to have begun n + 1, the slots of n may be written again. Nothing else needs to be agreed upon.

Measured with 2 ranks on 2 cores (`benchmarks/measure_hardware.py`): see CPU_GLOO in cost_model/costs/hardware.py. A
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
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch

_FOLDER = Path("/dev/shm")
_BOOT = Path("/proc/sys/kernel/random/boot_id")
SLOT_BYTES = 1024 * 1024
_LINE = 64  # bytes of a cache line: counters of two ranks never share one
_SLOTS_START = 4096
_SPINS = 2000  # looks at a counter, some 0.1 ms, before the core is offered to others
_YIELDS = 500  # then so many times offered, before sleeping
_SHORTEST_SLEEP, _LONGEST_SLEEP = 20e-6, 1e-3  # seconds

# A plain store of the data, then one of the counter, is seen in this order by other cores on x86; elsewhere it is not.
_ORDERED_STORES = ("x86_64", "amd64")

GatherBytes = Callable[[torch.Tensor], Sequence[torch.Tensor]]


class SharedMemory:
    """One rank's access to the memory that the ranks of a tp group share. Made by `open_shared_memory`."""

    def __init__(self, memory: mmap.mmap, rank: int, ranks: int, timeout: timedelta, patient: bool) -> None:
        self._rank, self._peers, self._timeout = rank, [r for r in range(ranks) if r != rank], timeout
        self._counters = memoryview(memory)[: ranks * _LINE].cast("q")  # [rank * 8]: exchanges that it has begun
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        self._ranks, self._count = ranks, 0
        self._typed: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self._spins = 0 if patient else _SPINS

    def exchange(self, x: torch.Tensor, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Every rank's tensor, flat, in rank order; `lengths` are their numbers of elements.

        x: contiguous, at most SLOT_BYTES. All are views of shared memory that hold until this rank's next exchange.
        Raises TimeoutError, whose argument is the rank that did not come.
        """
        self._count = count = self._count + 1
        slots = (self._typed.get(x.dtype) or self._typed_slots(x.dtype))[count % 2]
        if x.numel():
            slots[self._rank][: x.numel()].copy_(x.view(-1))
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
        return [slot[:length] for slot, length in zip(slots, lengths)]

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
            if time.monotonic() > deadline:
                raise TimeoutError(peer)


def open_shared_memory(
    rank: int, ranks: int, gather: GatherBytes, timeout: timedelta, *, patient: bool = False
) -> SharedMemory | None:
    """Shared memory of the `ranks` of a group, of which we are `rank`; None, for all of them, if it cannot be had.

    That is so when they are not on one machine, in containers that share no /dev/shm or one that is full, or on a
    processor that reorders stores. `gather` returns every rank's bytes (equally many from each), in rank order; all
    ranks call it twice. `patient` ranks offer their core at once while they wait: for more ranks than cores, where who
    keeps looking keeps the awaited one from running.
    """
    name, memory = secrets.token_bytes(16), None
    if rank == 0 and _possible():
        memory = _create(name, ranks)
    told = gather(_as_tensor(_machine() + (name if memory is not None else bytes(16))))
    machines, name = {bytes(t[:32].tolist()) for t in told}, bytes(told[0][32:].tolist())
    if rank > 0 and len(machines) == 1 and any(name) and _possible():
        memory = _attach(name, ranks)
    try:
        everyone = all(bool(t.item()) for t in gather(_as_tensor(bytes([memory is not None]))))
    finally:
        if rank == 0:  # who has mapped it keeps it, and nothing is left behind, however the processes end
            _path(name).unlink(missing_ok=True)
    if not everyone or memory is None or len(machines) > 1:
        return None
    return SharedMemory(memory, rank, ranks, timeout, patient)


def _possible() -> bool:
    return _FOLDER.is_dir() and platform.machine().lower() in _ORDERED_STORES


def _machine() -> bytes:
    """32 bytes that are equal on ranks of one machine, since its last start."""
    boot = _BOOT.read_text() if _BOOT.exists() else secrets.token_hex()
    return hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).digest()


def _path(name: bytes) -> Path:
    return _FOLDER / f"autodist_fx-{name.hex()}"


def _size(ranks: int) -> int:
    return _SLOTS_START + 2 * ranks * SLOT_BYTES


def _create(name: bytes, ranks: int) -> mmap.mmap | None:
    try:
        file = os.open(_path(name), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(file, 0, _size(ranks))  # room that is missing is found out now, and not by a signal later
        return mmap.mmap(file, _size(ranks))
    except OSError:
        _path(name).unlink(missing_ok=True)
        return None
    finally:
        os.close(file)


def _attach(name: bytes, ranks: int) -> mmap.mmap | None:
    try:
        file = os.open(_path(name), os.O_RDWR)
    except OSError:
        return None
    try:
        return mmap.mmap(file, _size(ranks))
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)
