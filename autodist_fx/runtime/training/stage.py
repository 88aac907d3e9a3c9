"""`StagePasses`: runs the passes of one stage over a step's microbatches, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.table_checks import lookups_checked
from autodist_fx.runtime.training.autograd.sparse_lookups import SparseLookups
from autodist_fx.runtime.training.autograd.split_backward import WeightGradients
from autodist_fx.runtime.training.backward import go_back, go_back_to_inputs
from autodist_fx.runtime.training.gradient_buckets import GradientBuckets
from autodist_fx.runtime.training.replica_communicator import ReplicaCommunicator, TrainingCommunicator
from cost_model.plan.data import Hop
from passes.ops.comm import Tape, using
from passes.program.rank_program import RankProgram

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A part of a step's batch: the inputs of the graphs by name, this rank's programs for them, by stage, and what
    stages send to each other, by the plan of these programs.

    The programs of all microbatches of a step share their parameters.
    """

    inputs: Mapping[str, Any]
    programs: Mapping[int, RankProgram]
    hops: Sequence[Hop]

    def inputs_of(self, stage: int) -> dict[str, Any]:
        """Return the inputs of a stage's program."""
        return {name: self.inputs[name] for name in self.programs[stage].input_names if name in self.inputs}


@dataclass(slots=True)
class _Pass:
    """A forward pass, as the backward pass finds it."""

    parameters: tuple[nn.Parameter, ...]  # that want gradients
    tape: Tape
    loss: torch.Tensor | None


class StagePasses:
    """One stage in one step. `graph_of` gives the graph that a program is run by. `loss` is the sum of what its
    microbatches gave; 0 where it gives none."""

    def __init__(
        self,
        stage: int,
        communicator: ReplicaCommunicator,
        replicas: TrainingCommunicator,
        gradients: GradientBuckets,
        graph_of: Callable[[RankProgram], torch.fx.GraphModule],
    ) -> None:
        self._stage, self._communicator, self._replicas = stage, communicator, replicas
        self._gradients, self._graph_of = gradients, graph_of
        self._passes: dict[int, _Pass] = {}
        self._left: dict[int, tuple[Sequence[nn.Parameter], WeightGradients]] = {}
        self.loss = 0.0

    def forward(self, number: int, microbatch: Microbatch) -> None:
        """Run the forward pass of the microbatch that has this number. Raises AutodistError for a loss that has several
        elements, or that depends on no parameter; OutOfTableError for an id outside the table it is for."""
        program, tape = microbatch.programs[self._stage], Tape()
        inputs = microbatch.inputs_of(self._stage)
        graph = program.graph_module
        with lookups_checked(graph, inputs), using(self._communicator, tape), torch.enable_grad(), SparseLookups():
            loss = self._graph_of(program)(**inputs).get(LOSS)
        if loss is not None and loss.numel() != 1:
            raise AutodistError(f"the loss has {loss.numel()} elements: a model is trained by one number")
        if loss is not None and not loss.requires_grad:
            raise AutodistError("the loss depends on no parameter that wants a gradient: all of them are frozen")
        parameters = tuple(p for p in program.graph_module.parameters() if p.requires_grad)
        self._passes[number] = _Pass(parameters, tape, loss)

    def sent(self, number: int, channel: int) -> torch.Tensor:
        """Return what the forward pass of a microbatch sent on a channel, and whose gradient comes back."""
        return next(x for x, _, sent_on in self._passes[number].tape.sent if sent_on == channel)

    def backward(self, number: int, *, is_last: bool) -> None:
        """Run the backward pass of a microbatch, whose forward pass has run; the gradients of the last one are summed
        over dp as they come."""
        passed = self._take(number)
        with self._gradients.taking(self._replicas if is_last else None):
            self._add(passed.parameters, go_back(passed.tape, self._communicator, passed.loss, passed.parameters))

    def backward_input(self, number: int) -> None:
        """Run the part of the backward pass that other ranks wait for."""
        passed = self._take(number)
        left = go_back_to_inputs(passed.tape, self._communicator, passed.loss, passed.parameters)
        self._left[number] = passed.parameters, left

    def backward_weight(self, number: int, *, is_last: bool) -> None:
        """Run the rest of a backward pass, which gives the gradients of parameters; `is_last` as for a whole one."""
        parameters, left = self._left.pop(number)
        with self._gradients.taking(self._replicas if is_last else None):
            self._add(parameters, left.finish())

    def _take(self, number: int) -> _Pass:
        passed = self._passes.pop(number)
        if passed.loss is not None:
            self.loss += float(passed.loss.detach())
        return passed

    def _add(self, parameters: Sequence[nn.Parameter], found: Sequence[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None and not self._gradients.took(parameter):
                self._gradients.add(parameter, gradient)
