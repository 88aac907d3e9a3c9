"""Starts the ranks of this machine: what torchrun does, for our command line, without elasticity."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from autodist_fx.runtime.comm.watchdog import EXIT_CODE as LOST_ANOTHER_RANK

ONE_STDERR = "ADX_ONE_STDERR"  # in the environment of ranks whose lines all come out of this process

_GRACE_SECONDS = 3.0  # to say what is wrong, before being ended; and to end, before being killed
_CAUSE_SECONDS = 15.0  # for the rank that failed to end, when others have, because of it: else the wrong one is named
_POLL_SECONDS = 0.05


def launch_local(
    argv: Sequence[str],
    world_size: int,
    env: Mapping[str, str] | None = None,
    output_rank: int = 0,
    keep_open: Sequence[int] = (),
) -> int:
    """Run `argv` once per rank, as processes of this machine, until all have ended; return the exit code.

    Each finds its rank where torchrun puts it, in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
    MASTER_PORT; `env` adds to this process's environment. The cores are shared out by OMP_NUM_THREADS unless that is
    set. `output_rank` has this process's stdin, stdout and stderr; of the others stderr alone is seen, each line after
    "[rank 1] ". The files `keep_open` are open in the ranks, too, under the same numbers.

    When a rank fails, the others are ended, stderr names the one that failed first, and its exit code is returned
    (128 + n when signal n killed it). Ctrl-C ends all and returns 130. No rank outlives this process, not even kill -9.
    """
    shared = {**os.environ, **(env or {})}
    shared.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // world_size)))
    shared |= {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        ONE_STDERR: "1",
    }
    ranks: list[subprocess.Popen[bytes]] = []
    readers: list[threading.Thread] = []
    try:
        with _ended_by_sigterm():
            for rank in range(world_size):
                quiet = rank != output_rank
                process = subprocess.Popen(
                    list(argv),
                    env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL if quiet else None,
                    stdout=subprocess.DEVNULL if quiet else None,
                    stderr=subprocess.PIPE if quiet else None,
                    pass_fds=tuple(keep_open),
                    start_new_session=True,  # Ctrl-C reaches them through us, once
                    preexec_fn=_die_with_parent,
                )
                ranks.append(process)
                if quiet:
                    readers.append(threading.Thread(target=_forward, args=(process, rank), daemon=True))
                    readers[-1].start()
            return _wait(ranks)
    except KeyboardInterrupt:
        print("interrupted; all ranks ended", file=sys.stderr)
        return 130
    finally:
        _end(ranks)
        for reader in readers:
            reader.join(_GRACE_SECONDS)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all have ended well, or one has not: then name it, and give the others time to say what they saw."""
    while True:
        codes = [process.poll() for process in ranks]
        if any(codes):
            began = time.monotonic()
            while None in codes:
                is_cause_known = any(code not in (None, 0, LOST_ANOTHER_RANK) for code in codes)
                if time.monotonic() - began > (_GRACE_SECONDS if is_cause_known else _CAUSE_SECONDS):
                    break
                time.sleep(_POLL_SECONDS)
                codes = [process.poll() for process in ranks]
            return _report(codes)
        if None not in codes:
            return 0
        time.sleep(_POLL_SECONDS)


def _report(codes: Sequence[int | None]) -> int:
    failed = {rank: code for rank, code in enumerate(codes) if code}
    # Who was killed is the cause; who merely lost another rank is not.
    rank, code = min(failed.items(), key=lambda item: (item[1] == LOST_ANOTHER_RANK, item[1] > 0, item[0]))
    if code < 0:
        name = signal.Signals(-code).name
        print(f"rank {rank} was killed by signal {-code} ({name}); all ranks ended", file=sys.stderr)
        return 128 - code
    if code != 2:  # 2 is an error of the command's user, who has been told in one line
        print(f"rank {rank} failed with exit code {code}; all ranks ended", file=sys.stderr)
    return code


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks by SIGTERM, and by SIGKILL those that have not ended in time. They are stopped while they are
    asked: none sees another end, and says that it did."""
    for asked in ((signal.SIGSTOP, signal.SIGTERM, signal.SIGCONT), (signal.SIGKILL,)):
        living = [process for process in ranks if process.poll() is None]
        for signal_number, process in itertools.product(asked, living):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal_number)
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in living:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end us as Ctrl-C does: through the code that ends the ranks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _forward(process: subprocess.Popen[bytes], rank: int) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.buffer.write(f"[rank {rank}] ".encode() + line)
        sys.stderr.flush()


def _die_with_parent() -> None:
    """Ask the kernel, in the child, to kill it when the launcher is gone, however that went (Linux)."""
    if _libc is not None:
        _libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before the fork


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
