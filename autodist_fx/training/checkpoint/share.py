"""Deals the state of a model in training to the ranks that write it: every element once, as even as can be."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autodist_fx.runtime.comm.agreement import Everyone
from autodist_fx.runtime.training.state_pieces import StatePiece
from autodist_fx.training.checkpoint.manifest import SavedTensor, tensor_name
from passes.program.gradient_sums import Box, cells, contains


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of what is saved: `tensors` are views of the rank's memory, with the file's name of each and where
    it begins in the whole tensor. `whole`: all tensors of the model, of all ranks."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.Tensor], ...]
    whole: dict[str, SavedTensor]

    def copied(self) -> Share:
        """Return the same with memory of its own, on the CPU, which training does not change."""
        copies = tuple((n, at, x.to("cpu", copy=True).contiguous()) for n, at, x in self.tensors)
        return Share(copies, self.whole)


def share_of(rank: int, pieces: Sequence[StatePiece], everyone: Everyone) -> Share:
    """Return what this rank writes of what it has; called on all ranks.

    Boxes that several ranks hold, in whole or in part, are cut along each other's edges, and each cell goes to that of
    its holders that has the least to write yet.
    """
    lines = [(p.name, p.key, p.shape, str(p.tensor.dtype).removeprefix("torch."), p.number, p.box) for p in pieces]
    listed: list[list[Any]] = [json.loads(text) for text in everyone(json.dumps(lines))]
    whole: dict[str, SavedTensor] = {}
    held: dict[str, list[tuple[int, int, Box]]] = {}  # by name: (rank, number of its piece, box)
    for holder, lines_of_it in enumerate(listed):
        for number, (source, key, shape, dtype, kind, box) in enumerate(lines_of_it):
            name = tensor_name(source, key)
            whole.setdefault(name, SavedTensor(source, key, tuple(shape), dtype, kind))
            held.setdefault(name, []).append((holder, number, tuple((a, b) for a, b in box)))
    itemsizes = {saved.dtype: getattr(torch, saved.dtype).itemsize for saved in whole.values()}
    loads = [0] * len(listed)
    mine = []
    for name, own in held.items():
        boxes = list(dict.fromkeys(box for _, _, box in own))
        for cell in boxes if len(boxes) == 1 else cells(boxes):
            holders = [(holder, number, box) for holder, number, box in own if contains(box, cell)]
            if not holders:
                continue
            holder, number, box = min(holders, key=lambda each: (loads[each[0]], each[0]))
            loads[holder] += math.prod(b - a for a, b in cell) * itemsizes[whole[name].dtype]
            if holder == rank:
                place = tuple(slice(a - first, b - first) for (a, b), (first, _) in zip(cell, box, strict=True))
                mine.append((name, tuple(a for a, _ in cell), pieces[number].tensor[place]))
    return Share(tuple(mine), whole)
