"""The cache of splits, which a second start of the same model on the same mesh reads instead of tracing and slicing.

HF_HOME/autodist_fx/<key>/     an artifact; the key is a digest of all that it depends on
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from transformers import PreTrainedTokenizerBase

from autodist_fx.artifact.files import Staging
from autodist_fx.artifact.manifest import (
    ArtifactError,
    FileRecord,
    library_versions,
    read_manifest,
)
from autodist_fx.artifact.reader import ArtifactReader
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.causal_lm import DistributedCausalLM
from autodist_fx.weights.checkpoint_source import CheckpointSource
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.write_json import plan_to_text
from cost_model.request.plan_request import PlanRequest

ENVIRONMENT = "ADX_CACHE"
_STALE_SECONDS = 3600.0  # a directory half filled for so long has nobody who fills it
_SPARE = 1.05  # of the disk, beyond the weights


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """The place where an artifact is kept, or will be; the directory's name is its key. `tokenizer` goes along."""

    path: Path
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def key(self) -> str:
        """Return the digest of all that the split depends on, in hex."""
        return self.path.name

    @property
    def is_there(self) -> bool:
        """Return whether there is an artifact, as far as its manifest says."""
        try:
            return read_manifest(self.path).key == self.key
        except (AutodistError, OSError):
            return False


def cache_directory(cache: bool | str | Path | None) -> Path | None:
    """Return where splits are kept, None for nowhere. None asks ADX_CACHE, which is a directory, 1, or 0 (the
    default)."""
    said = os.environ.get(ENVIRONMENT, "")
    if cache is None:
        cache = said not in ("", "0")
    if isinstance(cache, (str, Path)):
        return Path(cache).expanduser()
    if not cache:
        return None
    return Path(said).expanduser() if said not in ("", "0", "1") else Path(constants.HF_HOME) / "autodist_fx"


def is_kept(cache: bool | str | Path | CacheEntry | None) -> bool:
    """Return whether splits are kept at all."""
    return isinstance(cache, CacheEntry) or cache_directory(cache) is not None


def cache_entry(
    cache: bool | str | Path | CacheEntry | None,
    source: CheckpointSource,
    dtype: torch.dtype | str | None,
    request: PlanRequest,
    plan: PartitionPlan | None,
) -> CacheEntry | None:
    """Return the entry for a checkpoint that is split like this; None where splits are not kept.

    Its key is a digest of all that the split depends on. A file's name, size and time of change stand for its content.
    """
    if isinstance(cache, CacheEntry):
        return cache
    directory = cache_directory(cache)
    if directory is None:
        return None
    from autodist_fx.weights.resolve import locate  # a rank that is told its entry needs none of it

    checkpoint = locate(source)
    files = sorted(p for p in checkpoint.iterdir() if p.is_file()) if checkpoint.is_dir() else [checkpoint]
    facts = {
        "checkpoint": str(checkpoint),
        "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files],
        "dtype": str(dtype),
        "attention": source.attn_implementation,
        "request": repr(request),
        "plan": "" if plan is None else plan_to_text(plan),
        "versions": library_versions(),
    }
    return CacheEntry(directory / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40])


def from_cache(
    entry: CacheEntry, joined: JoinedRank, make_share: Callable[[ArtifactReader], DistributedCausalLM]
) -> DistributedCausalLM | None:
    """Return this rank's share, if every rank finds its own in the same entry; else None, on every rank.

    Called on every rank. Rank 0 takes a damaged entry away, and a warning names the file.
    """
    share, status = None, {"found": "", "damage": ""}
    if entry.path.is_dir():
        try:
            artifact = ArtifactReader(entry.path)
            if artifact.manifest.key != entry.key or artifact.mesh != joined.mesh:
                raise ArtifactError(f"{entry.path} is another split than its name says")
            share = make_share(artifact)
            status["found"] = hashlib.sha256(artifact.manifest.to_text().encode()).hexdigest()
        except (AutodistError, OSError) as error:
            status["damage"] = str(error)
    answers = _everyone(joined, status)
    damage = next((answer["damage"] for answer in answers if answer["damage"]), None)
    if damage is not None:
        if joined.rank == 0:
            warnings.warn(f"{damage}: this entry of the cache is made again", stacklevel=2)
            shutil.rmtree(entry.path, ignore_errors=True)
        return None
    found = {answer["found"] for answer in answers}
    return share if len(found) == 1 and found != {""} else None


def keep(
    entry: CacheEntry,
    joined: JoinedRank,
    weight_bytes: int,
    write: Callable[[Staging], None],
    finish: Callable[[Staging, Mapping[str, FileRecord], str], None],
) -> None:
    """Write the entry, each rank its own files. Called on every rank; what goes wrong is a warning on rank 0.

    `write` puts a rank's own files into the directory, `finish`, on rank 0, the manifest of all.
    """
    from autodist_fx.artifact.directory import beside, refuse_foreign, take_place

    rank, scratch = joined.rank, beside(entry.path)
    plan = {"scratch": str(scratch), "weight_bytes": weight_bytes, "error": ""}
    if rank == 0:
        try:
            refuse_foreign(entry.path)
            scratch.mkdir(parents=True)
            _drop_stale(entry.path)
        except (AutodistError, OSError) as failure:
            plan["error"] = str(failure)
    told = _everyone(joined, plan)
    scratch = Path(told[0]["scratch"])
    refusal = told[0]["error"] or (_no_room(scratch, sum(t["weight_bytes"] for t in told)) if rank == 0 else "")
    written: dict[str, Any] = {"error": refusal, "files": {}}
    if not refusal:
        staging = Staging(scratch)
        try:
            if not scratch.is_dir():
                raise ArtifactError(f"rank {rank} does not see {scratch}: let {ENVIRONMENT} be a directory they share")
            write(staging)
            written["files"] = {name: asdict(record) for name, record in staging.records.items()}
        except (AutodistError, OSError) as failure:
            written["error"] = str(failure)
    answers = _everyone(joined, written)
    if rank == 0:
        try:
            if failed := next((a["error"] for a in answers if a["error"]), None):
                raise ArtifactError(failed)
            staging = Staging(scratch)
            finish(staging, _records([a["files"] for a in answers]), entry.key)
            take_place(scratch, entry.path)
        except (AutodistError, OSError) as failure:
            warnings.warn(f"the split was not kept in the cache: {failure}", stacklevel=2)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _everyone(joined: JoinedRank, mine: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(text) for text in joined.everyone(json.dumps(mine))]


def _records(of_ranks: Sequence[Mapping[str, Mapping[str, object]]]) -> dict[str, FileRecord]:
    return {name: FileRecord(**record) for files in of_ranks for name, record in files.items()}  # type: ignore[arg-type]


def _no_room(directory: Path, weight_bytes: int) -> str:
    free = shutil.disk_usage(directory).free
    if free > weight_bytes * _SPARE:
        return ""
    return (
        f"{directory.parent} has {free / 2**20:.0f} MiB left, and the split takes {weight_bytes / 2**20:.0f} MiB: make "
        f"room, or let {ENVIRONMENT} be another directory"
    )


def _drop_stale(entry: Path) -> None:
    """Remove what a process that was killed has left half filled."""
    for path in entry.parent.glob(".*.tmp"):
        if path.is_dir() and time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
