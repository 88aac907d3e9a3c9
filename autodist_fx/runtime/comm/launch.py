"""Starts the ranks of this machine: what torchrun does, for our command line, without elasticity.

A rank is a new process, or a fork of this one, which has imported torch and transformers already: seconds a rank.
"""

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import IO, NoReturn, Protocol

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
    forked: Callable[[], int] | None = None,
) -> int:
    """Run `argv` once per rank, as processes of this machine, until all have ended; return the exit code.

    `forked` is called instead where the system is Linux: it does the same as `argv`, in a fork of this process, and
    returns the exit code. Nothing is run at such a process's exit, and this one must not have used CUDA, nor threads
    for computing (torch.set_num_threads(1)).

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
    ranks: list[_Process] = []
    readers: list[threading.Thread] = []
    try:
        with _ended_by_sigterm():
            for rank in range(world_size):
                own, quiet = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, rank != output_rank
                if forked is not None and _libc is not None:
                    ranks.append(_Fork(forked, own, quiet))
                else:
                    ranks.append(_started(argv, own, quiet, keep_open))
            for rank, process in enumerate(ranks):  # threads, which a fork would not have, but perhaps their locks
                if process.stderr is not None:
                    readers.append(threading.Thread(target=_forward, args=(process.stderr, rank), daemon=True))
                    readers[-1].start()
            return _wait(ranks)
    except KeyboardInterrupt:
        print("interrupted; all ranks ended", file=sys.stderr)
        return 130
    finally:
        _end(ranks)
        for reader in readers:
            reader.join(_GRACE_SECONDS)


class _Process(Protocol):
    """A running rank, as subprocess.Popen has it."""

    pid: int
    stderr: IO[bytes] | None

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def _started(argv: Sequence[str], env: Mapping[str, str], quiet: bool, keep_open: Sequence[int]) -> _Process:
    return subprocess.Popen(
        list(argv),
        env=env,
        stdin=subprocess.DEVNULL if quiet else None,
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        pass_fds=tuple(keep_open),
        start_new_session=True,  # Ctrl-C reaches them through us, once
        preexec_fn=_die_with_parent,
    )


class _Fork:
    """A process that goes on from here with `work`, whose result is its exit code."""

    stderr: IO[bytes] | None = None

    def __init__(self, work: Callable[[], int], env: Mapping[str, str], quiet: bool) -> None:
        self._code: int | None = None
        read, write = os.pipe() if quiet else (None, None)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_fork(work, env, write)
        if read is not None and write is not None:
            os.close(write)
            self.stderr = os.fdopen(read, "rb")

    def poll(self) -> int | None:
        """Return the exit code, -n where signal n killed it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a rank", timeout or 0.0)
            time.sleep(_POLL_SECONDS)
        return code


def _be_fork(work: Callable[[], int], env: Mapping[str, str], stderr: int | None) -> NoReturn:
    """Be a rank, in the forked process: as a new one would be, with `env` for its environment. `stderr`: the file that
    it writes errors to where it is a quiet one."""
    code = 1
    try:
        _die_with_parent()
        if _libc is not None:
            _libc.prctl(15, f"rank {env['RANK']}".encode())  # PR_SET_NAME: what `top` calls it
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if stderr is not None:
            nothing = os.open(os.devnull, os.O_RDWR)
            for file, number in ((nothing, 0), (nothing, 1), (stderr, 2)):
                os.dup2(file, number)
        os.environ.clear()
        os.environ.update(env)
        if (torch := sys.modules.get("torch")) is not None:  # reads OMP_NUM_THREADS when it is imported alone
            torch.set_num_threads(int(env["OMP_NUM_THREADS"].partition(",")[0]))  # "4,2": of nested regions, too
        code = work()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        with contextlib.suppress(OSError):  # `autodist-fx run ... | head`
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait(ranks: Sequence[_Process]) -> int:
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


def _end(ranks: Sequence[_Process]) -> None:
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


def _forward(stderr: IO[bytes], rank: int) -> None:
    for line in stderr:
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
