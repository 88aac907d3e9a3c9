"""`Engine`: trains a model split over a mesh, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from autodist_fx.compiler.torch_state import refuse_ambient
from autodist_fx.compiler.variant import Variant
from autodist_fx.runtime.comm.agreement import digest
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.training.gathered import TrainingState, gathered
from autodist_fx.training.hosts import Host, Part
from autodist_fx.training.microbatches import Batch, batches_of, deal, rows_of
from autodist_fx.training.programs import ReadBatch, TrainingPrograms, loss_inputs
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.write_json import plan_to_text
from cost_model.schedule.schedule import Schedule
from passes.ops.random import RANDOM_STATE, random_state


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step: `step` counts from 1; `loss` is the whole batch's, `grad_norm` its gradient's before
    clipping. Alike on all ranks."""

    step: int
    loss: float
    grad_norm: float


class Engine:
    """A model in training over a mesh; `autodist_fx.train` makes it.

    The model is split at the first step, for the inputs that it gets. Over processes every method is called on all
    ranks alike.
    """

    def __init__(
        self,
        host: Host,
        programs: TrainingPrograms,
        *,
        schedule: str,
        microbatches: int,
        stages_per_rank: int | None,
        verify: bool,
        seed: int,
    ) -> None:
        self._host, self._programs, self._verify, self._seed = host, programs, verify, seed
        self._schedule, self._microbatches, self._stages_per_rank = schedule, microbatches, stages_per_rank
        self._taken: list[Variant] = []
        self._proven: set[tuple[int, ...]] = set()  # ids of the variants of a replica's microbatches
        self._steps = 0

    @property
    def mesh(self) -> Mesh:
        """The mesh: tp, pp and dp."""
        return self._host.mesh

    @property
    def plan(self) -> PartitionPlan:
        """The plan of one replica, for the first step's inputs. Raises AutodistError before the first step."""
        return self._programs.compiled.plan

    def schedule(self, batches: int = 1) -> Schedule:
        """Return the schedule of a step over so many batches. Raises ScheduleError for a number of microbatches that
        it cannot have."""
        count = batches * self._microbatches
        return make_schedule(self._schedule, self.mesh.pp, count, self._stages_per_rank)

    def step(self, batch: Batch | Sequence[Batch]) -> StepResult:
        """Train on a batch: forward, backward, clipping, and one step of the optimizer.

        batch: the whole batch, its inputs by name as the model's forward takes them, what it computes a loss from among
            them; its rows are dealt to the replicas and their microbatches. Or a list of batches, whose lengths may
            differ, that this step accumulates.

        The loss and the gradient are those of one process that has all rows at once: means over labels are over all
        that count, of all microbatches, replicas and batches. What is no mean or sum over rows (losses that balance a
        router's experts) is averaged over microbatches, as transformers' Trainer averages over the batches that it
        accumulates. Raises AutodistError, on all ranks: for inputs that the model does not take, for fewer rows than
        microbatches, and for a loss or gradient that is not finite. No parameter has changed then.
        """
        return self._host.call("step", {"batch": batch}, lambda: self._step(batches_of(batch)))

    def gather(self) -> TrainingState:
        """Return the whole model's parameters, but those that nothing of the loss is computed from, and optimizer
        states, by the names of named_parameters(), on the CPU of every rank.

        For checks, and for models that are small: it takes the memory of the whole model. Raises AutodistError before
        the first step.
        """
        self._programs.compiled  # noqa: B018  (raises before the first step)
        return self._host.call("gather", {}, lambda: self._host.each(gathered)[0])

    def _step(self, batches: Sequence[Batch]) -> StepResult:
        refuse_ambient("a training step")
        schedule = self.schedule(len(batches))
        replicas: list[list[ReadBatch]] = [[] for _ in range(self.mesh.dp)]
        drawn: list[list[dict[str, torch.Tensor]]] = [[] for _ in range(self.mesh.dp)]  # what random ops go by
        first_row = 0
        for batch in batches:
            specs = self._programs.read(batch).specs
            for replica, dealt in enumerate(deal(batch, specs, self.mesh.dp, self._microbatches)):
                replicas[replica] += [self._programs.read(part) for part in dealt]
                for part in dealt:
                    drawn[replica].append({RANDOM_STATE: random_state(self._seed, self._steps, first_row)})
                    first_row += rows_of(part, specs)
        found = [[(self._variant_for(each, schedule), each.call.tensors) for each in own] for own in replicas]
        self._prove(schedule, [[variant for variant, _ in own] for own in found])
        divisors = loss_inputs([each for own in found for each in own])
        parts = [
            [Part({**inputs, **divisors, **state}, variant) for (variant, inputs), state in zip(*both, strict=True)]
            for both in zip(found, drawn, strict=True)
        ]
        totals = self._host.step(schedule, parts)
        self._steps += 1
        return StepResult(self._steps, totals.loss, totals.grad_norm)

    def _prove(self, schedule: Schedule, replicas: Sequence[Sequence[Variant]]) -> None:
        """Prove, before the first step whose microbatches these variants run, that no rank waits for ever."""
        new = {tuple(map(id, own)): own for own in replicas if tuple(map(id, own)) not in self._proven}
        if self._verify and new:
            self._host.together(
                lambda: (new.values(), {}),
                lambda each: self._programs.verify_schedule(each, schedule),
            )
            self._proven.update(new)

    def _variant_for(self, batch: ReadBatch, schedule: Schedule) -> Variant:
        """Return the variant for a microbatch; where it is new, made, proven and loaded by all ranks together."""
        if self._programs.is_known(batch):
            variant = self._programs.variant_for(batch)
            if any(variant is known for known in self._taken):
                return variant

        def made() -> tuple[Variant, dict[str, str]]:
            with torch.random.fork_rng(devices=()):  # whatever a trace draws
                variant = self._programs.variant_for(batch)
            return variant, {"the plan": digest(plan_to_text(variant.plan))}

        variant = self._host.together(made, self._programs.verify if self._verify else None)
        self._host.take(self._programs.compiled, variant, schedule.stages_of)
        self._taken.append(variant)
        return variant
