"""Rank processes that stay alive and compute only when told to, so that contenders can take turns on one machine."""

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_HALF_BUSY = """
import time
while True:
    until = time.perf_counter() + 0.005
    while time.perf_counter() < until:
        pass
    time.sleep(0.005)
"""
REPLY_SECONDS = 600  # a contender that needs longer than this for one command hangs


@contextlib.contextmanager
def half_busy_core() -> Iterator[None]:
    """Keep the last core half busy, in turns of 5 ms, as other work on the machine would."""
    loop = subprocess.Popen([sys.executable, "-c", _HALF_BUSY])
    os.sched_setaffinity(loop.pid, {max(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


class RankError(RuntimeError):
    """A rank answered with an error, died, or did not answer in time."""


def free_port() -> int:
    """A TCP port that is free now, for the ranks' rendezvous."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_environment(
    rank: int, world_size: int, port: int, threads: int, checkout: Path = HERE.parent
) -> dict[str, str]:
    """Returns what torchrun would set, on loopback, with the given number of threads for each rank, for the code of
    `checkout`."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The checkout is measured, not an installed copy.
        "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), str(HERE), os.environ.get("PYTHONPATH")])),
    }


class Ranks:
    """The processes of one contender: commands go to every rank's stdin, one JSON line comes back from each."""

    def __init__(
        self,
        script: str,
        args: list[str],
        world_size: int,
        threads: int,
        log: Path,
        *,
        python: str = sys.executable,
        checkout: Path = HERE.parent,
    ) -> None:
        port = free_port()
        self.log = log
        self.processes = [
            subprocess.Popen(
                [python, str(HERE / script), *args],
                env=rank_environment(rank, world_size, port, threads, checkout),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log.open("a"),
            )
            for rank in range(world_size)
        ]

    def ask(self, command: str, **options: Any) -> list[dict[str, Any]]:
        """Send one command to all ranks and wait for all their answers."""
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"command": command, **options}).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                break  # read() below says which rank died
        return self.read()

    def read(self) -> list[dict[str, Any]]:
        """One answer from each rank. The first error ends all ranks: the others may wait for it in a collective."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + REPLY_SECONDS
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self.processes):
                ready = selector.select(timeout=max(0.0, deadline - time.monotonic()))
                if not ready:
                    self.close()
                    raise RankError(f"no answer in {REPLY_SECONDS} s from {self.log.name}")
                for key, _ in ready:
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    answer = json.loads(line) if line else {"error": "died", "kind": "died"}
                    if "error" in answer:
                        self.close()
                        raise RankError(f"rank {key.data}: {answer['error']}")
                    answers[key.data] = answer
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self.processes))]

    def close(self) -> None:
        """End the processes that this object started."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def serve(handlers: dict[str, Any]) -> None:
    """A rank's side of `Ranks.ask`: answer commands from stdin until it closes."""
    for line in sys.stdin:
        request = json.loads(line)
        answer(handlers[request.pop("command")], **request)


_replies = None


def answer(handler: Any, **options: Any) -> None:
    """Run the handler and write its result, or its error, as one line to the pipe that was stdout at the start."""
    global _replies
    if _replies is None:
        # Libraries print to stdout; only replies may go down the pipe.
        _replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    try:
        reply = handler(**options)
    except Exception as error:  # the controller shows it in the table; the traceback is in the log
        import traceback

        traceback.print_exc()
        reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    _replies.write(json.dumps(reply) + "\n")
    _replies.flush()
