"""Writes a rank's share of a saved run into the directory that all ranks fill; rank 0 puts that in place at the end."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from autodist_fx.artifact.files import Staging
from autodist_fx.errors import CheckpointError
from autodist_fx.training.checkpoint.directory import put_in_place
from autodist_fx.training.checkpoint.manifest import MANIFEST, Head, Manifest, SavedFile, read_file
from autodist_fx.training.checkpoint.share import Share

# As torch/distributed/checkpoint/_hf_utils.py has them: where each tensor of a file begins in the whole one.
_SHARDING_INFO, _OFFSETS, _VERSION = "DCP_SHARDING_INFO", "saved_offsets", {"DCP_VERSION": "1.0", "format": "pt"}
_POLL_SECONDS = 0.05


def write_share(scratch: Path, rank: int, share: Share) -> None:
    """Write a rank's tensors, and after them the mark that says that they are there. Raises CheckpointError."""
    staging = Staging(scratch)
    offsets: dict[str, dict[str, tuple[int, ...]]] = {}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for name, at, tensor in share.tensors:
        # a file has each name once: a second box of the same tensor goes into the next one
        number = next(n for n in range(len(share.tensors)) if name not in tensors.get(_file(rank, n), {}))
        tensors.setdefault(_file(rank, number), {})[name] = tensor
        offsets.setdefault(_file(rank, number), {})[name] = at
    for file, own in tensors.items():
        info = json.dumps({name: {_OFFSETS: at} for name, at in offsets[file].items()})
        staging.write_tensors(file, own, {_SHARDING_INFO: info, **_VERSION})
    records = {f: SavedFile(r.bytes, r.sha256, offsets[f]) for f, r in staging.records.items()}
    staging.write(f"{_mark(rank)}.part", json.dumps({name: asdict(record) for name, record in records.items()}))
    os.rename(scratch / f"{_mark(rank)}.part", scratch / _mark(rank))


def commit(scratch: Path, head: Head, share: Share, ranks: int) -> Path:
    """Write the manifest of what all ranks have written, and put the directory in place; return where it is then."""
    files: dict[str, SavedFile] = {}
    for rank in range(ranks):
        mark = scratch / _mark(rank)
        fields: Mapping[str, Mapping[str, object]] = json.loads(mark.read_bytes())
        files |= {name: read_file(name, record) for name, record in fields.items()}
        mark.unlink()
    Staging(scratch).write(MANIFEST, Manifest(head, share.whole, files).to_text())
    return put_in_place(scratch, head.step)


class BackgroundWrite:
    """A thread that runs `work`; `wait` returns when it has ended, and raises what it raised."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="save", daemon=False)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # raised by whoever waits; nobody may
            self._failure = error
            warnings.warn(f"a save in the background has failed: {error}", stacklevel=2)


def wait_for_marks(scratch: Path, ranks: int, timeout_seconds: float) -> None:
    """Return when all ranks have written their shares. Raises CheckpointError, which names those that have not within
    `timeout_seconds` after the last one that has."""
    missing, since = set(range(ranks)), time.monotonic()
    while missing:
        here = {rank for rank in missing if (scratch / _mark(rank)).exists()}
        missing, since = missing - here, time.monotonic() if here else since
        if failed := [rank for rank in sorted(missing) if (scratch / _failed(rank)).exists()]:
            raise CheckpointError(f"rank {failed[0]} could not write its part of {scratch}: nothing is saved")
        if time.monotonic() - since > timeout_seconds:
            raise CheckpointError(f"ranks {sorted(missing)} have not written their part of {scratch}: nothing is saved")
        if missing:
            time.sleep(_POLL_SECONDS)


def say_failed(scratch: Path, rank: int) -> None:
    """Tell rank 0, as far as that can be done, that this rank's share will not come."""
    with contextlib.suppress(OSError):
        (scratch / _failed(rank)).touch()


def _file(rank: int, number: int) -> str:
    return f"rank-{rank:05d}" + (f"-{number}" if number else "") + ".safetensors"


def _mark(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _failed(rank: int) -> str:
    return f"rank-{rank:05d}.failed"
