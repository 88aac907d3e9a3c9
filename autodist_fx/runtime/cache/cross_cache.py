"""A rank's cache of a decoder that reads an encoder: its own layers grow with the steps, the others are filled once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer

from autodist_fx.calls.cache_kinds import CROSS
from autodist_fx.runtime.cache.kv_cache import SplitCache


@dataclass(frozen=True, eq=False)
class Encoded:
    """An encoder's outputs for one batch, on one rank. It has one number on all ranks."""

    number: int
    batch: int
    layers: dict[int, DynamicLayer]  # by the model's cache layer, this rank's alone
    lengths: dict[str, int]  # what it read
    inputs: dict[str, torch.Tensor]  # of the encoder, those that the decoder's steps take, too


class CrossCache(SplitCache):
    """A cache of a decoder that reads an encoder. `kinds` and `numbers` are of its layers (RankProgram.cache_kinds
    and .cache_layers)."""

    kinds: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()
    encoded: Encoded | None = None
    rows = 0
    inputs: dict[str, torch.Tensor]  # of the encoder, a row for each of the decoder's

    def attach(self, encoded: Encoded, batch: int) -> None:
        """Let the steps read `encoded`, each row of it as often as there are rows in `batch` for it (beams)."""
        if self.encoded is encoded and self.rows == batch:
            return
        times, rest = divmod(batch, encoded.batch)
        if rest:
            raise ValueError(f"a decoder of {batch} rows cannot read what an encoder gave for {encoded.batch}")
        self.encoded, self.rows = encoded, batch
        self.inputs = {name: _rows(value, times) for name, value in encoded.inputs.items()}
        for index, kind in enumerate(self.kinds):
            if kind == CROSS:
                source, layer = encoded.layers[self.numbers[index]], DynamicLayer()
                layer.update(_rows(source.keys, times), _rows(source.values, times))
                self.layers[index] = layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.inputs = {name: value.index_select(0, beam_idx.to(value.device)) for name, value in self.inputs.items()}

    def _crop_layers(self, argument: int) -> None:
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            if kind != CROSS:
                layer.crop(argument)

    def reset(self) -> None:
        super().reset()
        self.encoded, self.rows, self.inputs = None, 0, {}


def _rows(value: torch.Tensor, times: int) -> torch.Tensor:
    return value if times == 1 else value.repeat_interleave(times, dim=0)
