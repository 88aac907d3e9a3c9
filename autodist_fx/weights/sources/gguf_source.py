"""Reads weights from a GGUF file (llama.cpp's format, mostly quantized), through transformers.

transformers knows how llama.cpp permuted and renamed each family's weights, but for whole files only: **every rank
dequantizes the whole model into memory** (4 bytes per weight) and takes its slices from there. That is fine for models
of the size that people keep as GGUF on a laptop. For larger ones save the model once with
`save_pretrained(directory, safe_serialization=True)` and load that directory: then each rank reads only its slices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from autodist_fx.errors import CheckpointError
from autodist_fx.weights.sources.gguf_file import forget, gguf_tensors
from autodist_fx.weights.sources.module_source import ModuleSource
from autodist_fx.weights.sources.sample import BLOCK_BYTES
from cost_model.graph.placement import Interval

_HEAD_BYTES, _SAMPLED_EVERY = 64 << 10, 1 << 20


class GGUFSource:
    """The dequantized (float32) tensors of a .gguf file, under transformers' names.

    `config` is the model's, as resolve finds it. The file is read on the first use of a tensor, whole: bytes_read is
    then its size, however little is asked for. close() frees the tensors.
    Raises CheckpointError when the file cannot be read.
    """

    def __init__(self, path: Path, config: PretrainedConfig) -> None:
        self.path = path
        self._config = config
        self._tensors: ModuleSource | None = None
        self._bytes_read = 0
        self._closed = False

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    @property
    def checkpoint_bytes(self) -> int:
        return self.path.stat().st_size

    def names(self) -> set[str]:
        return self._load().names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._load().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._load().dtype(name)

    def read(
        self,
        name: str,
        dim: int | None = None,
        intervals: Sequence[Interval] = (),
        dtype: torch.dtype | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See WeightSource.read."""
        return self._load().read(name, dim, intervals, dtype, out)

    def fingerprint(self) -> str:
        """Digest the file's first 64 KiB, its size, and 4 KiB of each MiB. Nothing is dequantized for it."""
        found = hashlib.sha256(str(self.checkpoint_bytes).encode())
        with self.path.open("rb") as file:
            found.update(file.read(_HEAD_BYTES))
            for start in range(_HEAD_BYTES, self.checkpoint_bytes, _SAMPLED_EVERY):
                file.seek(start)
                found.update(file.read(BLOCK_BYTES))
        return found.hexdigest()[:16]

    def close(self) -> None:
        """Free the tensors. Nothing can be read afterwards."""
        self._tensors = None
        self._closed = True
        forget()

    def _load(self) -> ModuleSource:
        """Dequantize all tensors on first use. Raises CheckpointError after `close`."""
        if self._closed:
            raise CheckpointError(f"{self.path} was closed: open it again with open_source")
        if self._tensors is None:
            with torch.device("meta"):
                skeleton = AutoModelForCausalLM.from_config(self._config)  # only its names are used
            self._tensors = ModuleSource(gguf_tensors(self.path, skeleton))
            self._bytes_read += self.checkpoint_bytes
        return self._tensors
