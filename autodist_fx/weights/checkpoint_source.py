"""`CheckpointSource`: names a checkpoint, and holds the options for asking the Hugging Face hub for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint as users name it: a directory, a .gguf file, "smollm2", or an id on the hub (see `resolve`).

    The other fields are those of transformers' from_pretrained, and apply to the hub only. `local_files_only=None`
    follows HF_HUB_OFFLINE.
    """

    name: str | Path
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool | None = None
