"""The ranks of an engine: all in this process, a thread each, or one process a rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import Facts
from autodist_fx.runtime.comm.process_group import JoinedRank
from autodist_fx.runtime.generation.collective_call import CollectiveCalls
from autodist_fx.runtime.training.autograd.recompute import NONE, collectives_of
from autodist_fx.runtime.training.optimizer import OptimizerFactory, SchedulerFactory
from autodist_fx.runtime.training.rank_trainer import RankTrainer, StepTotals
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from autodist_fx.runtime.training.stage import Microbatch
from autodist_fx.simulation.thread_communicator import ThreadWorld
from autodist_fx.startup.facts import shared_weight_facts
from autodist_fx.training.by_hand import loss_by_hand
from autodist_fx.training.forward import run_forward
from autodist_fx.weights.load_program import load_program
from autodist_fx.weights.share import share_weights
from autodist_fx.weights.sources.source import WeightSource
from cost_model.mesh import Mesh
from cost_model.schedule.schedule import Schedule
from passes.program.rank_program import RankProgram

T = TypeVar("T")
Work = Callable[[RankTrainer, TrainingCommunicator], T]


@dataclass(frozen=True, slots=True)
class ShareOptions:
    """The options that every rank's share of a model in training is made with; `open_weights` opens the weights that
    training starts from."""

    mesh: Mesh
    model: PreTrainedModel  # on meta
    open_weights: Callable[[], WeightSource]
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory | None
    max_grad_norm: float | None
    zero_stage: int
    master_weights: bool
    recompute: str


@dataclass(frozen=True, slots=True)
class Part:
    """A microbatch of one replica: its inputs, and the variant whose programs run it."""

    inputs: Mapping[str, Any]
    variant: Variant


class RankShare:
    """One rank's programs, of every variant that is used, and its trainer, made of the first of them."""

    def __init__(self, rank: int, device: torch.device, options: ShareOptions) -> None:
        self._rank, self._device, self.options = rank, device, options
        self._loaded: dict[int, dict[int, RankProgram]] = {}  # by id of a variant, by stage
        self._keep: list[Variant] = []  # so that their ids stay theirs
        self.trainer: RankTrainer | None = None

    def take(self, compiled: Compilation, variant: Variant, stages: Sequence[int]) -> dict[int, RankProgram]:
        """Return this rank's programs of a variant, loaded, by stage; made at first use, of a variant that trains.

        Raises AutodistError for one that does not train, and reads weights that this rank has none of.
        """
        if id(variant) not in self._loaded:
            self._keep.append(variant)
            self._loaded[id(variant)] = {s: self._load(compiled, variant, s) for s in stages}
            if self.trainer is None:
                options = self.options
                self.trainer = RankTrainer(
                    options.mesh, self._rank, self._loaded[id(variant)], _names(options.model), options.optimizer,
                    options.scheduler, options.max_grad_norm, options.zero_stage, options.master_weights,
                    options.recompute,
                )  # fmt: skip
        return self._loaded[id(variant)]

    def forward(self, communicator: TrainingCommunicator, schedule: Schedule, part: Part) -> dict[str, Any]:
        """Return what the programs of a variant give, of all stages, on all ranks."""
        given = communicator, self.options.mesh, self._rank, schedule, self.microbatch(part), self._device
        return run_forward(*given)

    def by_hand(self, communicator: TrainingCommunicator, part: Part) -> torch.Tensor:
        """Return the loss of a part on the one stage that there is, for loss.backward() on all ranks."""
        microbatch = self.microbatch(part)
        _trainer(self).check_alike(microbatch)
        return loss_by_hand(microbatch.programs[0], microbatch.inputs_of(0), communicator)

    def microbatch(self, part: Part) -> Microbatch:
        """Return a part of this rank's replica, to be run by programs that were taken."""
        inputs = {n: x.to(self._device) if isinstance(x, torch.Tensor) else x for n, x in part.inputs.items()}
        return Microbatch(inputs, self._loaded[id(part.variant)], part.variant.plan.hops)

    def _load(self, compiled: Compilation, variant: Variant, stage: int) -> RankProgram:
        mesh = self.options.mesh
        program = compiled.program_of(variant, compiled.mesh.rank(stage, mesh.coordinates(self._rank)[1]))
        if mesh.dp_rank(self._rank):  # another replica in the same process may have it
            program = replace(program, graph_module=_fresh(program.graph_module))
        left = program
        if self.trainer is not None:
            left = share_weights(self.trainer.programs[stage], program)
            lost = next((shard.source for shard in left.param_shards.values() if not shard.is_buffer), None)
            if lost is not None and not variant.trains:
                raise AutodistError(
                    f"the graph that evaluates has {lost} otherwise on its ranks than the one that trains: pin the "
                    "roles of its linears"
                )
        if left.param_shards:
            buffers = compiled.buffers | dict(variant.traced.graph_module.named_buffers(remove_duplicate=False))
            source = self.options.open_weights()
            try:
                load_program(
                    self.options.model, source, buffers, left, device=self._device, requires_grad=None
                )
            finally:
                source.close()
        program.graph_module.train(variant.trains)
        return program


def _names(model: PreTrainedModel) -> dict[str, str]:
    """Return the first name of each parameter, as named_parameters() has it, by every name that it has."""
    first = {id(p): name for name, p in model.named_parameters()}
    return {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}


def _fresh(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a copy of a rank's module whose parameters are on meta."""
    empty = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, dict(empty))


