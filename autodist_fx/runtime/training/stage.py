"""`StagePasses`: runs the passes of one stage over a step's microbatches, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autodist_fx.errors import AutodistError
from autodist_fx.runtime.training.backward import go_back
from autodist_fx.runtime.training.gradient_buckets import GradientBuckets
from autodist_fx.runtime.training.replica_communicator import ReplicaCommunicator, TrainingCommunicator
from passes.ops.comm import Tape, using
from passes.program.rank_program import RankProgram

LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Microbatch:
    """A part of a step's batch: the inputs of the graphs by name, and this rank's programs for them, by stage.

    The programs of all microbatches of a step share their parameters.
    """

    inputs: Mapping[str, Any]
    programs: Mapping[int, RankProgram]


@dataclass(slots=True)
class _Pass:
    """A forward pass, as the backward pass finds it."""

    program: RankProgram
    tape: Tape
    loss: torch.Tensor | None


class StagePasses:
    """One stage in one step. `loss` is the sum of what its microbatches gave; 0 where it gives none."""

    def __init__(
        self,
        stage: int,
        communicator: ReplicaCommunicator,
        replicas: TrainingCommunicator,
        gradients: GradientBuckets,
    ) -> None:
        self._stage, self._communicator, self._replicas = stage, communicator, replicas
        self._gradients = gradients
        self._passes: dict[int, _Pass] = {}
        self.loss = 0.0

    def forward(self, number: int, microbatch: Microbatch) -> None:
        """Run the forward pass of the microbatch that has this number. Raises AutodistError for a loss that has several
        elements, or that depends on no parameter."""
        program, tape = microbatch.programs[self._stage], Tape()
        inputs = {name: microbatch.inputs[name] for name in program.input_names if name in microbatch.inputs}
        with using(self._communicator, tape), torch.enable_grad():
            loss = program.graph_module(**inputs).get(LOSS)
        if loss is not None and loss.numel() != 1:
            raise AutodistError(f"the loss has {loss.numel()} elements: a model is trained by one number")
        if loss is not None and not loss.requires_grad:
            raise AutodistError("the loss depends on no parameter that wants a gradient: all of them are frozen")
        self._passes[number] = _Pass(program, tape, loss)

    def backward(self, number: int, *, is_last: bool) -> None:
        """Run the backward pass of a microbatch, whose forward pass has run; the gradients of the last one are summed
        over dp as they come."""
        passed = self._passes.pop(number)
        if passed.loss is not None:
            self.loss += float(passed.loss.detach())
        parameters = [p for p in passed.program.graph_module.parameters() if p.requires_grad]
        if is_last:
            with self._gradients.last(self._replicas):
                self._go_back(passed, parameters)
        else:
            self._go_back(passed, parameters)

    def _go_back(self, passed: _Pass, parameters: list[torch.nn.Parameter]) -> None:
        found = go_back(passed.tape, self._communicator, passed.loss, parameters)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None and not self._gradients.took(parameter):
                self._gradients.add(parameter, gradient)
