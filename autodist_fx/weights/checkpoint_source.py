"""`CheckpointSource`: names a checkpoint, and holds the options for asking the Hugging Face hub for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ATTENTION = ("sdpa", "eager")  # in plain torch, which is what graphs hold

@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint as users name it: a directory, a .gguf file, "smollm2", or an id on the hub (see `resolve`).

    The other fields are those of transformers' from_pretrained; the first four apply to the hub only.
    `local_files_only=None` follows HF_HUB_OFFLINE. `trust_remote_code` runs the Python files of a checkpoint whose
    model transformers does not have. `attn_implementation`: "sdpa" or "eager"; None is the config's.
    """

    name: str | Path
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    local_files_only: bool | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
