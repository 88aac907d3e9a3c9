"""`StatePiece`: a box of a parameter of the model, or of what the optimizer keeps of it, as a rank holds it.

What is saved, loaded and gathered of a model in training are these pieces: each says where it lies in the whole tensor,
so that no mesh needs to know another one's layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.training.gradient_sums import pieces_of
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


def _of_parameter(trainer: RankTrainer, shard: ParamShard, parameter: torch.Tensor) -> Iterator[StatePiece]:
    yield from pieces(shard, WEIGHT, parameter.detach())
    for key, value in trainer.optimizer.state_of(parameter).items():
        if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
            yield from pieces(shard, key, value.detach())
        elif isinstance(value, torch.Tensor) and value.dim() == 0:
            yield StatePiece(shard.source, key, (), (), value.detach())
        elif isinstance(value, (bool, int, float)):
            dtype = torch.float64 if isinstance(value, float) else torch.int64
            yield StatePiece(shard.source, key, (), (), torch.tensor(value, dtype=dtype), type(value).__name__)
        elif value is not None:
            what = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise AutodistError(
                f"the optimizer keeps {key!r} of {shard.source} as {what}, and the rank's slice of it is "
                f"{list(parameter.shape)}: where in the whole that lies is not known; use an optimizer of torch.optim"
            )


def pieces(shard: ParamShard, key: str, local: torch.Tensor) -> Iterator[StatePiece]:
    """Yield the pieces of a rank's slice `local`, of the shard's local shape."""
    for place, part in pieces_of(shard, local):
        box = tuple((p.start or 0, n if p.stop is None else p.stop) for p, n in zip(place, shard.shape, strict=False))
        yield StatePiece(shard.source, key, shard.shape, (*box, *((0, n) for n in shard.shape[len(box) :])), part)
