"""Ranks as real processes, forked from this one: nothing is imported anew, so that a group starts in milliseconds."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.processes import free_port

FORK = multiprocessing.get_context("fork")


def on_processes(ranks: int, work: Callable[[int], Any], seconds: float = 60.0) -> list[Any]:
    """Returns what `work(rank)` returns, by rank, each in a process whose environment says which rank it is.

    A string that begins with "raised" stands for a rank that raised; None for one that ended without a word. Raises
    AssertionError, with what is known and where each rank stands, when not all have ended within `seconds`.
    """
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, ends, stacks = [], [], tempfile.TemporaryFile()  # noqa: SIM115  ranks write into it until they are killed
    for rank in range(ranks):
        mine, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_run, args=(rank, work, environment, theirs, stacks), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        ends.append(mine)
    results: list[Any] = [None] * ranks
    deadline = time.monotonic() + seconds
    try:
        for rank, end in enumerate(ends):
            with contextlib.suppress(EOFError):
                there = end.poll(max(0.0, deadline - time.monotonic()))
                assert there, f"rank {rank} still runs; so far {results}\n{_stacks(processes, stacks)}"
                results[rank] = end.recv()
        for rank, process in enumerate(processes):
            process.join(max(0.0, deadline - time.monotonic()))
            ended = process.exitcode is not None
            assert ended, f"rank {rank} does not end; {results}\n{_stacks(processes, stacks)}"
    finally:
        for process in processes:
            process.kill()
        stacks.close()
    return results


AFTER_SECONDS = 15.0  # within which the others end, when one rank has died


def exits(ranks: int, work: Callable[[int], Any], directory: Path) -> list[tuple[int, str]]:
    """Returns (exit code, what it wrote to stderr) of each rank that runs `work(rank)`, as `on_processes` starts them.

    Raises AssertionError for ranks that still run AFTER_SECONDS after the first that ended with an error, or after
    three minutes.
    """
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [directory / f"rank {rank}" for rank in range(ranks)]
    processes = [FORK.Process(target=_logged, args=(rank, work, environment, log)) for rank, log in enumerate(logs)]
    deadline = time.monotonic() + 180
    try:
        for process in processes:
            process.start()
        while any(process.exitcode is None for process in processes):
            assert time.monotonic() < deadline, [p.exitcode for p in processes] + [log.read_text() for log in logs]
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + AFTER_SECONDS)
            time.sleep(0.05)
        return [(process.exitcode or 0, log.read_text()) for process, log in zip(processes, logs, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _logged(rank: int, work: Callable[[int], Any], environment: dict[str, str], log: Path) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    gc.freeze()  # as in _run
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=environment["WORLD_SIZE"])
    code = 0
    try:
        work(rank)
    except BaseException:
        traceback.print_exc()
        code = 1
    __import__("autodist_fx.runtime.comm.process_group", fromlist=["leave"]).leave()
    os._exit(code)


def _stacks(processes: list[Any], stacks: Any) -> str:
    """Returns the Python stacks of all threads of the processes that still run."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.5)
    stacks.seek(0)
    return str(stacks.read().decode())


def _run(rank: int, work: Callable[[int], Any], environment: dict[str, str], end: Any, stacks: Any) -> None:
    faulthandler.register(signal.SIGUSR1, file=stacks)
    gc.freeze()  # earlier tests' process groups: their destructors wait for threads that were not forked along
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
