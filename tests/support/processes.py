"""The environment, the command line and warm ranks, for tests that start real processes.

torchrun's own start is what test_dead_rank.py and one mesh of test_generate.py are about. Everywhere else the imports
of torch and transformers, some seconds of CPU for every rank, would be most of the test: `run_ranks` forks its ranks
from a process that has them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "tests" / "distributed"
PATHS = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
CLI = [sys.executable, "-m", "autodist_fx.cli.main", "run"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "transformers.generation", "autodist_fx.api.compile"])


def run_ranks(world_size: int, script: Path, *arguments: object, timeout: float = 200, **env: str) -> None:
    """Runs `script` on every rank, as `torchrun --nproc-per-node world_size script *arguments` would.

    `env` is added to ENV. Raises AssertionError, with what the rank said, for a rank that did not end with 0 within
    `timeout` seconds; the others are ended.
    """
    shared = {**ENV, "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), **env}
    argv = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as directory:
        logs = [Path(directory) / str(rank) for rank in range(world_size)]
        ranks = []
        try:
            for rank, log in enumerate(logs):
                own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                ranks.append(_context.Process(target=_run, args=(argv, own, str(log))))
                ranks[-1].start()
            _wait(ranks, timeout)
            for rank, process in enumerate(ranks):
                assert process.exitcode == 0, f"rank {rank}: {process.exitcode}\n{logs[rank].read_text()[-3000:]}"
        finally:
            for process in ranks:
                process.kill()
                process.join()


def free_port() -> int:
    """A port of the loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(argv: list[str], env: dict[str, str], log: str) -> None:
    """The forked process: stdout and stderr of everything in it, gloo's too, go into `log`."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(target, descriptor)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")
    # A process of multiprocessing runs no atexit: the first rank to end would have died without a word to the others.
    importlib.import_module("autodist_fx.runtime.comm.process_group").leave()


def _wait(ranks: list[ForkServerProcess], timeout: float) -> None:
    """Returns when all have ended, or 15 seconds after one has ended with an error, or at the time limit."""
    end = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks) and time.monotonic() < end:
        if any(process.exitcode for process in ranks):
            end = min(end, time.monotonic() + 15)
        ranks[0].join(0.1) if ranks[0].is_alive() else time.sleep(0.1)
