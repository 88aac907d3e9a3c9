"""One safetensors file: its header, and slices of its tensors through short-lived windows into the file.

Not `safetensors.safe_open`: that maps the file as a whole, and pages of a file that a process has touched count as its
memory (RSS) for as long as the mapping lives; a slice along dim 1 or a change of dtype makes further temporaries.
Here a window of at most WINDOW_BYTES is mapped, copied to where the values go (cast and compacted on the way), and
unmapped again.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.source import sliced_shape
from cost_model.placement import Interval

WINDOW_BYTES = 8 << 20  # bounds what loading needs beside the shards

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
    """Where a tensor lies: `offset` in bytes from the start of the file, row-major."""

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
            size = math.prod(entry.shape)
            self._copy_intervals(entry, (1, size, 1), ((0, size),), target)
        else:
            outer, inner = math.prod(entry.shape[:dim]), math.prod(entry.shape[dim + 1 :])
            self._copy_intervals(entry, (outer, entry.shape[dim], inner), intervals, target)
        if target is not out:
            out.copy_(target)
        return out

    def _copy_intervals(
        self, entry: TensorEntry, whole: tuple[int, int, int], intervals: Sequence[Interval], target: torch.Tensor
    ) -> None:
        """Copies intervals of the middle dim of the tensor, seen as (outer, size, inner), into `target`."""
        outer, size, inner = whole
        held = sum(b - a for a, b in intervals)
        target_OHI = target.view(outer, held * inner)
        window = max(1, WINDOW_BYTES // entry.dtype.itemsize)  # in elements, like everything below
        row = size * inner
        at = 0
        for start, stop in intervals:
            run = (stop - start) * inner  # contiguous in the file, once per outer index
            rows = max(1, window // max(row, 1))
            for first in range(0, outer, rows):
                count = min(rows, outer - first)
                for begin in range(0, run, window):  # one turn, unless a single run is longer than the window
                    length = min(window, run - begin)
                    self._copy_block(
                        entry,
                        first * row + start * inner + begin,
                        (count, row, length),
                        target_OHI[first : first + count, at + begin : at + begin + length],
                    )
            at += run

    def _copy_block(self, entry: TensorEntry, element: int, block: tuple[int, int, int], target: torch.Tensor) -> None:
        """Copies `count` runs of `length` elements, `stride` elements apart, into target (count, length)."""
        count, stride, length = block
        elements = (count - 1) * stride + length
        start = entry.offset + element * entry.dtype.itemsize
        base = start - start % mmap.ALLOCATIONGRANULARITY
        nbytes = elements * entry.dtype.itemsize
        # ACCESS_COPY, not ACCESS_READ: torch warns about tensors over read-only memory. Nothing is written.
        with mmap.mmap(self._file.fileno(), start - base + nbytes, access=mmap.ACCESS_COPY, offset=base) as window:
            flat = torch.frombuffer(window, dtype=torch.uint8, count=nbytes, offset=start - base)
            if start % entry.dtype.itemsize:
                flat = flat.clone()  # the header's padding is what keeps tensors aligned, and not every writer pads
            target.copy_(flat.view(entry.dtype).as_strided((count, length), (stride, 1)))
            del flat  # or the window could not be closed

    def _read_header(self) -> dict[str, TensorEntry]:
        """8 bytes of little-endian length, JSON of that length, then the tensors' bytes."""
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
