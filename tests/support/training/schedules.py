"""Schedules written by hand, for tests."""

from __future__ import annotations

from cost_model.schedule.schedule import Action, ActionKind, Schedule

KINDS = {kind.value: kind for kind in ActionKind}


def actions(text: str) -> tuple[Action, ...]:
    """Reads actions as they print: "0F0 0B0"."""
    return tuple(Action(KINDS[word[1]], int(word[0]), int(word[2])) for word in text.split())


def hand_made(microbatches: int, stage_ranks: tuple[int, ...], *ranks: str) -> Schedule:
    """Makes the schedule "mine" of one text of actions a rank."""
    return Schedule("mine", microbatches, stage_ranks, tuple(map(actions, ranks)))