class Host(Protocol):
    """The ranks that an engine has in this process."""

    mesh: Mesh
    ranks: tuple[int, ...]  # those in this process
    options: ShareOptions  # of every rank
    open_weights: Callable[[], WeightSource]  # that training started from

    def settle(self, recompute: str) -> None:
        """Decide what "auto" left open, before the first programs are taken."""

    def call(self, name: str, arguments: Mapping[str, Any], work: Callable[[], T]) -> T:
        """Return `work()`, which all ranks do alike, given the same arguments; what one raises all raise."""

    def together(self, work: Callable[[], tuple[T, Facts]], check: Callable[[T], None] | None) -> T:
        """Return what `work` gives beside its facts, when all ranks have the same; `check` runs once for all."""

    def take(self, compiled: Compilation, variant: Variant, stages_of: Callable[[int], Sequence[int]]) -> None:
        """Load the programs of a variant; `stages_of` says which stages a pipeline rank has."""

    def step(self, schedule: Schedule, parts: Sequence[Sequence[Part]]) -> StepTotals:
        """Run one step; `parts[d]` are the microbatches of replica d."""

    def forward(self, schedule: Schedule, part: Part) -> dict[str, Any]:
        """Return the flat outputs of a part, which each replica runs."""

    def by_hand(self, part: Part) -> torch.Tensor:
        """Return the loss of a part, for loss.backward() on all ranks of one stage and one replica."""

    def each(self, work: Work[T]) -> list[T]:
        """Return what `work` gives on each rank that is in this process; all ranks run it."""


class SimulatedHost:
    """All ranks, a thread each."""

    def __init__(self, options: ShareOptions) -> None:
        self.mesh, self.ranks = options.mesh, tuple(range(options.mesh.size))
        self.options, self.open_weights = options, options.open_weights
        self._shares = [RankShare(rank, torch.device("cpu"), options) for rank in range(self.mesh.size)]

    def settle(self, recompute: str) -> None:
        self.options = replace(self.options, recompute=recompute)
        for share in self._shares:
            share.options = self.options

    def call(self, name: str, arguments: Mapping[str, Any], work: Callable[[], T]) -> T:
        return work()

    def together(self, work: Callable[[], tuple[T, Facts]], check: Callable[[T], None] | None) -> T:
        value, _ = work()
        if check is not None:
            check(value)
        return value

    def take(self, compiled: Compilation, variant: Variant, stages_of: Callable[[int], Sequence[int]]) -> None:
        for rank, share in reversed(list(enumerate(self._shares))):  # replica 0, whose modules are copied, comes last
            share.take(compiled, variant, stages_of(self.mesh.coordinates(rank)[0]))

    def step(self, schedule: Schedule, parts: Sequence[Sequence[Part]]) -> StepTotals:
        def work(trainer: RankTrainer, communicator: TrainingCommunicator) -> StepTotals:
            own = self._shares[trainer.rank]
            mine = [own.microbatch(part) for part in parts[self.mesh.dp_rank(trainer.rank)]]
            return trainer.step(communicator, schedule, mine)

        return self.each(work)[0]

    def forward(self, schedule: Schedule, part: Part) -> dict[str, Any]:
        return self.each(lambda trainer, comm: self._shares[trainer.rank].forward(comm, schedule, part))[0]

    def by_hand(self, part: Part) -> torch.Tensor:
        raise AutodistError("simulated ranks run a step at a time: use engine.step, or start the ranks as processes")

    def each(self, work: Work[T]) -> list[T]:
        return ThreadWorld(self.mesh).run(lambda rank, communicator: work(_trainer(self._shares[rank]), communicator))


class ProcessHost:
    """The one rank that this process is."""

    def __init__(self, joined: JoinedRank, options: ShareOptions) -> None:
        self.mesh, self._joined = joined.mesh, joined
        self.ranks: tuple[int, ...] = (joined.rank,)
        self.options, self.open_weights = options, options.open_weights
        self._share = RankShare(joined.rank, joined.device, options)
        self._calls = CollectiveCalls(joined.communicator, joined.mesh, joined.rank, joined.device)

    def settle(self, recompute: str) -> None:
        self.options = self._share.options = replace(self.options, recompute=recompute)

    def call(self, name: str, arguments: Mapping[str, Any], work: Callable[[], T]) -> T:
        return self._calls.run(name, lambda: arguments, work)

    def together(self, work: Callable[[], tuple[T, Facts]], check: Callable[[T], None] | None) -> T:
        return self._joined.together(work, check=check)

    def take(self, compiled: Compilation, variant: Variant, stages_of: Callable[[int], Sequence[int]]) -> None:
        def load() -> tuple[None, Facts]:
            stage = self.mesh.coordinates(self._joined.rank)[0]
            programs = self._share.take(compiled, variant, stages_of(stage))
            facts: dict[str, str] = {}
            for program in programs.values():
                facts |= shared_weight_facts(variant.plan, program)
                if self.options.recompute != NONE:
                    facts[f"collectives of stage {program.stage}'s layers"] = collectives_of(program.graph_module)
            return None, facts

        self._joined.together(load)

    def step(self, schedule: Schedule, parts: Sequence[Sequence[Part]]) -> StepTotals:
        def work(trainer: RankTrainer, communicator: TrainingCommunicator) -> StepTotals:
            mine = [self._share.microbatch(part) for part in parts[self.mesh.dp_rank(trainer.rank)]]
            return trainer.step(communicator, schedule, mine)

        return self.each(work)[0]

    def forward(self, schedule: Schedule, part: Part) -> dict[str, Any]:
        return self._share.forward(self._joined.communicator, schedule, part)

    def by_hand(self, part: Part) -> torch.Tensor:
        return self._share.by_hand(self._joined.communicator, part)

    def each(self, work: Work[T]) -> list[T]:
        return [work(_trainer(self._share), self._joined.communicator)]


def _trainer(share: RankShare) -> RankTrainer:
    assert share.trainer is not None, "a rank's programs are taken before it works"
    return share.trainer
