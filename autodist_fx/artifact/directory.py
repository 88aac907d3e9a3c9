"""directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from autodist_fx.artifact.files import Staging, sync_directory
from autodist_fx.artifact.manifest import ArtifactError, read_manifest

_JUST_MADE_SECONDS = 10  # a directory that is younger may not be locked yet


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Staging]:
    """A directory to fill, which becomes `target` if all goes well and is gone if not.

    What processes that were killed have left beside it is gone, too. ArtifactError where `target` is there already and
    is no artifact: nobody's files are overwritten.
    """
    refuse_foreign(target)
    scratch = beside(target)
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise ArtifactError(f"cannot make {scratch.parent}: {error.strerror}") from error
    try:
        with _locked(scratch):
            yield Staging(scratch)
            take_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _drop_leftovers(target)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Whether nobody else has it locked; the kernel takes a lock from a process that dies."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # locked, or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _drop_leftovers(target: Path) -> None:
    target = Path(os.path.abspath(target))
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for path in target.parent.iterdir():
        with contextlib.suppress(OSError):
            if name.fullmatch(path.name) and time.time() - path.stat().st_mtime > _JUST_MADE_SECONDS:
                with _locked(path) as is_left:
                    if is_left:
                        shutil.rmtree(path, ignore_errors=True)


def beside(target: Path) -> Path:
    target = Path(os.path.abspath(target))
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def refuse_foreign(target: Path) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ArtifactError(f"{target} is there already and is no directory: choose another name")
    if any(target.iterdir()):
        try:
            read_manifest(target)
        except ArtifactError as error:
            raise ArtifactError(
                f"{target} is there already and is no whole artifact, so that it is left alone: choose another name or "
                "take it away"
            ) from error


def take_place(scratch: Path, target: Path) -> None:
    """At every moment `target` is what it was, nothing, or all of the new one."""
    target = Path(os.path.abspath(target))
    old = None
    try:
        if target.is_dir() and any(target.iterdir()):
            old = beside(target)
            target.rename(old)
        scratch.rename(target)
    except OSError as error:
        raise ArtifactError(f"cannot put {target} in place: {error.strerror}") from error
    sync_directory(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
