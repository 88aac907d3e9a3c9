"""Worker processes, started again when one dies or hangs: one broken type never stops the run."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from model_coverage.results import swept
from model_coverage.tasks import TASKS

BENCHMARKS = Path(__file__).resolve().parents[1]
START_SECONDS = 180.0  # to import torch and transformers on a busy machine
Job = dict[str, Any]


class WorkerGone(Exception):
    """The worker died, or did not answer in time; the message says which."""


class Worker:
    """One process. Lines are read with a time limit."""

    def __init__(self, memory_bytes: int) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(BENCHMARKS), str(BENCHMARKS.parent), *filter(None, [environment.get("PYTHONPATH")])]
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "model_coverage.worker", str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._unread = b""
        self._read(time.monotonic() + START_SECONDS)

    def run(self, job: Job, seconds: float, partial: dict[str, Any]) -> dict[str, Any]:
        """The result of a job; `partial` holds what is known of it should the worker go. Errors: WorkerGone."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerGone(self._death()) from error
        deadline = time.monotonic() + seconds
        while True:
            answer = self._read(deadline)
            if "result" in answer:
                return answer["result"]
            partial.update(answer["partial"])

    def _read(self, deadline: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise WorkerGone("it did not end in time")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                raise WorkerGone(self._death())
            self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def _death(self) -> str:
        status = self._process.wait()
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return f"the process ended with status {status}" + (f": {lines[-1].strip()[:200]}" if lines else "")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()


def run_jobs(
    jobs: Sequence[Job],
    workers: int,
    seconds: float,
    memory_bytes: int,
    started: Callable[[Job], None],
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Every job's result goes to `done` (one call at a time). `seconds` limits one job, whatever it does."""
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    lock = threading.Lock()
    failures: list[BaseException] = []

    def serve() -> None:
        worker: Worker | None = None
        try:
            while not failures:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                with lock:
                    started(job)
                partial: dict[str, Any] = {}
                try:
                    worker = worker or Worker(memory_bytes)
                    result = worker.run(job, seconds, partial)
                except WorkerGone as error:
                    result = _unfinished(job, partial, str(error))
                    if worker is not None:
                        worker.close()
                    worker = None
                with lock:
                    done(result)
        except BaseException as error:  # of our own making: it ends the run, and is raised there
            failures.append(error)
        finally:
            if worker is not None:
                worker.close()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)  # in steps, so that Ctrl-C comes through
    if failures:
        raise failures[0]


def _unfinished(job: Job, partial: dict[str, Any], reason: str) -> dict[str, Any]:
    """Returns what was found out before the worker went; the meshes it did not get to are crashed."""
    entry = {"verdict": "crashed", "error_class": "WorkerGone", "reason": reason}
    result = {"task": job["task"], "type": job["type"], "class": job["class"], "built": True, "seconds": 0.0, **partial}
    known = result.get("meshes", {})
    result["meshes"] = {f"{tp}x{pp}": known.get(f"{tp}x{pp}", entry) for tp, pp in job["meshes"]}
    meshes = [f"{tp}x{pp}" for tp, pp in job["sweep_meshes"]]
    asked = [sweep for sweep in job["sweeps"] if sweep in TASKS[job["task"]].sweeps]
    result["swept"] = swept(job["sweeps"], meshes)
    result.setdefault("sweeps", {name: {"all": dict.fromkeys(meshes, entry)} for name in asked})
    return result


__all__ = ["Job", "run_jobs"]
