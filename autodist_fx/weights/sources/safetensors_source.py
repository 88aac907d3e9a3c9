"""Reads a checkpoint directory with model.safetensors, or with shards and their model.safetensors.index.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources.safetensors_file import SafetensorsFile, TensorEntry
from autodist_fx.weights.sources.sample import fingerprint
from cost_model.graph.placement import Interval

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"


def weight_files(directory: Path) -> tuple[Path, ...]:
    """List the safetensors files that hold the directory's model, as transformers picks them; () when there are none.

    Raises CheckpointError when the index names a file that is not there.
    """
    if (directory / SINGLE_NAME).is_file():
        return (directory / SINGLE_NAME,)
    index = directory / INDEX_NAME
    if not index.is_file():
        return ()
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no safetensors index: download or save the checkpoint again") from error
    for name in names:
        if Path(name).name != name:  # an index must not reach outside of its directory
            raise CheckpointError(f"{index} names {name!r}, which is not a file beside it")
        if not (directory / name).is_file():
            raise CheckpointError(f"{index} names {name}, which is missing: download or save the checkpoint again")
    return tuple(directory / name for name in names)


class SafetensorsSource:
    """Slices of the tensors in one or more safetensors files. Only headers are read until `read` is called.

    Raises CheckpointError for a directory without weights, and for files that cannot be read.
    """

    def __init__(self, path: str | Path | Sequence[Path]) -> None:
        if isinstance(path, (str, Path)):
            files = weight_files(Path(path))
            if not files:
                raise CheckpointError(f"{path} has neither {SINGLE_NAME} nor {INDEX_NAME}: save the model there first")
        else:
            files = tuple(path)
        self._files: list[SafetensorsFile] = []
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in files:
            opened = SafetensorsFile(file)
            self._files.append(opened)
            self._file_of.update(dict.fromkeys(opened.entries, opened))
        self._bytes_read = 0

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    @property
    def checkpoint_bytes(self) -> int:
        return sum(file.entries[name].nbytes for name, file in self._file_of.items())

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    def read(
        self,
        name: str,
        dim: int | None = None,
        intervals: Sequence[Interval] = (),
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See WeightSource.read."""
        entry = self._entry(name)
        result = self._file_of[name].read(name, dim, intervals, dtype, out)
        self._bytes_read += result.numel() * entry.dtype.itemsize
        return result

    def fingerprint(self) -> str:
        """See WeightSource.fingerprint."""
        entries = ((name, file.entries[name], file) for name, file in self._file_of.items())
        return fingerprint((name, str(e.dtype), e.shape, file.sample(name)) for name, e, file in entries)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self._file_of:
            where = ", ".join(str(file.path) for file in self._files[:2])
            raise CheckpointError(f"no tensor {name} in {where}: is it the checkpoint of this model?")
        return self._file_of[name].entries[name]
