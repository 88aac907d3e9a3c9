"""Memory shared by ranks: here threads of one process, each with a mapping of its own."""

import errno
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from autodist_fx.runtime.comm import shared_memory
from autodist_fx.runtime.comm.shared_collectives import SharedCollectives
from autodist_fx.runtime.comm.shared_memory import open_shared_memory

pytestmark = pytest.mark.skipif(not shared_memory.possible(), reason="no shared memory on this machine")


Work = Callable[[int, shared_memory.SharedMemory | None], object]


def on_ranks(ranks: int, work: Work, seconds: float = 20, stopped: Callable[[], bool] | None = None) -> list:
    """`work(rank, memory)` on each rank."""
    barrier, slots = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def run(rank: int) -> object:
        def gather(x: torch.Tensor) -> list[torch.Tensor]:
            slots[rank] = x
            barrier.wait(10)
            told = list(slots)
            barrier.wait(10)
            return told

        return work(rank, open_shared_memory(rank, ranks, gather, timedelta(seconds=seconds), stopped=stopped))

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


def left_behind() -> set[str]:
    """Files of ours that any process could find, and this process's own open ones."""
    held = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    return {str(p) for p in Path("/dev/shm").glob("autodist_fx*")} | {name for name in held if "autodist_fx" in name}


def opening_of_rank_0s(monkeypatch: pytest.MonkeyPatch, instead: Callable[[str], int]) -> None:
    """Opening another process's file by its number is `instead`."""
    open_file = os.open

    def opened(path: str, *args: int, **keywords: int) -> int:
        return instead(path) if str(path).startswith("/proc/") else open_file(path, *args, **keywords)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.parametrize("ranks", [2, 3])
def test_many_sums_one_after_the_other(ranks: int) -> None:
    """Exact numbers, so that a slot read too early or too late shows; of many sizes, over one piece or several."""
    before = left_behind()
    sizes = [1, 7, 64, 1000, 3, 2500] * 20

    def work(rank: int, memory: shared_memory.SharedMemory | None) -> bool:
        assert memory is not None
        collectives = SharedCollectives(memory, rank, ranks, slot_bytes=4096)
        right = True
        for i, size in enumerate(sizes):
            base = torch.arange(size, dtype=torch.float64) + 1000 * i
            total = collectives.all_reduce(base * (rank + 1))
            right &= torch.equal(total, base * (ranks * (ranks + 1) // 2))
        return right

    assert on_ranks(ranks, work) == [True] * ranks
    assert left_behind() <= before


def test_all_ranks_do_without_when_one_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = iter(("a", "b"))
    monkeypatch.setattr(socket, "gethostname", lambda: next(hosts))
    before = left_behind()
    assert on_ranks(2, lambda rank, memory: memory) == [None, None]
    assert left_behind() <= before


def test_all_ranks_do_without_when_one_cannot_map_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there(path: str) -> int:
        raise FileNotFoundError(path)

    opening_of_rank_0s(monkeypatch, not_there)
    before = left_behind()
    assert on_ranks(3, lambda rank, memory: memory) == [None] * 3
    assert left_behind() <= before


def test_all_ranks_do_without_when_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = left_behind()
    assert on_ranks(2, lambda rank, memory: memory) == [None, None]
    assert left_behind() <= before


def test_nothing_is_left_of_a_rank_that_is_killed_before_the_others_came() -> None:
    """Wherever rank 0 is killed: it never had a name in a folder."""
    before = left_behind()
    child = os.fork()
    if child == 0:
        open_shared_memory(0, 2, lambda x: os.kill(os.getpid(), signal.SIGKILL), timedelta(seconds=1))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert left_behind() <= before


def test_another_process_of_that_number_is_not_taken_for_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container of its own a rank finds another file under rank 0's numbers: the token is not in it."""
    other = os.memfd_create("other")
    os.truncate(other, 64 * 1024 * 1024)
    opening_of_rank_0s(monkeypatch, lambda path: os.dup(other))
    assert on_ranks(2, lambda rank, memory: memory) == [None, None]
    os.close(other)


def test_a_wait_can_be_ended() -> None:
    def work(rank: int, memory: shared_memory.SharedMemory | None) -> object:
        assert memory is not None
        if rank == 1:
            return None
        with pytest.raises(InterruptedError) as caught:
            memory.exchange(torch.ones(3), (3, 3))
        return caught.value.args

    assert on_ranks(2, work, stopped=lambda rank: True) == [(1,), None]


def test_a_rank_that_does_not_come_is_named() -> None:
    def work(rank: int, memory: shared_memory.SharedMemory | None) -> object:
        assert memory is not None
        if rank == 1:
            return None
        with pytest.raises(TimeoutError) as caught:
            memory.exchange(torch.ones(3), (3, 3))
        return caught.value.args

    assert on_ranks(2, work, seconds=0.2) == [(1,), None]
