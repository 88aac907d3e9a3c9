"""Messages of a schedule: what each action receives and sends, and an order of them that needs no channels.

On a transport without channels (NCCL) two ranks must come to their messages in the same order. Were each action to
receive where its program does, 1F1B alone would hang: the first stage sends a forward's value while the second sends a
gradient. `rendezvous_order` has receives posted early, at the place where the sender sends, as torch's
`_PipelineScheduleRuntime` does. With channels (Gloo's tags) the same order lets messages travel while ranks compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

from cost_model.errors import ScheduleError
from cost_model.schedule.schedule import Action, ActionKind, Schedule


@dataclass(frozen=True, slots=True)
class StageValue:
    """A value of each microbatch that stage `source` sends to the later stage `target`, one or several on.

    `channel` is its number in every program; `has_gradient`: its gradient comes back. `name` is for messages.
    """

    source: int
    target: int
    channel: int
    has_gradient: bool = field(default=True, compare=False)
    name: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Message:
    """A value of one microbatch on its way forward, or, with `backward`, its gradient on the way back."""

    value: StageValue
    microbatch: int
    backward: bool = False

    @property
    def sender(self) -> int:
        """The stage that sends it."""
        return self.value.target if self.backward else self.value.source

    @property
    def receiver(self) -> int:
        """The stage that receives it."""
        return self.value.source if self.backward else self.value.target

    def __str__(self) -> str:
        what = f"{'the gradient of ' if self.backward else ''}{self.value.name or 'a value'}"
        return f"{what} (channel {self.value.channel}, microbatch {self.microbatch})"


@dataclass(frozen=True, slots=True)
class Receive:
    """A receive, posted: the rank waits for it where an action needs it."""

    message: Message


@dataclass(frozen=True, slots=True)
class Send:
    """A send, right behind the action that computes the message."""

    message: Message


Step = Action | Receive | Send
Values = Sequence[Sequence[StageValue]]  # of each microbatch


def received_by(action: Action, values: Sequence[StageValue]) -> list[Message]:
    """Returns the messages that an action needs, in the order of `values`, which are those of its microbatch."""
    return _messages(action, values, attrgetter("target"), attrgetter("source"))


def sent_by(action: Action, values: Sequence[StageValue]) -> list[Message]:
    """Returns the messages that an action computes, in the order of `values`, which are those of its microbatch."""
    return _messages(action, values, attrgetter("source"), attrgetter("target"))


def _messages(
    action: Action,
    values: Sequence[StageValue],
    forward_end: Callable[[StageValue], int],
    backward_end: Callable[[StageValue], int],
) -> list[Message]:
    """Returns the messages of a forward action's values, or of their gradients, that have the given end at its
    stage."""
    if action.kind is ActionKind.FORWARD:
        return [Message(v, action.microbatch) for v in values if forward_end(v) == action.stage]
    if not action.returns_input_gradients:
        return []
    return [Message(v, action.microbatch, True) for v in values if backward_end(v) == action.stage and v.has_gradient]


def rendezvous_order(schedule: Schedule, values: Values) -> tuple[tuple[Step, ...], ...]:
    """Returns each pipeline rank's steps in an order in which nobody waits for ever, whatever the transport: each
    receive stands where its sender's send does in one order of all ranks' actions, which is never later than the action
    that needs it. `values[m]` are microbatch m's.

    What two stages of one rank hand over is no message. The order is found as if the gradient of every value came back,
    so that ranks agree on it who know only of their own values whether it does. Raises ScheduleError, which names the
    actions, where ranks wait for each other whatever the transport.
    """
    ways = [(m, v, back) for m, own in enumerate(values) for v in own for back in (False, *[True] * v.has_gradient)]
    messages = {message: message for message in (Message(v, m, back) for m, v, back in ways)}
    values = [[replace(v, has_gradient=True) for v in own] for own in values]
    steps: list[list[Step]] = [[] for _ in schedule.actions]
    next_action, known = [0] * schedule.ranks, set[Message]()  # known: sent, or handed over
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(schedule.actions):  # an action of each rank in turn, as torch does it
            if next_action[rank] == len(actions):
                continue
            action = actions[next_action[rank]]
            if not known.issuperset(received_by(action, values[action.microbatch])):
                continue
            steps[rank].append(action)
            for message in sent_by(action, values[action.microbatch]):
                known.add(message)
                if message in messages and not _is_local(schedule, message):
                    steps[rank].append(Send(messages[message]))
                    steps[schedule.stage_ranks[message.receiver]].append(Receive(messages[message]))
            next_action[rank] += 1
            moved = True
    waiting: list[str] = []
    for rank, (actions, at) in enumerate(zip(schedule.actions, next_action, strict=True)):
        if at < len(actions):
            missing = next(m for m in received_by(actions[at], values[actions[at].microbatch]) if m not in known)
            waiting.append(f"rank {rank} at {actions[at]} for {missing} of stage {missing.sender}")
    if waiting:
        raise ScheduleError(f"schedule {schedule.name}: these wait for ever: {'; '.join(waiting)}")
    return tuple(map(tuple, steps))


def _is_local(schedule: Schedule, message: Message) -> bool:
    return schedule.stage_ranks[message.sender] == schedule.stage_ranks[message.receiver]
