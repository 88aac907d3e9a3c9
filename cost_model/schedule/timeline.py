"""Timeline: when each action of a schedule starts and stops, how long ranks idle, and what they keep meanwhile.

`simulate` runs the ranks' actions in their order, each as soon as its rank is free and what it needs has arrived. A
message leaves when its action stops and travels while both ranks compute on; messages of one rank to another go one
after the other. Two stages of one rank hand over at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_model.errors import ScheduleError
from cost_model.schedule.schedule import Action, ActionKind, Schedule


@dataclass(frozen=True, slots=True)
class StageCosts:
    """The seconds that one microbatch's passes take on a stage, and the bytes that it keeps for them.

    `activation_bytes` are kept from the forward pass to the backward pass; `weight_activation_bytes` of them (None:
    all), where that is split, from BACKWARD_INPUT to BACKWARD_WEIGHT.
    """

    forward_seconds: float
    backward_input_seconds: float
    backward_weight_seconds: float
    activation_bytes: int = 0
    weight_activation_bytes: int | None = None

    def seconds(self, kind: ActionKind) -> float:
        """Returns how long an action takes; a whole backward pass is both parts."""
        return {
            ActionKind.FORWARD: self.forward_seconds,
            ActionKind.BACKWARD: self.backward_input_seconds + self.backward_weight_seconds,
            ActionKind.BACKWARD_INPUT: self.backward_input_seconds,
            ActionKind.BACKWARD_WEIGHT: self.backward_weight_seconds,
        }[kind]

    def bytes_after(self, kind: ActionKind) -> int:
        """Returns how many bytes of a microbatch are kept after an action."""
        if kind is ActionKind.FORWARD:
            return self.activation_bytes
        if kind is ActionKind.BACKWARD_INPUT:
            return self.activation_bytes if self.weight_activation_bytes is None else self.weight_activation_bytes
        return 0


@dataclass(frozen=True, slots=True)
class Transfer:
    """A value that a later stage needs of an earlier one, of every microbatch, and its gradient on the way back.

    `target` may be two stages on, or more. `seconds` are those of the message; `gradient_seconds` None: no gradient
    comes back, and nobody waits for one.
    """

    source: int
    target: int
    seconds: float = 0.0
    gradient_seconds: float | None = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """An action's time, in seconds from the step's first."""

    action: Action
    start: float
    stop: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step: `spans[r]` are pipeline rank r's actions, in order.

    `live_microbatches[s]` is how many microbatches stage s keeps activations of, at most; `stage_activation_bytes[s]`
    and `rank_activation_bytes[r]` how many bytes of them a stage and a rank keep, at most.
    """

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    live_microbatches: tuple[int, ...]
    stage_activation_bytes: tuple[int, ...]
    rank_activation_bytes: tuple[int, ...]

    @property
    def seconds(self) -> float:
        """Length of the step: when the last action stops."""
        return max(own[-1].stop for own in self.spans)

    def idle_seconds(self, rank: int) -> float:
        """Returns for how long a rank does nothing until the step's end, which others may set."""
        return self.seconds - sum(span.stop - span.start for span in self.spans[rank])

    @property
    def idle_share(self) -> float:
        """Share of all ranks' time in which they do nothing, 0.0 to 1.0: the bubble."""
        total = self.seconds * len(self.spans)
        return sum(map(self.idle_seconds, range(len(self.spans)))) / total if total else 0.0


def chain(stages: int, seconds: float = 0.0, gradient_seconds: float | None = 0.0) -> tuple[Transfer, ...]:
    """Returns transfers from each stage to the next, all alike."""
    return tuple(Transfer(stage, stage + 1, seconds, gradient_seconds) for stage in range(stages - 1))


def simulate(schedule: Schedule, costs: Sequence[StageCosts], transfers: Sequence[Transfer]) -> Timeline:
    """Returns the timeline of a step, given the costs of each stage and what stages pass to each other.

    Raises ScheduleError for transfers that lead backward or to no stage, and, where ranks wait for each other for
    ever, for what each of them waits.
    """
    if len(costs) != schedule.stages:
        raise ScheduleError(f"schedule {schedule.name} has {schedule.stages} stages; got the costs of {len(costs)}")
    for t in transfers:
        if not 0 <= t.source < t.target < schedule.stages:
            raise ScheduleError(f"no transfer leads from stage {t.source} to stage {t.target} of {schedule.stages}")
    run = _Run(schedule, costs, transfers)
    while run.advance():
        pass
    return run.timeline()


