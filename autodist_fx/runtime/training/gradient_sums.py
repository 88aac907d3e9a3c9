"""Pays the sums of gradients that ranks owe each other after their backward passes (passes/program/gradient_sums.py).

Terms are added in one order, so that every rank has the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch

from autodist_fx.errors import CommunicationError
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from cost_model.graph.placement import Interval
from passes.program.gradient_sums import Box, GradSum
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram

Gradients = dict[str, torch.Tensor]  # by the parameter's path in a rank's module
Slices = tuple[slice, ...]


def pay_sums(program: RankProgram, gradients: Gradients, communicator: TrainingCommunicator) -> None:
    """Add up, in `gradients`, what the program's `grad_sums` name: the rank then has the whole gradient of all that it
    holds.

    Called on all ranks alike, each of which runs the program of its own number.
    """
    pay_sums_of([program], [gradients], communicator, lambda rank: rank)


def pay_sums_of(
    programs: list[RankProgram],
    gradients: list[Gradients],
    communicator: TrainingCommunicator,
    runs_on: Callable[[int], int],
    dtype_of: Callable[[torch.Tensor], torch.dtype] | None = None,
) -> None:
    """Add up, in `gradients`, one dict a program, what the `grad_sums` of the programs that run on this rank name.

    `runs_on` says which rank of the communicator runs the program of a rank of the programs' mesh, `dtype_of` in which
    dtype a parameter's gradient is, None: its own. Called on all ranks
    alike. Everything is sent, and every receive posted, before anything is waited for; in one order of all messages
    everywhere, which a transport without channels needs.
    """
    held = {program.rank: _Held(program, own, dtype_of) for program, own in zip(programs, gradients, strict=True)}
    here = {runs_on(rank) for rank in held}
    owed = sorted({each for program in programs for each in program.grad_sums or ()}, key=_order)
    terms: list[list[Callable[[], torch.Tensor]]] = []
    for each in owed:
        like, shape = _first_held(held, each), [stop - start for start, stop in each.box]
        terms.append([])
        for rank, path in each.terms:
            if rank not in held:
                receive = communicator.start_recv(shape, like.dtype, like.device, runs_on(rank), Channel.GRADIENT_SUMS)
                terms[-1].append(receive)
                continue
            # a copy: it is on its way while the total takes its place
            piece = held[rank].own(path)[held[rank].place(path, each.box)].clone()
            terms[-1].append(functools.partial(_given, piece))
            for other in dict.fromkeys(runs_on(r) for r in each.ranks):
                if other not in here:
                    communicator.send(piece, other, Channel.GRADIENT_SUMS)
    for each, own in zip(owed, terms, strict=True):
        total = _first_held(held, each).new_zeros([stop - start for start, stop in each.box])
        for term in own:
            total += term()
        for rank, path in each.holders:
            if rank in held:
                held[rank].put(path, held[rank].place(path, each.box), total)


def _given(piece: torch.Tensor) -> torch.Tensor:
    return piece


def _first_held(held: Mapping[int, _Held], owed: GradSum) -> torch.Tensor:
    """Return the gradient of the first holder of a sum that is here."""
    return next(held[rank].own(path) for rank, path in owed.holders if rank in held)


def _order(owed: GradSum) -> tuple[object, ...]:
    return owed.source, owed.box, owed.terms


class _Held:
    """The gradients of one program, by the first path of each tensor; what a sum is put into is copied first."""

    def __init__(
        self, program: RankProgram, gradients: Gradients, dtype_of: Callable[[torch.Tensor], torch.dtype] | None
    ) -> None:
        self._dtype_of = dtype_of
        self._module, self._shards, self._gradients = program.graph_module, program.param_shards, gradients
        self._names = first_paths(program)
        self._copied: set[str] = set()

    def own(self, path: str) -> torch.Tensor:
        """Return the gradient at a path: zeros where nothing of the loss depends on the parameter here."""
        name = self._names[path]
        if name not in self._gradients:
            parameter = self._module.get_parameter(path)
            dtype = None if self._dtype_of is None else self._dtype_of(parameter)
            self._gradients[name] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            self._copied.add(name)
        return self._gradients[name]

    def place(self, path: str, box: Box) -> Slices:
        """Return where a box of the whole parameter lies in the one at a path."""
        return place_of(self._shards[path], box)

    def put(self, path: str, place: Slices, total: torch.Tensor) -> None:
        name = self._names[path]
        if name not in self._copied:
            self._gradients[name] = self.own(path).clone()  # autograd may have given one tensor to several
            self._copied.add(name)
        self._gradients[name][place] = total


def first_paths(program: RankProgram) -> Mapping[str, str]:
    """Return {path of a parameter: the first path of the same tensor}."""
    first = {id(p): name for name, p in program.graph_module.named_parameters()}
    return {name: first[id(p)] for name, p in program.graph_module.named_parameters(remove_duplicate=False)}


def place_of(shard: ParamShard, box: Box) -> Slices:
    """Return where a box of the whole parameter, all of which the shard has, lies in it."""
    return tuple(slice(*_local(shard, dim, interval)) for dim, interval in enumerate(box))


def pieces_of(shard: ParamShard, local: torch.Tensor) -> Iterator[tuple[Slices, torch.Tensor]]:
    """Yield (where in the whole parameter, what of `local`) for each run of elements that the shard has."""
    if shard.dim is None:
        yield tuple(slice(None) for _ in shard.shape), local
        return
    before, lead = 0, tuple(slice(None) for _ in range(shard.dim))
    for start, stop in shard.intervals:
        yield (*lead, slice(start, stop)), local.narrow(shard.dim, before, stop - start)
        before += stop - start


def _local(shard: ParamShard, dim: int, interval: Interval) -> Interval:
    if dim != shard.dim:
        return interval
    before = 0
    for start, stop in shard.intervals:
        if start <= interval[0] and interval[1] <= stop:
            return before + interval[0] - start, before + interval[1] - start
        before += stop - start
    raise CommunicationError(f"{shard.name} does not hold elements {interval} of dim {dim} of {shard.source}")
