"""Files of an artifact: written and synced to disk, and read
once, with the digest computed over the very bytes used."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from autodist_fx.artifact.manifest import ArtifactError, FileRecord, Manifest, json_object
from autodist_fx.large_memory import empty_large
from autodist_fx.weights.sources.safetensors_file import DTYPES

_WINDOW_BYTES = 8 << 20
_LARGEST_JSON_BYTES = 1 << 30
_LARGEST_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
_CODES = {dtype: code for code, dtype in DTYPES.items()}


# -- writing ----------------------------------------------------------------------------------------------------------


class Staging:
    """A directory that is being filled. `records` has the size and digest of each file that this process wrote."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.records: dict[str, FileRecord] = {}

    def write(self, name: str, content: bytes | str) -> None:
        """Write one file, given its path relative to the directory. Raises ArtifactError."""
        data = content.encode() if isinstance(content, str) else content
        with self._open(name) as (file, digest):
            file.write(data)
            digest.update(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as one line of JSON. Raises ArtifactError, and ValueError for NaN or infinity."""
        self.write(name, json.dumps(value, separators=(",", ":"), allow_nan=False) + "\n")

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        """Write tensors of any shape and device as a safetensors file, one tensor at a time, so that no second copy of
        all of them is in memory. Raises ArtifactError, also for a dtype that safetensors has no name for."""
        # The widest dtypes come first, so that each tensor begins at a multiple of its item size, as the format asks.
        order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        at = 0
        for key in order:
            size = tensors[key].numel() * tensors[key].dtype.itemsize
            header[key] = {"dtype": _code(key, tensors[key].dtype), "shape": list(tensors[key].shape),
                           "data_offsets": [at, at + size]}  # fmt: skip
            at += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with self._open(name) as (file, digest):
            for data in (struct.pack("<Q", len(text)), text):
                file.write(data)
                digest.update(data)
            for key in order:
                for piece in _pieces(tensors[key]):
                    file.write(piece)
                    digest.update(piece)

    @contextmanager
    def _open(self, name: str) -> Iterator[tuple[IO[bytes], Any]]:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        try:
            with path.open("xb") as file:
                yield file, digest
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
        self.records[name] = FileRecord(path.stat().st_size, digest.hexdigest())


def _code(name: str, dtype: torch.dtype) -> str:
    if dtype not in _CODES:
        raise ArtifactError(f"{name} has dtype {dtype}, which safetensors has no name for")
    return _CODES[dtype]


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in row-major order, at most _WINDOW_BYTES at a time."""
    data = tensor.detach().to("cpu").contiguous().view(-1)
    step = max(1, _WINDOW_BYTES // max(1, data.dtype.itemsize))
    for begin in range(0, data.numel(), step):
        yield memoryview(data[begin : begin + step].view(torch.uint8).numpy())


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk: without it, a rename may be lost in a crash."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- reading ----------------------------------------------------------------------------------------------------------


class CheckedFiles:
    """Files of an artifact by name. Reading one raises ArtifactError unless its bytes are those of the manifest."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest

    def has(self, name: str) -> bool:
        """True if the manifest lists this file."""
        return name in self.manifest.files

    def read(self, name: str) -> bytes:
        """Return the bytes of a file that fits into memory, such as a graph or a plan. Raises ArtifactError."""
        if self._record(name).bytes > _LARGEST_JSON_BYTES:
            raise ArtifactError(f"{self.directory / name} is larger than any graph: make the artifact again")
        with self._stream(name) as stream:
            return bytes(stream.take(stream.left))

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file. Raises ArtifactError."""
        return json_object(self.read(name), str(self.directory / name))

    def read_tensors(
        self, name: str, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Return all tensors of a safetensors file on `device`, in
        their saved shapes and dtypes, and the file's metadata.

        The file is read once, from front to back. Raises ArtifactError.
        """
        path = self.directory / name
        with self._stream(name) as stream:
            length = struct.unpack("<Q", stream.take(8))[0] if stream.left >= 8 else 0
            if not 0 < length <= min(_LARGEST_HEADER_BYTES, stream.left):
                raise ArtifactError(f"{path} is no safetensors file: make the artifact again")
            header = json_object(bytes(stream.take(length)), str(path))
            metadata = header.pop("__metadata__", {})
            tensors = {}
            for key, dtype, shape in _entries(header, stream.left, path):
                tensor = empty_large(shape, dtype)
                if tensor.numel():
                    stream.fill(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
                tensors[key] = tensor.to(device)
        return tensors, metadata if isinstance(metadata, dict) else {}

    def check(self, name: str) -> None:
        """Read a file to its end to check its digest. Raises ArtifactError."""
        with self._stream(name) as stream:
            while stream.left:
                stream.take(min(stream.left, _WINDOW_BYTES))

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise ArtifactError(f"{self.directory / name} is not in the manifest: make the artifact again")
        return self.manifest.files[name]

    @contextmanager
    def _stream(self, name: str) -> Iterator[_Stream]:
        """Open a file as a stream of bytes; raise ArtifactError where
        its size or, at the end, its digest is not the manifest's."""
        path, record = self.directory / name, self._record(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise ArtifactError(f"cannot open {path}: {error.strerror}; make the artifact again") from error
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            if size != record.bytes:
                raise ArtifactError(
                    f"{path} has {size} bytes, and had {record.bytes} when it was written: make the artifact again"
                )
            stream = _Stream(file, path, size)
            yield stream
            stream.finish()
        if stream.digest.hexdigest() != record.sha256:
            raise ArtifactError(f"{path} is not what was written (its sha256 is another): make the artifact again")


class _Stream:
    """Reads the bytes of a file in order, and feeds all of them to the digest."""

    def __init__(self, file: IO[bytes], path: Path, size: int) -> None:
        self.file, self.path, self.left = file, path, size
        self.digest = hashlib.sha256()

    def take(self, count: int) -> bytearray:
        data = bytearray(count)
        self.fill(memoryview(data))
        return data

    def fill(self, into: memoryview) -> None:
        while len(into):
            count = self.file.readinto(into[:_WINDOW_BYTES])  # type: ignore[attr-defined]
            if not count:
                raise ArtifactError(f"{self.path} was cut short while it was read: make the artifact again")
            self.digest.update(into[:count])
            into, self.left = into[count:], self.left - count

    def finish(self) -> None:
        while self.left:
            self.take(min(self.left, _WINDOW_BYTES))


def _entries(header: Mapping[str, Any], size: int, path: Path) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Parse a safetensors header into (name, dtype, shape), in the order in which the tensors lie in the file.

    Raises ArtifactError unless the tensors cover all `size` bytes behind the header without gap or overlap.
    """
    entries = []
    for key, entry in header.items():
        try:
            (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], DTYPES[entry["dtype"]]
            whole = all(type(n) is int and 0 <= n < 2**62 for n in (begin, end, *shape)) and len(shape) <= 16
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole or math.prod(shape) * dtype.itemsize != end - begin or end > size:
            raise ArtifactError(f"{path}: {key!r} is no tensor of this file: make the artifact again")
        entries.append((begin, end, key, dtype, tuple(shape)))
    at = 0
    for begin, end, key, *_ in sorted(entries):
        if begin != at:
            raise ArtifactError(f"{path}: {key!r} does not lie behind the tensor before it: make the artifact again")
        at = end
    if at != size:
        raise ArtifactError(f"{path} has bytes that belong to no tensor: make the artifact again")
    return [(key, dtype, shape) for _, _, key, dtype, shape in sorted(entries, key=lambda e: e[:3])]
