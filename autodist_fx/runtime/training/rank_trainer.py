"""`RankTrainer`: one rank's share of a model in training, over any communicator."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.fx
from torch import nn

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import over
from autodist_fx.runtime.comm.channels import Channel
from autodist_fx.runtime.training.autograd.recompute import NONE, with_recomputed_layers
from autodist_fx.runtime.training.flat_weights import FlatWeights, Range
from autodist_fx.runtime.training.gradient_buckets import GradientBuckets
from autodist_fx.runtime.training.gradient_sums import Gradients, Slices, pay_sums_of
from autodist_fx.runtime.training.norm import clip, counted_places, sum_of_squares, wanted_in_parts
from autodist_fx.runtime.training.optimizer import OptimizerFactory, SchedulerFactory, ShardOptimizer, wants_master
from autodist_fx.runtime.training.posted_receives import PostedReceives, arrival, stage_values
from autodist_fx.runtime.training.replica_communicator import (
    Letters,
    ReplicaCommunicator,
    TrainingCommunicator,
    runs_on,
)
from autodist_fx.runtime.training.stage import Microbatch, StagePasses
from autodist_fx.runtime.training.totals import total
from cost_model.mesh import Mesh
from cost_model.schedule.messages import Message, Receive, Step, rendezvous_order
from cost_model.schedule.schedule import Action, ActionKind, Schedule
from passes.program.param_shard import ParamShard
from passes.program.rank_program import RankProgram


@dataclass(frozen=True, slots=True)
class StepTotals:
    """The numbers of one step, alike on all ranks: the loss of the whole batch, and the norm of its gradient before
    clipping."""

    loss: float
    grad_norm: float


class RankTrainer:
    """Rank `rank` of `mesh`, with the programs of the stages that it has, weights loaded; these are stepped in place.

    `names`: the model's name of each parameter, by any name that it has there. `max_grad_norm` None: gradients are
    not clipped. `zero_stage` 1: optimizer states are held once over the replicas. `master_weights`: parameters of
    16 bits are stepped in float32, in which their gradients are added up, too. `recompute`: a key of RECOMPUTE.
    Raises what making the optimizer raises.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        programs: Mapping[int, RankProgram],
        names: Mapping[str, str],
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        max_grad_norm: float | None = None,
        zero_stage: int = 0,
        master_weights: bool = True,
        recompute: str = NONE,
    ) -> None:
        self.mesh, self.rank, self.programs = mesh, rank, dict(programs)
        self._names, self._max_grad_norm = names, max_grad_norm
        self.zero_stage = zero_stage if mesh.dp > 1 else 0  # one replica holds everything, however it is asked
        self._recompute, self._graphs = recompute, dict[int, tuple[RankProgram, torch.fx.GraphModule]]()
        self.idle_seconds = 0.0  # in the last step
        self._order: tuple[object, Sequence[Sequence[Step]], object] | None = None
        self._places = {stage: counted_places(program) for stage, program in self.programs.items()}
        self._dtype_of = _float32_for_16_bits if master_weights else _own_dtype
        trained = {stage: [p for _, p in _trained(program)] for stage, program in self.programs.items()}
        self._scattered = {  # by stage, by path: gradients of which this rank has the part that it steps
            stage: wanted_in_parts(program, self._places[stage]) if self.zero_stage else set()
            for stage, program in self.programs.items()
        }
        self._gradients = {stage: self._buckets(stage, own) for stage, own in trained.items()}
        self._flat: FlatWeights | None = None
        if self.zero_stage:
            self._flat = FlatWeights([members for own in self._gradients.values() for members in own.members], mesh.dp)
        named = [
            (names[program.param_shards[path].source], parameter)
            for program in self.programs.values()
            for path, parameter in _trained(program)
        ]
        self.optimizer = ShardOptimizer(
            named, optimizer, scheduler, range_of=self._own_range if self._flat else None, masters=master_weights
        )

    def step(
        self, communicator: TrainingCommunicator, schedule: Schedule, microbatches: Sequence[Microbatch]
    ) -> StepTotals:
        """Run the rank's actions, and step its parameters. Called on all ranks alike, each with the microbatches of its
        replica.

        Raises AutodistError, on the rank that finds it, for a microbatch whose programs do not share parameters and
        sums with the first ones; on all ranks for a loss or a gradient that is not finite. Nothing is stepped then.
        """
        for microbatch in microbatches:
            self.check_alike(microbatch)
        dp_rank, pp_rank = self.mesh.dp_rank(self.rank), self.mesh.coordinates(self.rank)[0]
        owner = runs_on(self.mesh, schedule.stage_ranks, dp_rank)
        posted = PostedReceives(communicator)
        passes = self._begin(communicator, owner, posted)
        last = {schedule.last_gradients(stage) for stage in passes}
        sends = 0  # of the action before
        for step in self._steps(schedule, microbatches)[pp_rank]:
            if isinstance(step, Receive):
                self._post(posted, step.message, microbatches, passes, owner)
            elif isinstance(step, Action):
                communicator.finish_sends(keep=sends)  # what the last action sent may be on its way during this one
                before = communicator.unfinished_sends
                _run(passes[step.stage], step, microbatches, is_last=step in last)
                sends = communicator.unfinished_sends - before
        gradients = [self._whole(stage, communicator) for stage in self.programs]
        pay_sums_of(list(self.programs.values()), gradients, communicator, owner, self._dtype_of)
        loss = sum(each.loss for each in passes.values())
        self.idle_seconds = posted.waited_seconds
        totals = self._totals(communicator, loss, gradients)
        self._update(gradients, totals)
        if self._flat is not None:
            self._flat.gather(communicator)
        communicator.finish_sends()
        return totals

    def _buckets(self, stage: int, trained: Sequence[nn.Parameter]) -> GradientBuckets:
        module = self.programs[stage].graph_module
        scattered = {id(module.get_parameter(path)) for path in self._scattered[stage]}
        return GradientBuckets(trained, self._dtype_of, scattered=scattered, replicas=self.mesh.dp)

    def range_of(self, parameter: nn.Parameter, dp_rank: int) -> Range:
        """Return which elements of a parameter, flat, a replica steps."""
        return (0, parameter.numel()) if self._flat is None else self._flat.range_of(parameter, dp_rank)

    def _own_range(self, parameter: nn.Parameter) -> Range:
        return self.range_of(parameter, self.mesh.dp_rank(self.rank))

    def shards(self) -> list[tuple[ParamShard, nn.Parameter]]:
        """Return what this rank holds of the model's parameters, each tensor once, with the model's names as their
        sources."""
        held = [
            (program.param_shards[path], parameter)
            for program in self.programs.values()
            for path, parameter in program.graph_module.named_parameters()
        ]
        return [(replace(shard, source=self._names[shard.source]), parameter) for shard, parameter in held]

    def _steps(self, schedule: Schedule, microbatches: Sequence[Microbatch]) -> Sequence[Sequence[Step]]:
        """Return each pipeline rank's actions and where its receives are posted, kept for steps of the same kind."""
        key = schedule, tuple(id(microbatch.hops) for microbatch in microbatches)
        if self._order is None or self._order[0] != key:
            values = {id(m.hops): stage_values(m.hops, m.programs) for m in microbatches}
            steps = rendezvous_order(schedule, [values[id(m.hops)] for m in microbatches])
            self._order = key, steps, [m.hops for m in microbatches]  # kept, so that their ids stay theirs
        return self._order[1]

    def _post(
        self,
        posted: PostedReceives,
        message: Message,
        microbatches: Sequence[Microbatch],
        passes: Mapping[int, StagePasses],
        owner: Callable[[int], int],
    ) -> None:
        """Post the receive of a message, of which this rank has the stage that receives it."""
        microbatch, channel = microbatches[message.microbatch], message.value.channel
        program = microbatch.programs[message.receiver]
        source = program.mesh.rank(message.sender, program.tp_rank)
        if message.backward:
            x = passes[message.receiver].sent(message.microbatch, channel)
            posted.post(x.shape, x.dtype, x.device, owner(source), Channel.GRADIENTS + channel)
        else:
            inputs = microbatch.inputs_of(message.receiver)
            posted.post(*arrival(program, source, channel, inputs), owner(source), channel)

    def _begin(
        self, communicator: TrainingCommunicator, owner: Callable[[int], int], posted: PostedReceives
    ) -> dict[int, StagePasses]:
        letters: Letters = {}
        passes = {}
        for stage, program in self.programs.items():
            self._gradients[stage].begin()
            own = ReplicaCommunicator(communicator, self.rank, program.rank, owner, letters, posted)
            passes[stage] = StagePasses(stage, own, communicator, self._gradients[stage], self._graph_of)
        return passes

    def _graph_of(self, program: RankProgram) -> torch.fx.GraphModule:
        """Return the graph that a program is run by, made at its first run."""
        if self._recompute == NONE:
            return program.graph_module
        if id(program) not in self._graphs:
            self._graphs[id(program)] = program, with_recomputed_layers(program.graph_module)
        return self._graphs[id(program)][1]

    def check_alike(self, microbatch: Microbatch) -> None:
        """Raise AutodistError for programs of a microbatch that owe other sums than the first ones, or hold other
        slices: their gradients could not be added up."""
        for stage, program in microbatch.programs.items():
            first = self.programs[stage]
            if program is first:
                continue
            held = {id(p) for p in first.graph_module.parameters()}
            other = next((n for n, p in program.graph_module.named_parameters() if id(p) not in held), None)
            if other is not None or program.grad_sums != first.grad_sums:
                what = other or "the sums of its gradients"
                raise AutodistError(
                    f"the graph for a microbatch of these inputs has {what} otherwise on its ranks than the first "
                    "one, and is not trained along with it: give batches of one kind (same inputs, same options), "
                    "or pin the roles of its linears"
                )

    def _whole(self, stage: int, communicator: TrainingCommunicator) -> Gradients:
        found = self._gradients[stage].whole(communicator)
        return {path: found[id(p)] for path, p in _trained(self.programs[stage]) if id(p) in found}

    def _totals(self, communicator: TrainingCommunicator, loss: float, gradients: Sequence[Gradients]) -> StepTotals:
        """Return loss and norm of all ranks: of the ranks of a tp group, which have the same, the first one's loss; the
        norm is that of one replica."""
        squares = 0.0
        for stage, own in zip(self.programs, gradients, strict=True):
            counted: dict[str, Sequence[Slices]] = {}
            for path, places in self._places[stage].items():
                if path in self._scattered[stage]:
                    counted[path] = [()] * bool(places)  # of the part that this rank has
                elif self.mesh.dp_rank(self.rank) == 0:
                    counted[path] = places
            squares += sum_of_squares({path: self._known(stage, path, g) for path, g in own.items()}, counted)
        mine = loss if self.mesh.coordinates(self.rank)[1] == 0 else 0.0
        began = time.perf_counter()
        loss, squares = total(communicator, self.mesh, self.rank, (mine, squares))
        self.idle_seconds += time.perf_counter() - began  # until the last of all ranks is here
        if not math.isfinite(loss) or not math.isfinite(squares):
            what = f"the loss is {loss}" if not math.isfinite(loss) else "the norm of the gradients is not finite"
            first = self._first_not_finite(communicator, gradients)
            raise AutodistError(
                f"{what}{first}: nothing was stepped. Lower the learning rate, clip gradients, or look at this batch"
            )
        return StepTotals(loss, math.sqrt(squares))

    def _known(self, stage: int, path: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return what this rank knows of a gradient, whole or, flat, the part that it steps."""
        if path not in self._scattered[stage]:
            return gradient
        start, stop = self._own_range(self.programs[stage].graph_module.get_parameter(path))
        return gradient.reshape(-1)[start:stop]

    def _first_not_finite(self, communicator: TrainingCommunicator, gradients: Sequence[Gradients]) -> str:
        """Say which parameter, of those of all ranks in the model's order, is the first that is not finite; else which
        gradient is. Called on all ranks alike."""
        wrong = [("", shard.source) for shard, p in self.shards() if not bool(p.isfinite().all())]
        for (stage, program), own in zip(self.programs.items(), gradients, strict=True):
            known = {path: self._known(stage, path, g) for path, g in own.items()}
            names = ((self._names[program.param_shards[path].source], g) for path, g in known.items())
            wrong += [("the gradient of ", name) for name, g in names if not bool(g.isfinite().all())]
        told = over(communicator, self.rank, self.mesh.size)(json.dumps(wrong))
        order = {name: number for number, name in enumerate(self._names)}
        found = [(kind, order[name], name) for text in told for kind, name in json.loads(text)]
        kind, _, name = min(found, default=("", 0, ""))
        return f" ({kind}{name} is not finite)" if name else ""

    def _update(self, gradients: Sequence[Gradients], totals: StepTotals) -> None:
        if self._max_grad_norm is not None:
            clip([g for own in gradients for g in own.values()], totals.grad_norm, self._max_grad_norm)
        self.optimizer.step(
            {
                id(program.graph_module.get_parameter(path)): gradient
                for program, own in zip(self.programs.values(), gradients, strict=True)
                for path, gradient in own.items()
            }
        )


def _run(passes: StagePasses, action: Action, microbatches: Sequence[Microbatch], *, is_last: bool) -> None:
    """Run an action; after the last one that gives gradients, these are summed over dp."""
    number = action.microbatch
    if action.kind is ActionKind.FORWARD:
        passes.forward(number, microbatches[number])
    elif action.kind is ActionKind.BACKWARD:
        passes.backward(number, is_last=is_last)
    elif action.kind is ActionKind.BACKWARD_INPUT:
        passes.backward_input(number)
    else:
        passes.backward_weight(number, is_last=is_last)


def _own_dtype(parameter: torch.Tensor) -> torch.dtype:
    return parameter.dtype


def _float32_for_16_bits(parameter: torch.Tensor) -> torch.dtype:
    return torch.float32 if wants_master(parameter.dtype) else parameter.dtype


def _trained(program: RankProgram) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a program that want gradients, each tensor once, by its first path."""
    return [(path, p) for path, p in program.graph_module.named_parameters() if p.requires_grad]
