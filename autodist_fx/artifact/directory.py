"""Replaces an artifact's directory as a whole: files go into
a scratch directory beside it, which is renamed at the end."""

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

_JUST_MADE_SECONDS = 10  # a younger scratch directory may belong to a process that has not locked it yet


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Staging]:
    """Yield a directory to fill, which becomes `target` if the `with` block succeeds and is removed if it raises.

    Scratch directories that killed processes left beside `target` are removed, too. Raises ArtifactError where `target`
    exists and is no artifact, so that nobody's files are overwritten.
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
    """Yield True if this process now holds the lock of `directory`.
    The kernel releases the lock of a process that dies."""
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
    """Remove scratch directories of `target` that no live process has locked."""
    target = Path(os.path.abspath(target))
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.tmp")
    for path in target.parent.iterdir():
        with contextlib.suppress(OSError):
            if name.fullmatch(path.name) and time.time() - path.stat().st_mtime > _JUST_MADE_SECONDS:
                with _locked(path) as is_left:
                    if is_left:
                        shutil.rmtree(path, ignore_errors=True)


def beside(target: Path) -> Path:
    """Return a new, unused path in the parent of `target` for a scratch directory."""
    target = Path(os.path.abspath(target))
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def refuse_foreign(target: Path) -> None:
    """Raise ArtifactError where `target` exists and is neither an empty directory nor a whole artifact."""
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
    """Rename `scratch` to `target`. At every moment `target` is the old artifact, absent, or all of the new one."""
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
