"""Gathers a model in training: whole parameters and optimizer states, from every rank's pieces."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import torch

from autodist_fx.runtime.comm.agreement import over
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from autodist_fx.runtime.training.state_pieces import WEIGHT, state_pieces


@dataclass
class TrainingState:
    """Whole tensors, by the parameters' names in the model: `parameters`, and `optimizer`, of each what torch.optim
    keeps of it ("exp_avg", "step", ...), and MASTER where a parameter has float32 weights beside it."""

    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    optimizer: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def gathered(trainer: RankTrainer, communicator: TrainingCommunicator) -> TrainingState:
    """Return the state of the whole model; called on all ranks, and the same on all.

    Every rank sends its pieces to rank 0, which puts them together and sends the whole tensors back.
    """
    rank, size = trainer.rank, trainer.mesh.size
    mine = state_pieces(trainer)
    lines = [(p.name, p.key, p.shape, p.box, _dtype(p.tensor)) for p in mine]
    listed = [json.loads(text) for text in over(communicator, rank, size)(json.dumps(lines))]
    whole: dict[tuple[str, str], torch.Tensor] = {}
    for sender, lines_of_it in enumerate(listed):
        for number, (name, key, shape, box, dtype) in enumerate(lines_of_it):
            if rank == sender == 0:
                piece = mine[number].tensor.to("cpu")
            elif rank == sender:
                communicator.send(mine[number].tensor.to("cpu").contiguous(), 0, Channel.PARAMETERS)
                continue
            elif rank == 0:
                sizes = [stop - start for start, stop in box]
                piece = communicator.recv(sizes, getattr(torch, dtype), "cpu", sender, Channel.PARAMETERS)
            else:
                continue
            target = whole.setdefault((name, key), torch.zeros(shape, dtype=piece.dtype))
            target[tuple(slice(*interval) for interval in box)] = piece
    state = TrainingState()
    facts = {(name, key): (shape, dtype) for lines in listed for name, key, shape, _, dtype in lines}
    for (name, key), (shape, dtype) in facts.items():
        if rank == 0:
            for other in range(1, size):
                communicator.send(whole[name, key], other, Channel.PARAMETERS)
        else:
            whole[name, key] = communicator.recv(shape, getattr(torch, dtype), "cpu", 0, Channel.PARAMETERS)
        if key == WEIGHT:
            state.parameters[name] = whole[name, key]
        else:
            state.optimizer.setdefault(name, {})[key] = whole[name, key]
    communicator.finish_sends()
    return state


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
