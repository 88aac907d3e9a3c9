"""A forward and a backward pass of every rank of a mesh, in this process, and the parameters' gradients of it.

A stage is one piece to autograd: what it receives are leaves, what it sends are roots beside the loss. After its
forward pass a rank waits for the gradients of all that it has sent, goes back through its graph once, and sends each
leaf's gradient back to where it came from. Later stages never wait for earlier ones, so that nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autodist_fx.errors import AutodistError, CommunicationError
from autodist_fx.runtime.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.placement import Interval
from passes.comm_ops import Communicator, Tape, using
from passes.context import ParamShard
from passes.grad_sums import Box
from passes.program import RankProgram

GRADIENT_CHANNEL = 1 << 24  # plus the channel of what it is the gradient of: apart from all that is sent forward
Gradients = dict[str, torch.Tensor]  # by the parameter's path in a rank's module


def go_back(
    tape: Tape, communicator: Communicator, loss: torch.Tensor | None, parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """A rank's backward pass: the gradient that it has of each parameter, None where nothing of the loss depends on it.

    `tape` is of its forward pass; `loss`, of one element, is None on a rank that has none.
    """
    roots, known = ([], []) if loss is None else ([loss], [torch.ones_like(loss)])
    for x, to, channel in tape.sent:
        roots.append(x)
        known.append(communicator.recv(x.shape, x.dtype, x.device, to, GRADIENT_CHANNEL + channel))
    leaves = [x for x, _, _ in tape.received]
    wanted = [*parameters, *leaves]
    found: list[torch.Tensor | None] = [None] * len(wanted)
    if roots and wanted:
        found = list(torch.autograd.grad(roots, wanted, known, allow_unused=True))
    for (x, source, channel), gradient in zip(tape.received, found[len(parameters) :], strict=True):
        back = torch.zeros_like(x) if gradient is None else gradient.contiguous()
        communicator.send(back, source, GRADIENT_CHANNEL + channel)
    return found[: len(parameters)]


def run_backward(
    programs: Sequence[RankProgram], inputs: Mapping[str, Any], root: str = "loss"
) -> tuple[torch.Tensor, list[Gradients]]:
    """(the output `root`, each rank's gradients of it, before any sum over ranks). The programs are of ranks 0, 1, ...

    Raises AutodistError where no rank returns such an output, or one of more than one element; what a rank raised.
    """

    def run_rank(rank: int, communicator: ThreadCommunicator) -> tuple[torch.Tensor | None, Gradients]:
        program, tape = programs[rank], Tape()
        with using(communicator, tape), torch.enable_grad():
            outputs = program.graph_module(**{n: inputs[n] for n in program.input_names if n in inputs})
            loss = outputs.get(root)
            if loss is not None and loss.numel() != 1:
                raise AutodistError(f"{root} has {loss.numel()} elements: gradients are of one number")
            parameters = {n: p for n, p in program.graph_module.named_parameters() if p.requires_grad}
            if loss is not None and not loss.requires_grad:
                raise AutodistError(f"{root} depends on no parameter of rank {rank} that wants a gradient")
            found = go_back(tape, communicator, loss, list(parameters.values()))
        gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        return None if loss is None else loss.detach(), gradients

    of_ranks = ThreadWorld(programs[0].mesh).run(run_rank)
    loss = next((x for x, _ in of_ranks if x is not None), None)
    if loss is None:
        raise AutodistError(f"the model returned no {root}: pass what it computes one from (labels=...)")
    return loss, [gradients for _, gradients in of_ranks]


def add_up(programs: Sequence[RankProgram], gradients: Sequence[Gradients]) -> None:
    """Pays what the programs' `grad_sums` say, in place: each rank then has the whole gradient of what it holds."""
    names = [_one_name(program) for program in programs]
    for owed in dict.fromkeys(s for program in programs for s in program.grad_sums or ()):
        places = [(rank, names[rank][path], programs[rank].param_shards[path]) for rank, path in owed.holders]
        terms = [(rank, names[rank][path]) for rank, path in owed.terms]
        known = [
            gradients[rank][name][_place(shard, owed.box)]
            for rank, name, shard in places
            if (rank, name) in terms and name in gradients[rank]
        ]
        if not known:
            continue  # nothing of the loss depends on it
        total = sum(known[1:], start=known[0])
        for rank, name, shard in places:
            whole = gradients[rank].get(name)
            gradients[rank][name] = total.new_zeros(shard.local_shape) if whole is None else whole.clone()
            gradients[rank][name][_place(shard, owed.box)] = total


def _one_name(program: RankProgram) -> dict[str, str]:
    """Every path of a parameter -> the first path of the same tensor."""
    first = {id(p): name for name, p in program.graph_module.named_parameters()}
    return {name: first[id(p)] for name, p in program.graph_module.named_parameters(remove_duplicate=False)}


def glued(programs: Sequence[RankProgram], gradients: Sequence[Gradients]) -> Gradients:
    """Whole gradients, by the parameters' names in the model. Raises CommunicationError, which names the parameter,
    where two ranks that hold the same elements of one have different gradients of them, or nobody has some."""
    found: Gradients = {}
    owners: dict[str, torch.Tensor] = {}  # of each element the first rank that has it
    for program, own in zip(programs, gradients, strict=True):
        for path, gradient in own.items():
            shard = program.param_shards[path]
            if shard.source not in found:
                found[shard.source] = gradient.new_zeros(shard.shape)
                owners[shard.source] = torch.full(shard.shape, -1, dtype=torch.int32)
            whole, owner = found[shard.source], owners[shard.source]
            for box, piece in _pieces(shard, gradient):
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
    """How far two sums of the same terms may be apart."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return 1e3 * torch.finfo(x.dtype).eps * largest


def _place(shard: ParamShard, box: Box) -> tuple[slice, ...]:
    """Where a box of the whole parameter, all of which the shard has, lies in it."""
    return tuple(slice(*_local(shard, dim, interval)) for dim, interval in enumerate(box))


def _local(shard: ParamShard, dim: int, interval: Interval) -> Interval:
    if dim != shard.dim:
        return interval
    before = 0
    for start, stop in shard.intervals:
        if start <= interval[0] and interval[1] <= stop:
            return before + interval[0] - start, before + interval[1] - start
        before += stop - start
    raise CommunicationError(f"{shard.name} does not hold elements {interval} of dim {dim} of {shard.source}")


def _pieces(shard: ParamShard, gradient: torch.Tensor) -> list[tuple[tuple[slice, ...], torch.Tensor]]:
    """(where in the whole parameter, what) of each run that the shard has."""
    if shard.dim is None:
        return [(tuple(slice(None) for _ in shard.shape), gradient)]
    found, before, lead = [], 0, tuple(slice(None) for _ in range(shard.dim))
    for start, stop in shard.intervals:
        found.append(((*lead, slice(start, stop)), gradient.narrow(shard.dim, before, stop - start)))
        before += stop - start
    return found
