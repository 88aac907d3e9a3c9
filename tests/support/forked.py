"""Ranks as real processes, forked from this one: nothing is imported anew, so that a group starts in milliseconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

FORK = multiprocessing.get_context("fork")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_processes(ranks: int, work: Callable[[int], Any], seconds: float = 60.0) -> list[Any]:
    """Returns what `work(rank)` returns, by rank, each in a process whose environment says which rank it is.

    A string that begins with "raised" stands for a rank that raised; None for one that ended without a word. Raises
    AssertionError, with what is known, when not all have ended within `seconds`.
    """
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, ends = [], []
    for rank in range(ranks):
        mine, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_run, args=(rank, work, environment, theirs), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(mine)
    results: list[Any] = [None] * ranks
    deadline = time.monotonic() + seconds
    try:
        for rank, end in enumerate(ends):
            with contextlib.suppress(EOFError):
                assert end.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} still runs; so far {results}"
                results[rank] = end.recv()
        for rank, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"rank {rank} does not end; {results}"
    finally:
        for process in processes:
            process.kill()
    return results


def _run(rank: int, work: Callable[[int], Any], environment: dict[str, str], end: Any) -> None:
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=environment["WORLD_SIZE"])
    try:
        end.send(work(rank))
    except BaseException:
        end.send(f"raised {traceback.format_exc()}")
    finally:
        end.close()
        leave = __import__("autodist_fx.runtime.comm.process_group", fromlist=["leave"]).leave
        leave()
        os._exit(0)
