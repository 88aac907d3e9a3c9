"""`Engine`: trains a model split over a mesh, step by step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autodist_fx.artifact.manifest import library_versions
from autodist_fx.calls.outputs import CallOutput, returned
from autodist_fx.compiler.torch_state import refuse_ambient
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.comm.agreement import Facts, digest
from autodist_fx.runtime.training.autograd.recompute import AUTO, LAYERS, NONE
from autodist_fx.runtime.training.optimizer import wants_master
from autodist_fx.runtime.training.rank_trainer import RankTrainer
from autodist_fx.runtime.training.replica_communicator import TrainingCommunicator
from autodist_fx.runtime.training.schedules import make_schedule
from autodist_fx.runtime.training.stage import LOSS
from autodist_fx.training.by_hand import RankModel
from autodist_fx.training.checkpoint.directory import latest
from autodist_fx.training.checkpoint.manifest import Head
from autodist_fx.training.checkpoint.read import SavedRun
from autodist_fx.training.checkpoint.save import begin_save, save_in_background, save_now
from autodist_fx.training.checkpoint.write import BackgroundWrite
from autodist_fx.training.gathered import TrainingState, gathered
from autodist_fx.training.hosts import Host, Part
from autodist_fx.training.microbatches import Batch, batches_of, deal, rows_of
from autodist_fx.training.pretrained import PretrainedWriter
from autodist_fx.training.programs import ReadBatch, TrainingPrograms, loss_inputs
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.plan.write_json import plan_to_text
from cost_model.schedule.schedule import Schedule
from cost_model.training.estimate import StepEstimate, StepSetup
from passes.ops.random import RANDOM_STATE, random_state


@dataclass(frozen=True, slots=True)
class StepResult:
    """The result of a step: `step` counts from 1; `loss` is the whole batch's, `grad_norm` its gradient's before
    clipping. Alike on all ranks."""

    step: int
    loss: float
    grad_norm: float


@dataclass(frozen=True, slots=True)
class Resumed:
    """The place that a run goes on from: the steps taken so far, and the `data` that was saved along with them."""

    step: int
    data: Any


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
        self._calls_by_hand = 0
        self._evaluation: TrainingPrograms | None = None
        self._saved: SavedRun | None = None  # to go on from, when the model is split
        self._writing: BackgroundWrite | None = None

    @property
    def mesh(self) -> Mesh:
        """The mesh: tp, pp and dp."""
        return self._host.mesh

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that are in this process: one, or all that are simulated."""
        return self._host.ranks

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

    def model_for(self, batch: Batch) -> RankModel:
        """Return this rank's module, for training by hand where tp alone splits the model: it is called with a batch,
        then `loss.backward()`, and torch.optim steps its parameters, on all ranks alike.

        batch: one as it will be trained with; the model is split for its inputs. The engine's own optimizer, clipping
        and schedule play no part; `evaluate`, `gather` and `save_pretrained` see the same weights. Raises AutodistError
        with pp or dp, and where ranks are simulated: use `step` there.
        """
        if self.mesh.size > self.mesh.tp:
            raise AutodistError(
                f"loss.backward() by hand goes back through one stage of one replica, and this mesh is {self.mesh}: "
                "use engine.step, which runs the schedule of all of them"
            )
        self._host.call("model_for", {"batch": batch}, lambda: self._by_hand(batch))
        graph = self._host.each(lambda trainer, _: trainer.programs[0].graph_module)[0]

        def call(given: Batch) -> Any:
            self._calls_by_hand += 1
            return self._host.call("the model", {"batch": given}, lambda: self._by_hand(given))

        return RankModel(graph, call)

    def evaluate(self, batch: Batch) -> CallOutput | tuple[Any, ...]:
        """Return what the model in evaluation mode returns for a batch: its loss (of this batch), logits and the rest,
        whole, on all ranks; a tuple with return_dict=False. Nothing changes. Each replica runs the whole batch.

        Raises AutodistError: for inputs that the model does not take, and before the first step for a batch without
        labels, since the model is split for training first.
        """
        return self._host.call("evaluate", {"batch": batch}, lambda: self._evaluate(batch))

    def estimate(self, batch: Batch) -> StepEstimate:
        """Predict a step with AdamW on a batch: seconds, the schedule's timeline, and bytes on each pipeline rank.

        Raises AutodistError before the first step, which splits the model.
        """
        self._programs.compiled  # noqa: B018  (raises before the first step)
        read = self._programs.read(batch)
        part = deal(batch, read.specs, self.mesh.dp, self._microbatches)[0][0]
        return self._estimate(self._programs.read(part), self.schedule(), self._host.options.recompute)

    def _estimate(self, batch: ReadBatch, schedule: Schedule, recompute: str) -> StepEstimate:
        options, dtype = self._host.options, self._programs.model.dtype
        has_masters = options.master_weights and wants_master(dtype)
        setup = StepSetup(self.mesh, schedule, 1, recompute, options.zero_stage, has_masters)
        return self._programs.estimate(batch, setup)

    def gather(self) -> TrainingState:
        """Return the whole model's parameters, but those that nothing of the loss is computed from, and optimizer
        states, by the names of named_parameters(), on the CPU of every rank.

        For checks, and for models that are small: it takes the memory of the whole model. Raises AutodistError before
        the first step.
        """
        self._programs.compiled  # noqa: B018  (raises before the first step)
        return self._host.call("gather", {}, lambda: self._host.each(gathered)[0])

    def optimizer_bytes(self) -> list[int]:
        """Return, of each rank in this process, the bytes of optimizer states, and of the float32 weights that weights
        of 16 bits are rounded from. Raises AutodistError before the first step."""
        self._programs.compiled  # noqa: B018  (raises before the first step)
        return self._host.call(
            "optimizer_bytes", {}, lambda: self._host.each(lambda trainer, _: trainer.optimizer.nbytes)
        )

    def idle_seconds(self) -> float:
        """Return for how long this rank waited in the last step: for what other stages send, and for the last rank's
        end. `estimate(batch).timeline` predicts it. Raises AutodistError before the first step, and where ranks are
        simulated, which take turns."""
        self._programs.compiled  # noqa: B018  (raises before the first step)
        if len(self.ranks) > 1:
            raise AutodistError("simulated ranks take turns in one process: how long one waits says nothing")
        found = self._host.call("idle_seconds", {}, lambda: self._host.each(lambda trainer, _: trainer.idle_seconds))
        return found[0]

    def save(self, directory: str | Path, *, data: Any = None, background: bool = False) -> None:
        """Save the run as `directory`/step-00000030: parameters, optimizer states, learning rates, steps and seed, for
        `load` on any mesh.

        data: what the caller needs to go on, such as the place in its data: anything that JSON holds.
        background: copy everything, return, and let a thread write; the next save, load or `wait_for_save` waits for
            it, and raises what it raised. Saves of several processes are joined by files: all of them see `directory`.

        Each rank writes a part, no element twice. Under this name there is a whole checkpoint or none, whatever is
        killed, and when; what was saved before stays. Raises AutodistError before the first step; CheckpointError, on
        all ranks, where it cannot be written.
        """
        self._programs.compiled  # noqa: B018  (raises before the first step)
        try:
            text = json.dumps(data)
        except (TypeError, ValueError) as error:
            raise AutodistError(f"data is saved as JSON, which cannot hold it: {error}") from error
        self.wait_for_save()
        given = {"directory": str(directory), "data": text, "background": background}
        self._host.call("save", given, lambda: self._save(Path(directory), data, background))

    def wait_for_save(self) -> None:
        """Return when what is saved in the background is there. Raises, on all ranks, what kept one from saving."""
        writing, self._writing = self._writing, None
        if writing is not None:

            def ended() -> tuple[None, Facts]:
                writing.wait()
                return None, {}

            self._host.call("wait_for_save", {}, lambda: self._host.together(ended, None))

    def meet(self) -> None:
        """Return when all ranks have called this."""
        self._host.call("meet", {}, lambda: None)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the model as transformers writes its models, for from_pretrained: config, safetensors and their index,
        under the names that the model has them. A model with one adapter of peft's is written as that adapter alone.

        Each rank writes whole tensors, as many as the others; none has the whole model. Raises AutodistError before the
        first step, and where the directory cannot be written.
        """
        self._programs.compiled  # noqa: B018  (raises before the first step)
        writer = PretrainedWriter(self._programs.model, self._host.open_weights)

        def write(trainer: RankTrainer, communicator: TrainingCommunicator) -> None:
            writer.write(trainer, communicator, Path(directory))

        self._host.call("save_pretrained", {"directory": str(directory)}, lambda: self._host.each(write))

    def load(self, directory: str | Path) -> Resumed:
        """Go on from a saved run, on any mesh, with any number of microbatches: parameters, optimizer states, learning
        rates, steps and seed become those that were saved.

        directory: as `save` was given it, of which the last whole checkpoint is taken; or one checkpoint in it.

        Every file is read and compared with what was written. Raises CheckpointError, on all ranks, where there is
        none, for one of another model, and for a damaged one; AutodistError for another kind of optimizer or scheduler.
        Before the first step, which splits the model, that one raises what is found of the optimizer.
        """
        self.wait_for_save()
        return self._host.call("load", {"directory": str(directory)}, lambda: self._load(Path(directory)))

    def _save(self, directory: Path, data: Any, background: bool) -> None:
        head = Head(
            type(self._programs.model).__name__, str(self.mesh), self._steps, self._seed, None, data, library_versions()
        )
        names = [name for name, _ in self._programs.model.named_parameters()]
        saves = self._host.each(lambda trainer, comm: begin_save(trainer, comm, directory, head, names))
        if background:
            self._writing = save_in_background(saves)
            return
        by_rank = {save.rank: save for save in saves}
        self._host.each(lambda trainer, communicator: save_now(by_rank[trainer.rank], communicator))

    def _load(self, directory: Path) -> Resumed:
        def opened() -> tuple[SavedRun, Facts]:
            saved = SavedRun(latest(directory))
            saved.check_model(self._programs.model, type(self._programs.model).__name__)
            saved.check_files(self._host.ranks, self.mesh.size)
            return saved, {"the saved run": f"{saved.path.name} of step {saved.head.step}"}

        saved = self._host.together(opened, None)
        if self._saved is not None:
            self._saved.close()
        self._saved = saved
        if self._taken:
            self._restore()
        self._steps, self._seed = saved.head.step, saved.head.seed
        return Resumed(saved.head.step, saved.head.data)

    def _restore(self) -> None:
        if self._saved is not None:
            self._host.each(lambda trainer, _: self._saved.restore(trainer))  # type: ignore[union-attr]
            self._saved.close()
            self._saved = None

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
        self._restore()
        self._prove(schedule, [[variant for variant, _ in own] for own in found])
        divisors = loss_inputs([each for own in found for each in own])
        parts = [
            [Part({**inputs, **divisors, **state}, variant) for (variant, inputs), state in zip(*both, strict=True)]
            for both in zip(found, drawn, strict=True)
        ]
        totals = self._host.step(schedule, parts)
        self._steps += 1
        return StepResult(self._steps, totals.loss, totals.grad_norm)

    def _by_hand(self, batch: Batch) -> Any:
        refuse_ambient("a training step")
        read = self._programs.read(batch)
        variant = self._variant_for(read, self.schedule())
        self._restore()
        state = {RANDOM_STATE: random_state(self._seed, self._calls_by_hand, 0)}
        inputs = {**read.call.tensors, **loss_inputs([(variant, read.call.tensors)]), **state}
        return returned(read.call, {LOSS: self._host.by_hand(Part(inputs, variant))}, (LOSS,))

    @torch.no_grad()
    def _evaluate(self, batch: Batch) -> CallOutput | tuple[Any, ...]:
        refuse_ambient("an evaluation")
        schedule = self.schedule()
        if not self._taken:
            self._variant_for(self._programs.read(batch), schedule)
        self._restore()
        if self._evaluation is None:
            self._evaluation = self._programs.for_evaluation()
        read = self._evaluation.read(batch)
        variant = self._variant_for(read, schedule, self._evaluation)
        outputs = self._host.forward(schedule, Part(read.call.tensors, variant))
        return returned(read.call, outputs, variant.output_order)

    def _prove(self, schedule: Schedule, replicas: Sequence[Sequence[Variant]]) -> None:
        """Prove, before the first step whose microbatches these variants run, that no rank waits for ever."""
        new = {tuple(map(id, own)): own for own in replicas if tuple(map(id, own)) not in self._proven}
        if self._verify and new:
            self._host.together(
                lambda: (new.values(), {}),
                lambda each: self._programs.verify_schedule(each, schedule),
            )
            self._proven.update(new)

    def _variant_for(
        self, batch: ReadBatch, schedule: Schedule, programs: TrainingPrograms | None = None
    ) -> Variant:
        """Return the variant for a microbatch; where it is new, made, proven and loaded by all ranks together.
        `programs`: those that train by default."""
        programs = self._programs if programs is None else programs
        if programs.is_known(batch):
            variant = programs.variant_for(batch)
            if any(variant is known for known in self._taken):
                return variant

        def made() -> tuple[Variant, dict[str, str]]:
            with torch.random.fork_rng(devices=()):  # whatever a trace draws
                variant = programs.variant_for(batch)
            return variant, {"the plan": digest(plan_to_text(variant.plan))}

        variant = self._host.together(made, programs.verify if self._verify else None)
        if self._host.options.recompute == AUTO:
            estimate = self._estimate(batch, schedule, NONE)
            self._host.settle(NONE if estimate.memory_bytes <= self._programs.limit() else LAYERS)
        self._host.take(programs.compiled, variant, schedule.stages_of)
        self._taken.append(variant)
        return variant
