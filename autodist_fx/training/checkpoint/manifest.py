"""checkpoint.json: what a saved run is of, and which box of which tensor lies in which file.

A directory that has it is whole: it is written last, and the directory renamed after that. The files are safetensors in
the format of torch.distributed.checkpoint's HuggingFaceStorageReader, which reads them, too; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autodist_fx.artifact.manifest import digest_of
from autodist_fx.errors import CheckpointError

MANIFEST = "checkpoint.json"
FORMAT, FORMAT_VERSION = "autodist_fx training checkpoint", 1
_LARGEST_BYTES = 1 << 30
_AGAIN = "go back to a checkpoint before it"


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A whole tensor: `key` of the parameter `name` (StatePiece), its shape and dtype ("float32"), and the Python type
    of a number ("int"), "" for a tensor."""

    name: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    number: str = ""


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file of tensors: its size and digest, and where each of its tensors begins in the whole one."""

    bytes: int
    sha256: str  # hexadecimal
    offsets: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Head:
    """The place of a run when it is saved. `options`: of optimizer and scheduler, as `to_plain` writes them; None for a
    model of which nothing is trained. `data`: what the caller saved along. `unused`: parameters of which nothing of
    the loss is computed; no rank holds them, and they are not saved."""

    model: str  # class name
    mesh: str
    step: int
    seed: int
    options: Any
    data: Any
    versions: Mapping[str, str]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of checkpoint.json; tensors by their names in the files (`tensor_name`)."""

    head: Head
    tensors: Mapping[str, SavedTensor]
    files: Mapping[str, SavedFile]

    def to_text(self) -> str:
        """Serialize to JSON, with a digest of all other fields at the end."""
        fields = json.loads(json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}))
        return json.dumps({**fields, "manifest_sha256": digest_of(fields)}) + "\n"


def tensor_name(name: str, key: str) -> str:
    """Return the name of a parameter's tensor in the files, as torch.distributed.checkpoint's state dicts have them."""
    return f"optim.state.{name}.{key}" if key else f"model.{name}"


def read_manifest(directory: Path) -> Manifest:
    """Read checkpoint.json. Raises CheckpointError where there is none, or it is of another format, or was changed."""
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise CheckpointError(f"{directory} is no saved run: it has no {MANIFEST}")
    if path.stat().st_size > _LARGEST_BYTES:
        raise CheckpointError(f"{path} is larger than any manifest: {_AGAIN}")
    try:
        fields = json.loads(path.read_bytes())
        known = fields.get("format"), fields.get("format_version")
        digest = fields.pop("manifest_sha256", None)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged, or cut short ({error}): {_AGAIN}") from error
    if known != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path} has the format {known}, and this autodist_fx reads {(FORMAT, FORMAT_VERSION)}")
    if digest != digest_of(fields):
        raise CheckpointError(f"{path} was changed after it was written: {_AGAIN}")
    try:
        tensors = {n: SavedTensor(**{**f, "shape": tuple(f["shape"])}) for n, f in fields["tensors"].items()}
        return Manifest(Head(**fields["head"]), tensors, {n: read_file(n, f) for n, f in fields["files"].items()})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is malformed ({error}): {_AGAIN}") from error


def read_file(name: str, fields: Mapping[str, Any]) -> SavedFile:
    """Read what is said of one file. Raises KeyError or TypeError where that is malformed, or is no file beside it."""
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise TypeError(f"{name!r} is no safetensors file beside it")
    return SavedFile(fields["bytes"], fields["sha256"], {n: tuple(o) for n, o in fields["offsets"].items()})
