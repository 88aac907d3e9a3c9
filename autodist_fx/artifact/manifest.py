"""manifest.json: the variants of an artifact, the size and
sha256 of every file, and the library versions that made it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autodist_fx.errors import AutodistError
from autodist_fx.own_version import own_version

FORMAT, FORMAT_VERSION = "autodist_fx artifact", 5
MANIFEST = "manifest.json"
_LARGEST_MANIFEST_BYTES = 16 << 20
_MOST_RANKS = 65536
# A file lies at most two folders down. No suffix is one of a format that some library would unpickle.
_PATH = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_-]{0,80}/){0,2}[A-Za-z0-9_][A-Za-z0-9_.-]{0,120}\Z")
_SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model", ".tiktoken", ".vocab")
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class ArtifactError(AutodistError):
    """Raised where an artifact cannot be written or read, or is damaged; the message names the file."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """The size and digest of one file at the time it was written."""

    bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of manifest.json."""

    model: str  # class name, "LlamaForCausalLM"
    tp: int
    pp: int
    variants: tuple[str, ...]  # names of the saved variants: the folders of variants/
    versions: Mapping[str, str]  # library -> its version when the artifact was made
    files: Mapping[str, FileRecord]  # by relative path, without the manifest itself
    key: str = ""  # in an entry of the split cache, the digest of all that the split depends on

    @property
    def ranks(self) -> int:
        return self.tp * self.pp

    def to_text(self) -> str:
        """Serialize to JSON, with a digest of all other fields at the end."""
        fields = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps({**fields, "manifest_sha256": digest_of(fields)}, indent=1, allow_nan=False) + "\n"


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers a graph computes."""
    others = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"autodist-fx": own_version(), **others}


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of an artifact.

    Raises ArtifactError where the directory has none, or it has another format version, or was edited by hand.
    """
    path = directory / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(f"{directory} is no artifact: it has no {MANIFEST} (make one with `autodist-fx compile`)")
    if path.stat().st_size > _LARGEST_MANIFEST_BYTES:
        raise ArtifactError(f"{path} is larger than any manifest: make the artifact again")
    fields = json_object(path.read_bytes(), str(path))
    if fields.get("format") != FORMAT:
        raise ArtifactError(f"{path} is no manifest of an artifact")
    if fields.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {fields.get('format_version')!r}, and this autodist_fx reads "
            f"{FORMAT_VERSION}: make the artifact again, or use the autodist_fx that made it"
        )
    digest = fields.pop("manifest_sha256", None)
    if digest != digest_of(fields):
        raise ArtifactError(f"{path} was changed after it was written: make the artifact again")
    try:
        return _manifest(fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is malformed ({error}): make the artifact again") from error


def digest_of(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of a manifest's fields but for the digest itself."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _manifest(fields: Mapping[str, Any]) -> Manifest:
    """Build a Manifest from parsed JSON. Raises KeyError, TypeError
    or ValueError where fields are missing or malformed."""
    tp, pp = fields["tp"], fields["pp"]
    if type(tp) is not int or type(pp) is not int or not (tp > 0 and pp > 0 and tp * pp <= _MOST_RANKS):
        raise ValueError(f"a mesh of tp={tp!r} x pp={pp!r}")
    files = {path: _record(path, record) for path, record in fields["files"].items()}
    texts = (fields["model"], fields["key"], *fields["variants"], *fields["versions"], *fields["versions"].values())
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        raise ValueError("a name that cannot be printed")
    return Manifest(
        model=fields["model"],
        tp=tp,
        pp=pp,
        variants=tuple(fields["variants"]),
        versions=dict(fields["versions"]),
        files=files,
        key=fields["key"],
    )


def _record(path: str, record: Mapping[str, Any]) -> FileRecord:
    if not _PATH.match(path) or ".." in path or path == MANIFEST or not path.endswith(_SUFFIXES):
        raise ValueError(f"no file of an artifact is called {path!r}")
    size, digest = record["bytes"], record["sha256"]
    if type(size) is not int or not 0 <= size < 2**63 or not isinstance(digest, str) or not _DIGEST.match(digest):
        raise ValueError(f"the size or digest of {path}")
    return FileRecord(size, digest)


def check_listing(directory: Path, manifest: Manifest) -> None:
    """Raise ArtifactError for a file that is missing, has another size, is a link, or is not in the manifest."""
    on_disk = {}
    for folder, folders, names in os.walk(directory):
        for name in (*names, *(f for f in folders if Path(folder, f).is_symlink())):
            path = Path(folder, name)
            on_disk[path.relative_to(directory).as_posix()] = path
    on_disk.pop(MANIFEST, None)
    for name, path in on_disk.items():
        if name not in manifest.files:
            raise ArtifactError(f"{path} is not in the manifest: take it away, or make the artifact again")
    for name, record in manifest.files.items():
        path = directory / name
        if name not in on_disk:
            raise ArtifactError(f"{path} is missing: make the artifact again")
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(f"{path} is no plain file: make the artifact again")
        if path.stat().st_size != record.bytes:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes, and had {record.bytes} when it was written: make the "
                "artifact again"
            )


def json_object(content: bytes, where: str, *, strict: bool = True) -> dict[str, Any]:
    """Parse JSON text whose top level is an object.

    Raises ArtifactError, which names `where`, also for duplicate keys, for nesting that is too deep and, with `strict`,
    for NaN and infinities.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
        return fields

    def no_constant(text: str) -> Any:
        raise ValueError(f"{text} is no number of JSON")

    try:
        value = json.loads(  # decoded here as UTF-8, since json.loads guesses the encoding of bytes
            content.decode(), object_pairs_hook=no_duplicates, parse_constant=no_constant if strict else None
        )
    except RecursionError as error:
        raise ArtifactError(f"{where} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an int with too many digits, and the two above
        raise ArtifactError(f"{where} is not the JSON that was written: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{where} is no JSON object")
    return value
