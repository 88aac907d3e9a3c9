"""Runs a forward and a backward pass of all ranks' programs in this process, and glues their gradients.

A rank goes back as runtime/training/backward.py says; then the sums that are owed of parameters' gradients are paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autodist_fx.errors import AutodistError, CommunicationError
from autodist_fx.runtime.training.backward import go_back
from autodist_fx.runtime.training.gradient_sums import Gradients, pay_sums, pieces_of
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from passes.ops.comm import Tape, using
from passes.program.rank_program import RankProgram


def rank_gradients(
    program: RankProgram, inputs: Mapping[str, Any], communicator: TrainingCommunicator, root: str = "loss"
) -> tuple[torch.Tensor | None, Gradients]:
    """Return (the output `root`, or None on a rank that does not return it; the rank's gradients of it, sums paid).

    Called on all ranks of the mesh alike, with a program to be trained (`grad_sums`). Raises AutodistError where
    `root` has more than one element, or depends on no parameter.
    """
    tape = Tape()
    with using(communicator, tape), torch.enable_grad():
        outputs = program.graph_module(**{n: inputs[n] for n in program.input_names if n in inputs})
        loss = outputs.get(root)
        if loss is not None and loss.numel() != 1:
            raise AutodistError(f"{root} has {loss.numel()} elements: gradients are of one number")
        if loss is not None and not loss.requires_grad:
            raise AutodistError(f"{root} depends on no parameter that wants a gradient")
        parameters = {n: p for n, p in program.graph_module.named_parameters() if p.requires_grad}
        found = go_back(tape, communicator, loss, list(parameters.values()))
    gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
    pay_sums(program, gradients, communicator)
    return None if loss is None else loss.detach(), gradients


def run_backward(
    programs: Sequence[RankProgram], inputs: Mapping[str, Any], root: str = "loss"
) -> tuple[torch.Tensor, list[Gradients]]:
    """Run all ranks in this process: return (the output `root`, each rank's gradients). The programs are of ranks 0, 1,
    ...

    Raises what rank_gradients raises, and AutodistError where no rank returns such an output.
    """

    def run_rank(rank: int, communicator: ThreadCommunicator) -> tuple[torch.Tensor | None, Gradients]:
        return rank_gradients(programs[rank], inputs, communicator, root)

    of_ranks = ThreadWorld(programs[0].mesh).run(run_rank)
    loss = next((x for x, _ in of_ranks if x is not None), None)
    if loss is None:
        raise AutodistError(f"the model returned no {root}: pass what it computes one from (labels=...)")
    return loss, [gradients for _, gradients in of_ranks]


def glued(programs: Sequence[RankProgram], gradients: Sequence[Gradients]) -> Gradients:
    """Return whole gradients, by the parameters' names in the model. Raises CommunicationError, which names the
    parameter, where two ranks that hold the same elements of one have different gradients of them, or nobody has
    some."""
    found: Gradients = {}
    owners: dict[str, torch.Tensor] = {}  # of each element the first rank that has it
    for program, own in zip(programs, gradients, strict=True):
        for path, gradient in own.items():
            shard = program.param_shards[path]
            if shard.source not in found:
                found[shard.source] = gradient.new_zeros(shard.shape)
                owners[shard.source] = torch.full(shard.shape, -1, dtype=torch.int32, device=gradient.device)
            whole, owner = found[shard.source], owners[shard.source]
            for box, piece in pieces_of(shard, gradient):
                there, theirs = whole[box], owner[box]
                differing = (theirs >= 0) & ((there - piece).abs() > _tolerance(piece))
                if differing.any():
                    raise CommunicationError(
                        f"the gradient of {shard.source} is another one on rank {program.rank} than on rank "
                        f"{int(theirs[differing].max())}: what they compute alike is not the same on both"
                    )
                whole[box] = piece
                theirs.masked_fill_(theirs < 0, program.rank)
    for name, owner in owners.items():
        if (owner < 0).any():
            raise CommunicationError(f"no rank has a gradient of {int((owner < 0).sum())} elements of {name}")
    return found


def _tolerance(x: torch.Tensor) -> float:
    """Return how far two sums of the same terms may be apart."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return 1e3 * torch.finfo(x.dtype).eps * largest
