"""Gathers a model in training: whole parameters and optimizer states, from every rank's slices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from autodist_fx.runtime.comm.agreement import over
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.training.gradient_sums import pieces_of
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from passes.program.param_shard import ParamShard

WEIGHT = ""  # the key of the parameter itself beside its optimizer's


@dataclass
class TrainingState:
    """Whole tensors, by the parameters' names in the model: `parameters`, and `optimizer`, of each what torch.optim
    keeps of it ("exp_avg", "step", ...)."""

    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def gathered(trainer: RankTrainer, communicator: TrainingCommunicator) -> TrainingState:
    """Return the state of the whole model; called on all ranks, and the same on all.

    Every rank sends its slices to rank 0, which puts them together and sends the whole tensors back.
    """
    rank, size = trainer.rank, trainer.mesh.size
    mine = _tensors(trainer) if trainer.mesh.dp_rank(rank) == 0 else []  # the replicas are the same
    lines = [(_line(shard), key, _dtype(x), list(x.shape)) for shard, key, x in mine]
    listed = [json.loads(text) for text in over(communicator, rank, size)(json.dumps(lines))]
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for sender, lines_of_it in enumerate(listed):
        for number, (fields, key, dtype, shape) in enumerate(lines_of_it):
            if rank == sender == 0:
                piece = mine[number][2]
            elif rank == sender:
                communicator.send(mine[number][2], 0, Channel.PARAMETERS)
                continue
            elif rank == 0:
                piece = communicator.recv(shape, getattr(torch, dtype), "cpu", sender, Channel.PARAMETERS)
            else:
                continue
            _put(whole, _shard(fields), key, piece)
    names = list(dict.fromkeys((fields["source"], key) for lines in listed for fields, key, _, _ in lines))
    facts = {(f["source"], key): (dtype, f["shape"], shape) for lines in listed for f, key, dtype, shape in lines}
    state = TrainingState()
    for source, key in names:
        dtype, full, local = facts[source, key]
        shape = full if local or not full else []
        if rank == 0:
            for other in range(1, size):
                communicator.send(whole[source, key], other, Channel.PARAMETERS)
        else:
            found = communicator.recv(shape, getattr(torch, dtype), "cpu", 0, Channel.PARAMETERS)
            whole[source, key] = found
        if key == WEIGHT:
            state.parameters[source] = whole[source, key]
        else:
            state.optimizer.setdefault(source, {})[key] = whole[source, key]
    communicator.finish_sends()
    return state


def _tensors(trainer: RankTrainer) -> list[tuple[ParamShard, str, torch.Tensor]]:
    return [
        (shard, key, x.detach().to("cpu").contiguous())
        for shard, parameter in trainer.shards()
        for key, x in _of_parameter(trainer, parameter)
    ]


def _of_parameter(trainer: RankTrainer, parameter: nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
    yield WEIGHT, parameter
    for key, value in trainer.optimizer.state_of(parameter).items():
        if isinstance(value, torch.Tensor):
            yield key, value


def _line(shard: ParamShard) -> dict[str, object]:
    return {"source": shard.source, "shape": shard.shape, "dim": shard.dim, "intervals": shard.intervals}


def _shard(fields: Mapping[str, object]) -> ParamShard:
    intervals = tuple((start, stop) for start, stop in fields["intervals"])  # type: ignore[attr-defined]
    shape: tuple[int, ...] = tuple(fields["shape"])  # type: ignore[arg-type]
    return ParamShard("", str(fields["source"]), shape, "", fields["dim"], intervals)  # type: ignore[arg-type]


def _put(whole: dict[tuple[str, str], torch.Tensor], shard: ParamShard, key: str, piece: torch.Tensor) -> None:
    """Put a slice in its place; a number (how many steps were taken) is the same for all slices."""
    if piece.dim() == 0 and shard.shape:
        whole[shard.source, key] = piece
        return
    target = whole.setdefault((shard.source, key), torch.zeros(shard.shape, dtype=piece.dtype))
    for place, part in pieces_of(shard, piece):
        target[place] = part


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
