"""Reads one safetensors file: its header, and slices of its tensors straight into their destination.

It does not use `safetensors.safe_open`: that maps the file, and pages that were touched count as the process's memory
(RSS); a cast makes another copy; and the kernel reads ahead, so that a rank that takes half of each weight has the disk
read 85 % of the file. Here nothing is mapped, a slice in the wanted dtype has no copy beside it, and any other passes
through a window of WINDOW_BYTES.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources.sample import sampled
from autodist_fx.weights.sources.source import sliced_shape
from cost_model.graph.placement import Interval

WINDOW_BYTES = 8 << 20  # bounds the memory that loading needs beside the shards
SHORT_RUN_BYTES = 4096  # a page: the disk reads no less, so shorter runs are read together with the gaps between them

# https://github.com/huggingface/safetensors/blob/main/safetensors/src/tensor.rs, enum Dtype; sub-byte types left out
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}

_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit; a larger number is not a safetensors header


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The place of a tensor, row-major, `offset` bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file opened for reading slices; `entries` are its tensors by name.

    Raises CheckpointError when the file is missing, cut short, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}; save the checkpoint again") from error
        # Switch the kernel's read-ahead off: it read half as much again (1.56 GB from the disk instead of 1.13 for half
        # of a 1.98 GB file, in the same time).
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._lock = threading.Lock()  # guards the buffer: ranks that are threads may load from one source
        try:
            self.entries = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(
        self,
        name: str,
        dim: int | None,
        intervals: Sequence[Interval],
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See WeightSource.read. `name` must be in `entries`."""
        entry = self.entries[name]
        shape = sliced_shape(name, entry.shape, dim, intervals, out)
        if out is None:
            out = torch.empty(shape, dtype=dtype or entry.dtype)
        target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
        if dim is None:
            whole, intervals = (1, math.prod(entry.shape), 1), ((0, math.prod(entry.shape)),)
        else:
            whole = (math.prod(entry.shape[:dim]), entry.shape[dim], math.prod(entry.shape[dim + 1 :]))
        with self._lock:
            self._copy_intervals(entry, whole, intervals, target)
        if target is not out:
            out.copy_(target)
        return out

    def sample(self, name: str) -> bytes:
        """Return the bytes of the tensor that stand for all of it in a fingerprint."""
        entry, found = self.entries[name], bytearray()
        for start, stop in sampled(name, entry.nbytes):
            block = bytearray(stop - start)
            self._read_at(entry.offset + start, memoryview(block))
            found += block
        return bytes(found)

    def _copy_intervals(
        self, entry: TensorEntry, whole: tuple[int, int, int], intervals: Sequence[Interval], target: torch.Tensor
    ) -> None:
        """Copy intervals of the middle dim of the tensor, seen as [outer, size, inner], into `target` (contiguous)."""
        outer, size, inner = whole
        held_size = sum(b - a for a, b in intervals)
        target_OH = target.view(outer, held_size * inner)
        itemsize = entry.dtype.itemsize
        straight = _bytes_of(target) if target.dtype == entry.dtype and target.device.type == "cpu" else None
        at = 0
        for start, stop in intervals:
            run = (stop - start) * inner  # elements that are contiguous in the file, once per outer index
            first = entry.offset + start * inner * itemsize
            if run * itemsize < SHORT_RUN_BYTES and outer > 1:
                self._copy_short_runs(entry, first, size * inner, target_OH[:, at : at + run])
            else:
                for o in range(outer):
                    offset = first + o * size * inner * itemsize
                    if straight is not None:
                        begin = (o * held_size * inner + at) * itemsize
                        self._read_at(offset, straight[begin : begin + run * itemsize])
                    else:
                        self._copy_run(entry, offset, target_OH[o, at : at + run])
            at += run

    def _copy_run(self, entry: TensorEntry, offset: int, target_N: torch.Tensor) -> None:
        """Copy elements that are contiguous in the file into `target_N` [N], casting them a window at a time."""
        window = max(1, WINDOW_BYTES // entry.dtype.itemsize)
        for begin in range(0, target_N.numel(), window):
            piece = target_N[begin : begin + window]
            piece.copy_(self._window(entry, offset + begin * entry.dtype.itemsize, piece.numel()))

    def _copy_short_runs(self, entry: TensorEntry, offset: int, stride: int, target_OR: torch.Tensor) -> None:
        """Copy runs that begin `stride` elements apart into `target_OR`
        [outer, run]. The gaps are read as well, and dropped."""
        outer, run = target_OR.shape
        rows = max(1, WINDOW_BYTES // (stride * entry.dtype.itemsize))
        for o in range(0, outer if run else 0, rows):
            count = min(rows, outer - o)
            span = self._window(entry, offset + o * stride * entry.dtype.itemsize, (count - 1) * stride + run)
            target_OR[o : o + count].copy_(span.as_strided((count, run), (stride, 1)))

    def _window(self, entry: TensorEntry, offset: int, count: int) -> torch.Tensor:
        """Return `count` elements, 1-D in the entry's dtype, in a buffer that the next call overwrites."""
        nbytes = count * entry.dtype.itemsize
        if self._buffer.numel() < nbytes:
            self._buffer = torch.empty(max(nbytes, WINDOW_BYTES), dtype=torch.uint8)
        self._read_at(offset, _bytes_of(self._buffer)[:nbytes])
        return self._buffer[:nbytes].view(entry.dtype)

    def _read_at(self, offset: int, into: memoryview) -> None:
        """Fill `into` from the file at `offset`. Raises CheckpointError at the end of the file."""
        while into:
            count = os.preadv(self._file.fileno(), [into], offset)
            if count == 0:
                raise CheckpointError(f"{self.path} was cut short while it was read: download or save it again")
            into, offset = into[count:], offset + count

    def _read_header(self) -> dict[str, TensorEntry]:
        """Parse the header: 8 bytes of little-endian length, JSON of
        that length, then the tensors' bytes. Raises CheckpointError."""
        file_bytes = self.path.stat().st_size
        prefix = self._file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _HEADER_LIMIT_BYTES + 1
        if length > min(_HEADER_LIMIT_BYTES, file_bytes - 8):
            raise CheckpointError(f"{self.path} is no safetensors file, or is cut short: download or save it again")
        try:
            header = json.loads(self._file.read(length))
            header.pop("__metadata__", None)
            return {name: self._entry(name, field, 8 + length, file_bytes) for name, field in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path} has a broken safetensors header: download or save it again") from error

    def _entry(self, name: str, field: dict, data_offset: int, file_bytes: int) -> TensorEntry:
        if field["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{name} in {self.path} has dtype {field['dtype']}, which cannot be loaded: "
                "use a checkpoint in float32, float16 or bfloat16"
            )
        begin, end = field["data_offsets"]
        entry = TensorEntry(DTYPES[field["dtype"]], tuple(field["shape"]), data_offset + begin)
        if entry.nbytes != end - begin or data_offset + end > file_bytes:
            raise CheckpointError(f"{name} lies outside of {self.path}, which is cut short: download or save it again")
        return entry


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor, writable, as bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
