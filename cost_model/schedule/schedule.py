"""Schedule: the order in which the ranks of a pipeline run the forward and backward passes of a step's microbatches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from cost_model.errors import ScheduleError


class ActionKind(Enum):
    """A kind of pass; its value is the letter that torch.distributed.pipelining prints for it."""

    FORWARD = "F"
    BACKWARD = "B"  # gradients of inputs and of weights
    BACKWARD_INPUT = "I"  # gradients of a stage's inputs alone: what the stage before waits for
    BACKWARD_WEIGHT = "W"  # gradients of a stage's weights, after BACKWARD_INPUT of the same microbatch

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Action:
    """A pass of one stage over one microbatch; printed as torch prints it, "2F0" is stage 2's forward of microbatch
    0."""

    kind: ActionKind
    stage: int
    microbatch: int

    @property
    def returns_input_gradients(self) -> bool:
        """Returns whether the gradients that earlier stages wait for come of this action."""
        return self.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_INPUT)

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step of training on a pipeline: `actions[r]` are those of pipeline rank r, in order.

    `stage_ranks[s]` is the pipeline rank that has stage s; a rank has one stage or several. Each stage runs each of
    the `microbatches` forward once, and backward once: in one pass, or gradients of inputs and then of weights. With
    `forward_only` nothing goes backward: microbatches of a model that runs.

    Raises ScheduleError, which names rank and action, for actions that are missing, come twice, are another rank's, or
    go backward before they went forward. Whether the ranks' orders fit together is `timeline.simulate`'s to find out.
    """

    name: str
    microbatches: int
    stage_ranks: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    forward_only: bool = False

    def __post_init__(self) -> None:
        self._check_sizes()
        done: set[tuple[ActionKind, int, int]] = set()
        for rank, actions in enumerate(self.actions):
            for action in actions:
                self._check_action(rank, action, done)
                done.add((action.kind, action.stage, action.microbatch))
        for stage in range(self.stages):
            for microbatch in range(self.microbatches):
                self._check_complete(stage, microbatch, done)

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.stage_ranks)

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.actions)

    @property
    def splits_backward(self) -> bool:
        """Returns whether any backward pass is split into gradients of inputs and gradients of weights."""
        return any(action.kind is ActionKind.BACKWARD_INPUT for action in self)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Returns the stages that a pipeline rank has, in order."""
        return tuple(stage for stage, owner in enumerate(self.stage_ranks) if owner == rank)

    def last_gradients(self, stage: int) -> Action:
        """Returns the action after which a stage has all gradients of its weights."""
        kinds = (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT)
        own = self.actions[self.stage_ranks[stage]]
        return next(a for a in reversed(own) if a.stage == stage and a.kind in kinds)

    def __iter__(self) -> Iterator[Action]:
        return (action for actions in self.actions for action in actions)

    def __str__(self) -> str:
        """Formats a line a rank: "rank 0: 0F0 0F1 0B0 0B1"."""
        return "\n".join(f"rank {rank}: {' '.join(map(str, actions))}" for rank, actions in enumerate(self.actions))

    @classmethod
    def in_order(cls, stages: int, microbatches: int) -> Schedule:
        """Returns the schedule of a model that runs: each stage on a rank of its own, microbatches in order."""
        actions = tuple(
            tuple(Action(ActionKind.FORWARD, stage, m) for m in range(microbatches)) for stage in range(stages)
        )
        return cls("in order", microbatches, tuple(range(stages)), actions, forward_only=True)

    def _check_sizes(self) -> None:
        count = self.microbatches
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ScheduleError(f"schedule {self.name}: microbatches must be a whole number, 1 or more; got {count!r}")
        if not self.actions:
            raise ScheduleError(f"schedule {self.name} has no ranks")
        for stage, rank in enumerate(self.stage_ranks):
            if not 0 <= rank < self.ranks:
                raise ScheduleError(f"schedule {self.name}: stage {stage} is on rank {rank} of {self.ranks}")
        for rank in range(self.ranks):
            if rank not in self.stage_ranks:
                raise ScheduleError(f"schedule {self.name}: rank {rank} has no stage")

    def _check_action(self, rank: int, action: Action, done: set[tuple[ActionKind, int, int]]) -> None:
        kind, stage, microbatch = action.kind, action.stage, action.microbatch
        where = f"schedule {self.name}, rank {rank}, action {action}"
        if not 0 <= stage < self.stages:
            raise ScheduleError(f"{where}: there are {self.stages} stages")
        if not 0 <= microbatch < self.microbatches:
            raise ScheduleError(f"{where}: there are {self.microbatches} microbatches")
        if self.stage_ranks[stage] != rank:
            raise ScheduleError(f"{where}: stage {stage} is on rank {self.stage_ranks[stage]}")
        if (kind, stage, microbatch) in done:
            raise ScheduleError(f"{where}: it comes twice")
        if kind is ActionKind.FORWARD:
            return
        other = ActionKind.BACKWARD if kind is ActionKind.BACKWARD_INPUT else ActionKind.BACKWARD_INPUT
        if kind is not ActionKind.BACKWARD_WEIGHT and (other, stage, microbatch) in done:
            raise ScheduleError(f"{where}: {Action(other, stage, microbatch)} went backward before")
        before = ActionKind.BACKWARD_INPUT if kind is ActionKind.BACKWARD_WEIGHT else ActionKind.FORWARD
        if (before, stage, microbatch) not in done:
            raise ScheduleError(f"{where}: it comes before {Action(before, stage, microbatch)}")

    def _check_complete(self, stage: int, microbatch: int, done: set[tuple[ActionKind, int, int]]) -> None:
        forward, backward = ActionKind.FORWARD, ActionKind.BACKWARD
        split = (ActionKind.BACKWARD_INPUT, stage, microbatch) in done
        for kind in (forward, *([] if self.forward_only else [ActionKind.BACKWARD_WEIGHT if split else backward])):
            if (kind, stage, microbatch) not in done:
                raise ScheduleError(
                    f"schedule {self.name}, rank {self.stage_ranks[stage]}: action {Action(kind, stage, microbatch)} "
                    "is missing"
                )
