"""The directories of saved runs: `<dir>/step-00000030`, each written under another name beside it and renamed.

At every moment a name of this form is a whole checkpoint, whatever was killed, and when.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from autodist_fx.artifact.files import sync_directory
from autodist_fx.errors import CheckpointError
from autodist_fx.training.checkpoint.manifest import MANIFEST

_STEP = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_SCRATCH = re.compile(r"\.step-\d{8,}\.[0-9a-f]{8}\.tmp")


def new_scratch(directory: Path, step: int) -> Path:
    """Make a directory to be filled. What killed saves have left of theirs is removed."""
    with _named(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            if _SCRATCH.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        scratch = _unused(directory, step)
        scratch.mkdir()
    return scratch


def put_in_place(scratch: Path, step: int) -> Path:
    """Rename a filled directory to the name of its step; where that is taken, to one that is later, and remove those
    before it. Return it."""
    directory = scratch.parent
    with _named(directory):
        sync_directory(scratch)
        before = [(repeat, path) for at, repeat, path in _checkpoints(directory) if at == step]
        repeat = max((repeat for repeat, _ in before), default=-1) + 1
        target = directory / (f"step-{step:08d}" + (f"-{repeat}" if repeat else ""))
        scratch.rename(target)
        sync_directory(directory)
    for _, path in before:
        doomed = _unused(directory, step)
        with contextlib.suppress(OSError):  # renamed first: half of it must not look like a whole one
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    return target


def latest(directory: Path) -> Path:
    """Return the checkpoint that `directory` is, or the last one in it. Raises CheckpointError where there is none."""
    if (directory / MANIFEST).is_file():
        return directory
    found = _checkpoints(directory) if directory.is_dir() else []
    if not found:
        raise CheckpointError(f"there is no saved run in {directory}: give the directory that engine.save was given")
    return max(found)[2]


def _checkpoints(directory: Path) -> list[tuple[int, int, Path]]:
    """Return (step, repeat, path) of each."""
    matched = ((_STEP.fullmatch(path.name), path) for path in directory.iterdir())
    found = [(int(m[1]), int(m[2] or 0), path) for m, path in matched if m]
    return [each for each in found if (each[2] / MANIFEST).is_file()]


def _unused(directory: Path, step: int) -> Path:
    return directory / f".step-{step:08d}.{secrets.token_hex(4)}.tmp"


@contextlib.contextmanager
def _named(directory: Path) -> Iterator[None]:
    """Raise CheckpointError for errors of the file system, with the directory's name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot save in {directory}: {error.strerror or error}") from error