class _Run:
    """One simulation, on its way: how far each rank is, what has arrived where."""

    def __init__(self, schedule: Schedule, costs: Sequence[StageCosts], transfers: Sequence[Transfer]) -> None:
        self.schedule, self.costs, self.transfers = schedule, costs, transfers
        self.spans: list[list[Span]] = [[] for _ in schedule.actions]
        self.link_free: dict[tuple[int, int], float] = {}  # by (source rank, target rank): when it has nothing to carry
        self.arrival: dict[tuple[bool, int, int], float] = {}  # by (forward?, index of transfer, microbatch): when

    def advance(self) -> bool:
        """Runs what can be run, a rank after the other; returns whether that was anything."""
        before = sum(map(len, self.spans))
        for rank, actions in enumerate(self.schedule.actions):
            own = self.spans[rank]
            while len(own) < len(actions) and all(key in self.arrival for key in self._needs(actions[len(own)])):
                self._run_action(rank, actions[len(own)])
        return sum(map(len, self.spans)) > before

    def timeline(self) -> Timeline:
        waiting = [
            f"rank {rank} at {actions[len(own)]} for {self._awaited(actions[len(own)])}"
            for rank, (own, actions) in enumerate(zip(self.spans, self.schedule.actions, strict=True))
            if len(own) < len(actions)
        ]
        if waiting:
            raise ScheduleError(f"schedule {self.schedule.name}: these wait for ever: {'; '.join(waiting)}")
        live, stage_bytes, rank_bytes = _peaks(self.schedule, self.costs)
        return Timeline(self.schedule, tuple(map(tuple, self.spans)), live, stage_bytes, rank_bytes)

    def _needs(self, action: Action) -> list[tuple[bool, int, int]]:
        """Returns the keys of the messages that an action needs."""
        if action.kind is ActionKind.FORWARD:
            return [(True, i, action.microbatch) for i, t in enumerate(self.transfers) if t.target == action.stage]
        if not action.returns_input_gradients:
            return []
        return [
            (False, i, action.microbatch)
            for i, t in enumerate(self.transfers)
            if t.source == action.stage and t.gradient_seconds is not None
        ]

    def _awaited(self, action: Action) -> str:
        forward, i, microbatch = next(key for key in self._needs(action) if key not in self.arrival)
        transfer = self.transfers[i]
        if forward:
            return f"stage {transfer.source}'s forward of microbatch {microbatch}"
        return f"stage {transfer.target}'s backward of microbatch {microbatch}"

    def _run_action(self, rank: int, action: Action) -> None:
        own = self.spans[rank]
        free = own[-1].stop if own else 0.0
        start = max([free, *(self.arrival[key] for key in self._needs(action))])
        stop = start + self.costs[action.stage].seconds(action.kind)
        own.append(Span(action, start, stop))
        for i, t in enumerate(self.transfers):
            if action.kind is ActionKind.FORWARD and t.source == action.stage:
                self.arrival[True, i, action.microbatch] = self._send(rank, t.target, stop, t.seconds)
            elif action.returns_input_gradients and t.target == action.stage and t.gradient_seconds is not None:
                self.arrival[False, i, action.microbatch] = self._send(rank, t.source, stop, t.gradient_seconds)

    def _send(self, rank: int, stage: int, ready: float, seconds: float) -> float:
        """Returns when a message to a stage, ready at `ready`, has arrived there."""
        target = self.schedule.stage_ranks[stage]
        if target == rank:
            return ready
        arrives = max(ready, self.link_free.get((rank, target), 0.0)) + seconds
        self.link_free[rank, target] = arrives
        return arrives


def _peaks(
    schedule: Schedule, costs: Sequence[StageCosts]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Returns what is kept at most: microbatches of each stage, bytes of each stage, bytes of each rank.

    It follows from the order of actions alone. Over an action's time count both what it had and what it leaves.
    """
    live, stage_bytes, rank_bytes = [0] * schedule.stages, [0] * schedule.stages, [0] * schedule.ranks
    for rank, actions in enumerate(schedule.actions):
        kept: dict[int, dict[int, int]] = {stage: {} for stage in schedule.stages_of(rank)}  # by microbatch
        for action in actions:
            own = kept[action.stage]
            after = costs[action.stage].bytes_after(action.kind)
            own[action.microbatch] = max(after, own.get(action.microbatch, 0))
            live[action.stage] = max(live[action.stage], len(own))
            stage_bytes[action.stage] = max(stage_bytes[action.stage], sum(own.values()))
            rank_bytes[rank] = max(rank_bytes[rank], sum(sum(of_stage.values()) for of_stage in kept.values()))
            own[action.microbatch] = after
            if action.kind in (ActionKind.BACKWARD, ActionKind.BACKWARD_WEIGHT):
                del own[action.microbatch]
    return tuple(live), tuple(stage_bytes), tuple(rank_bytes)
