"""Schedules written by hand, for tests."""

from __future__ import annotations

from cost_model.schedule.messages import Receive, Send, Step, Values, received_by, sent_by
from cost_model.schedule.schedule import Action, ActionKind, Schedule

KINDS = {kind.value: kind for kind in ActionKind}


def actions(text: str) -> tuple[Action, ...]:
    """Reads actions as they print: "0F0 0B0"."""
    return tuple(Action(KINDS[word[1]], int(word[0]), int(word[2])) for word in text.split())


def hand_made(microbatches: int, stage_ranks: tuple[int, ...], *ranks: str) -> Schedule:
    """Makes the schedule "mine" of one text of actions a rank."""
    return Schedule("mine", microbatches, stage_ranks, tuple(map(actions, ranks)))


def steps_in_place(schedule: Schedule, values: Values) -> tuple[tuple[Step, ...], ...]:
    """Each pipeline rank's steps, with every action between its receives and its sends."""
    found = []
    for rank, actions in enumerate(schedule.actions):
        own: list[Step] = []
        for action in actions:
            needed, made = (each(action, values[action.microbatch]) for each in (received_by, sent_by))
            own += [Receive(m) for m in needed if schedule.stage_ranks[m.sender] != rank]
            own += [action, *(Send(m) for m in made if schedule.stage_ranks[m.receiver] != rank)]
        found.append(tuple(own))
    return tuple(found)
