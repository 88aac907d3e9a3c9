"""Runs a forward and a backward pass of a rank's program, and returns the gradients of its parameters.

A stage is one piece to autograd: what it receives are leaves, what it sends are roots beside the loss. After its
forward pass a rank waits for the gradients of all that it has sent, goes back through its graph once, and sends each
leaf's gradient back to where it came from. Later stages never wait for earlier ones, so that nobody waits for ever.
Then the sums that are owed of parameters' gradients are paid, in the order that all ranks have them in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from autodist_fx.errors import AutodistError, CommunicationError
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.simulation.thread_communicator import ThreadCommunicator, ThreadWorld
from cost_model.graph.placement import Interval
from passes.ops.comm import Communicator, Tape, using
from passes.program.gradient_sums import Box
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram

Gradients = dict[str, torch.Tensor]  # by the parameter's path in a rank's module


def go_back(
    tape: Tape, communicator: Communicator, loss: torch.Tensor | None, parameters: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Run a rank's backward pass; return the gradient that it has of each parameter, None where nothing of the loss
    depends on it.

    `tape` is of its forward pass; `loss`, of one element, is None on a rank that has none.
    """
    roots, known = ([], []) if loss is None else ([loss], [torch.ones_like(loss)])
    for x, to, channel in tape.sent:
        gradient = communicator.recv(x.shape, x.dtype, x.device, to, Channel.GRADIENTS + channel)
        if x.requires_grad:
            roots.append(x)
            known.append(gradient)
    leaves = [x for x, _, _ in tape.received]
    wanted = [*parameters, *leaves]
    found: list[torch.Tensor | None] = [None] * len(wanted)
    if roots and wanted:
        # in this thread: one for all ranks of a simulation on a GPU would wait for itself
        with torch.autograd.set_multithreading_enabled(False):
            found = list(torch.autograd.grad(roots, wanted, known, allow_unused=True))
    for (x, source, channel), gradient in zip(tape.received, found[len(parameters) :], strict=True):
        back = torch.zeros_like(x) if gradient is None else gradient.contiguous()
        communicator.send(back, source, Channel.GRADIENTS + channel)
    return found[: len(parameters)]


def pay_sums(program: RankProgram, gradients: Gradients, communicator: Communicator) -> None:
    """Add up, in place, the gradients that the program's `grad_sums` name: the rank then has the whole gradient of all
    that it holds.

    Called on all ranks alike. Terms are added in one order, so that every rank has the same bits.
    """
    names = _one_name(program)
    for owed in program.grad_sums or ():
        own = {path: _place(program.param_shards[path], owed.box) for r, path in owed.holders if r == program.rank}
        for path in own:
            parameter = program.graph_module.get_parameter(path)
            known = gradients.get(names[path])  # None: nothing of the loss depends on it here
            gradients[names[path]] = torch.zeros_like(parameter) if known is None else known.clone()
        mine = [path for r, path in owed.terms if r == program.rank]
        # copies: they are on their way while the total takes their places
        pieces = {path: gradients[names[path]][own[path]].clone() for path in mine}
        for peer in owed.ranks:
            for path in mine if peer != program.rank else ():
                communicator.send(pieces[path], peer, Channel.GRADIENT_SUMS)
        like = gradients[names[next(iter(own))]]
        shape = [stop - start for start, stop in owed.box]
        total = like.new_zeros(shape)
        for r, path in owed.terms:
            if r == program.rank:
                total += pieces[path]
            else:
                total += communicator.recv(shape, like.dtype, like.device, r, Channel.GRADIENT_SUMS)
        for path, place in own.items():
            gradients[names[path]][place] = total


def _one_name(program: RankProgram) -> dict[str, str]:
    """Return {path of a parameter: the first path of the same tensor}."""
    first = {id(p): name for name, p in program.graph_module.named_parameters()}
    return {name: first[id(p)] for name, p in program.graph_module.named_parameters(remove_duplicate=False)}


def rank_gradients(
    program: RankProgram, inputs: Mapping[str, Any], communicator: Communicator, root: str = "loss"
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
    """Return how far two sums of the same terms may be apart."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    return 1e3 * torch.finfo(x.dtype).eps * largest


def _place(shard: ParamShard, box: Box) -> tuple[slice, ...]:
    """Return where a box of the whole parameter, all of which the shard has, lies in it."""
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
    """Return (where in the whole parameter, what) of each run that the shard has."""
    if shard.dim is None:
        return [(tuple(slice(None) for _ in shard.shape), gradient)]
    found, before, lead = [], 0, tuple(slice(None) for _ in range(shard.dim))
    for start, stop in shard.intervals:
        found.append(((*lead, slice(start, stop)), gradient.narrow(shard.dim, before, stop - start)))
        before += stop - start
    return found
