"""Reads a saved run: any box of any tensor, whatever mesh wrote it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autodist_fx.errors import CheckpointError
from autodist_fx.runtime.training.optimizer import OptimizerOptions
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.state_pieces import WEIGHT, pieces
from autodist_fx.training.checkpoint.manifest import Head, SavedFile, read_manifest, tensor_name
from autodist_fx.training.checkpoint.plain import from_plain
from autodist_fx.weights.sources.safetensors_file import SafetensorsFile
from passes.program.gradient_sums import Box
from passes.program.param_shard import ParamShard

_AGAIN = "go back to a checkpoint before it"
_WINDOW_BYTES = 8 << 20


class SavedRun:
    """A checkpoint that is whole: every file is there, in the size in which it was written. Raises CheckpointError
    where one is not."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._manifest = read_manifest(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._chunks: dict[str, list[tuple[str, Box]]] = {}  # by name: (file, box of the whole tensor)
        self._keys: dict[str, list[str]] = {}  # of what the optimizer keeps, by parameter
        for saved_tensor in self._manifest.tensors.values():
            if saved_tensor.key != WEIGHT:
                self._keys.setdefault(saved_tensor.name, []).append(saved_tensor.key)
        try:
            for name, saved in self._manifest.files.items():
                self._open(name, saved)
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Head:
        return self._manifest.head

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def check_model(self, model: nn.Module, class_name: str) -> None:
        """Raise CheckpointError, which names the tensor, where this is a run of another model."""
        mine = {tensor_name(name, WEIGHT): p for name, p in model.named_parameters()}
        theirs = {name: t for name, t in self._manifest.tensors.items() if t.key == WEIGHT}
        start = f"{self.path} is of another model, {self.head.model}, and this one is {class_name}"
        unused = {tensor_name(name, WEIGHT) for name in self.head.unused}
        if lost := next((name for name in mine if name not in theirs and name not in unused), None):
            raise CheckpointError(f"{start}: it has no {lost}")
        for name, saved in theirs.items():
            if name not in mine:
                raise CheckpointError(f"{start}: it has {name}, which this one has not")
            if saved.shape != tuple(mine[name].shape):
                raise CheckpointError(f"{start}: {name} is {list(saved.shape)} there and {list(mine[name].shape)} here")
            dtype = str(mine[name].dtype).removeprefix("torch.")
            if saved.dtype != dtype:
                raise CheckpointError(f"{self.path} has {name} in {saved.dtype}, and this run in {dtype}: give dtype=")

    def check_files(self, numbers: Iterable[int], parts: int) -> None:
        """Read every `parts`-th file from those `numbers` on. Raises CheckpointError for one that is not what was
        written."""
        own = {number % parts for number in numbers}
        for number, (name, saved) in enumerate(sorted(self._manifest.files.items())):
            if number % parts in own:
                digest = hashlib.sha256()
                with (self.path / name).open("rb", buffering=0) as file:
                    while data := file.read(_WINDOW_BYTES):
                        digest.update(data)
                if digest.hexdigest() != saved.sha256:
                    raise CheckpointError(f"{self.path / name} is not what was written: {_AGAIN}")

    def restore(self, trainer: RankTrainer) -> None:
        """Put what was saved in place of a rank's parameters and optimizer states. Raises CheckpointError for a tensor
        that the checkpoint lacks, AutodistError for another optimizer."""
        options = from_plain(self.head.options)
        if options is not None:
            trainer.optimizer.put_options(OptimizerOptions(**options))
        for shard, parameter in trainer.shards():
            self._fill(shard, WEIGHT, parameter.detach())
            if parameter.requires_grad:
                trainer.optimizer.put_state(parameter, self._state(shard, parameter))

    def read(self, name: str, box: Box) -> torch.Tensor:
        """Return the elements `box` of a tensor of the files. Raises CheckpointError where it has not all of them."""
        if name not in self._manifest.tensors:
            raise CheckpointError(f"{self.path} has no {name}: nothing of that run's loss was computed from it")
        saved = self._manifest.tensors[name]
        found = torch.empty([b - a for a, b in box], dtype=getattr(torch, saved.dtype))
        count = 0
        for file, chunk in self._chunks.get(name, ()):
            common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, chunk, strict=True))
            if all(a < b for a, b in common):
                part = self._read(file, name, _within(common, chunk))
                found[tuple(slice(*interval) for interval in _within(common, box))] = part
                count += part.numel()
        if count != found.numel():
            raise CheckpointError(f"{self.path} lacks elements of {name}: {_AGAIN}")
        return found

    def _state(self, shard: ParamShard, parameter: torch.Tensor) -> Mapping[str, Any]:
        state: dict[str, Any] = {}
        for key in self._keys.get(shard.source, ()):
            saved = self._manifest.tensors[tensor_name(shard.source, key)]
            if saved.shape == shard.shape:
                state[key] = torch.empty_like(parameter, dtype=getattr(torch, saved.dtype))
                self._fill(shard, key, state[key])
            else:
                value = self.read(tensor_name(shard.source, key), ())
                state[key] = {"int": int, "float": float, "bool": bool}[saved.number](value) if saved.number else value
        return state

    def _fill(self, shard: ParamShard, key: str, local: torch.Tensor) -> None:
        for piece in pieces(shard, key, local):
            piece.tensor.copy_(self.read(tensor_name(shard.source, key), piece.box))

    def _read(self, file: str, name: str, box: Box) -> torch.Tensor:
        """Return a box of a file's tensor: a slice along the first dim that is cut, and of that the box."""
        opened = self._files[file]
        shape = opened.entries[name].shape
        cut = next((d for d, n in enumerate(shape) if box[d] != (0, n)), None)
        part = opened.read(name, cut, () if cut is None else (box[cut],))
        return part[tuple(slice(*interval) if d != cut else slice(None) for d, interval in enumerate(box))]

    def _open(self, name: str, saved: SavedFile) -> None:
        path = self.path / name
        size = path.stat().st_size if path.is_file() else None
        if size != saved.bytes:
            state = "is missing" if size is None else f"has {size} bytes, and had {saved.bytes} when it was written"
            raise CheckpointError(f"{path} {state}: {_AGAIN}")
        opened = self._files[name] = SafetensorsFile(path)
        for tensor, offsets in saved.offsets.items():
            if tensor not in opened.entries or tensor not in self._manifest.tensors:
                raise CheckpointError(f"{path} has no {tensor}, which it should have: {_AGAIN}")
            sizes = opened.entries[tensor].shape
            box = tuple((at, at + n) for at, n in zip(offsets, sizes, strict=True))
            self._chunks.setdefault(tensor, []).append((name, box))


def _within(inner: Box, outer: Box) -> Box:
    """Return a box relative to where another one begins."""
    return tuple((a - first, b - first) for (a, b), (first, _) in zip(inner, outer, strict=True))
