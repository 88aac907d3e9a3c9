"""`StatePiece`: a box of a parameter of the model, or of what the optimizer keeps of it, as a rank holds it.

What is saved, loaded and gathered of a model in training are these pieces: each says where it lies in the whole tensor,
so that no mesh needs to know another one's layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.training.gradient_sums import pieces_of
from autodist_fx.runtime.training.optimizer import MASTER, Stepped
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from passes.program.gradient_sums import Box
from passes.program.param_shard import ParamShard

WEIGHT = ""  # the key of a parameter itself, beside those of what the optimizer keeps of it


@dataclass(frozen=True, slots=True)
class StatePiece:
    """The elements `box` of the whole tensor `key` of the parameter `name`, of shape `shape`.

    `tensor` is the rank's own memory, of the box's shape: writing into it changes the state. A number that the
    optimizer keeps (how many steps were taken) has the shape [] and is the same on all ranks; `number` is the Python
    type that it has there, "" for a tensor.
    """

    name: str
    key: str
    shape: tuple[int, ...]
    box: Box
    tensor: torch.Tensor
    number: str = ""


def state_pieces(trainer: RankTrainer) -> list[StatePiece]:
    """Return all that a rank holds of parameters and optimizer states.

    Raises AutodistError for a state of the optimizer that is neither a number nor of its parameter's shape: where it
    lies in the whole is not known.
    """
    return [piece for shard, parameter in trainer.shards() for piece in _of_parameter(trainer, shard, parameter)]


def _of_parameter(trainer: RankTrainer, shard: ParamShard, parameter: nn.Parameter) -> Iterator[StatePiece]:
    yield from pieces(shard, WEIGHT, parameter.detach())
    stepped = trainer.optimizer.stepped_of(parameter)
    if stepped is None:
        return
    if stepped.is_master:
        yield from _pieces_of_part(shard, MASTER, stepped, stepped.weights.detach())
    for key, value in trainer.optimizer.state_of(parameter).items():
        if isinstance(value, torch.Tensor) and value.shape == stepped.weights.shape:
            yield from _pieces_of_part(shard, key, stepped, value.detach())
        elif isinstance(value, torch.Tensor) and value.dim() == 0:
            yield StatePiece(shard.source, key, (), (), value.detach())
        elif isinstance(value, (bool, int, float)):
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            yield StatePiece(shard.source, key, (), (), torch.tensor(value, dtype=dtype), type(value).__name__)
        elif value is not None:
            what = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise AutodistError(
                f"the optimizer keeps {key!r} of {shard.source} as {what}, and what the rank steps of it is of shape "
                f"{list(stepped.weights.shape)}: where that lies in the whole is not known; use torch.optim's"
            )


def _pieces_of_part(shard: ParamShard, key: str, stepped: Stepped, value: torch.Tensor) -> Iterator[StatePiece]:
    """Yield the pieces of a tensor that lies as what a rank steps of its slice does."""
    if value.shape == stepped.parameter.shape:
        yield from pieces(shard, key, value)
        return
    before = 0
    for local in flat_boxes(tuple(stepped.parameter.shape), stepped.start, stepped.stop):
        sizes = [stop - start for start, stop in local]
        run = value[before : before + math.prod(sizes)].view(sizes)
        before += run.numel()
        for box, place in _in_whole(shard, local):
            yield StatePiece(shard.source, key, shard.shape, box, run[place])


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes, in order, that make up the elements [start, stop) of a flat tensor of this shape."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield ((start, stop),)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows
    if first > last:  # within one row
        yield from (((last, last + 1), *box) for box in flat_boxes(shape[1:], start - last * row, stop - last * row))
        return
    yield from (((first - 1, first), *box) for box in flat_boxes(shape[1:], start - (first - 1) * row, row))
    if first < last:
        yield ((first, last), *((0, size) for size in shape[1:]))
    yield from (((last, last + 1), *box) for box in flat_boxes(shape[1:], 0, stop - last * row))


def _in_whole(shard: ParamShard, local: Box) -> Iterator[tuple[Box, tuple[slice, ...]]]:
    """Yield (box of the whole tensor, place within `local`) for a box of a rank's slice."""
    if shard.dim is None:
        yield local, tuple(slice(0, stop - start) for start, stop in local)
        return
    before, (first, last) = 0, local[shard.dim]
    for start, stop in shard.intervals:
        low, high = max(first, before), min(last, before + stop - start)
        if low < high:
            box, place = list(local), [slice(0, b - a) for a, b in local]
            box[shard.dim] = (start + low - before, start + high - before)
            place[shard.dim] = slice(low - first, high - first)
            yield tuple(box), tuple(place)
        before += stop - start


def pieces(shard: ParamShard, key: str, local: torch.Tensor) -> Iterator[StatePiece]:
    """Yield the pieces of a rank's slice `local`, of the shard's local shape."""
    for place, part in pieces_of(shard, local):
        box = tuple((p.start or 0, n if p.stop is None else p.stop) for p, n in zip(place, shard.shape, strict=False))
        yield StatePiece(shard.source, key, shard.shape, (*box, *((0, n) for n in shard.shape[len(box) :])), part)
