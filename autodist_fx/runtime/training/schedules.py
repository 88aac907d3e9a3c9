"""Makes a `Schedule` by name, from the action lists of torch.distributed.pipelining's schedule classes.

torch's classes decide what is run in which order, and which numbers of ranks, stages and microbatches go together. They
work out the order in their constructors, from little of their stages: how many there are, and whose.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from autodist_fx.errors import ScheduleError
from cost_model.schedule.schedule import Action, ActionKind, Schedule

# Our names; without underscores they are torch's (`torch.distributed.pipelining.schedules.get_schedule_class`).
# The value: how many stages a rank has if nobody says; None: one, always.
SCHEDULES: dict[str, int | None] = {
    "gpipe": None,
    "1f1b": None,
    "interleaved_1f1b": 2,
    "interleaved_zero_bubble": 2,
    "zbv_zero_bubble": 2,
}


@dataclass
class _Stage:
    """A stand-in for torch's PipelineStage: what the constructors of its schedules read and write."""

    stage_index: int
    num_stages: int
    group_rank: int
    group_size: int
    submod: None = None  # they look for compiled modules in it
    stage_index_to_group_rank: dict[int, int] = field(default_factory=dict)


def make_schedule(name: str, ranks: int, microbatches: int, stages_per_rank: int | None = None) -> Schedule:
    """Return the schedule `name` of `microbatches` on `ranks` pipeline ranks, with `stages_per_rank` stages each.

    Names are those of SCHEDULES, and torch's: "zbv_zero_bubble", "ZBVZeroBubble", "ScheduleZBVZeroBubble".
    `stages_per_rank` None is 1 for gpipe and 1f1b, else 2; stages are dealt to ranks in turn, but for zbv_zero_bubble,
    which goes back and forth. Raises ScheduleError for a name that is not there, and, with torch's reason, for numbers
    that do not go together.
    """
    own = _own_name(name)
    for what, value in (("ranks", ranks), ("microbatches", microbatches), ("stages_per_rank", stages_per_rank)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ScheduleError(f"schedule {own}: {what} must be a whole number, 1 or more; got {value!r}")
    local = stages_per_rank or SCHEDULES[own] or 1
    if SCHEDULES[own] is None and local != 1:
        raise ScheduleError(
            f"schedule {own} has one stage a rank, and was asked for {local}: use interleaved_1f1b, or one"
        )
    return _schedule(own, ranks, microbatches, local)


@functools.cache  # a training step asks for its schedule, and large ones take 0.1 s
def _schedule(name: str, ranks: int, microbatches: int, local: int) -> Schedule:
    try:
        order, stage_ranks = _torch_order(name, ranks, microbatches, local)
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split("\n\n")[0].split()).rstrip(".")
        raise ScheduleError(
            f"schedule {name} on {ranks} ranks with {local} {'stages' if local > 1 else 'stage'} each and "
            f"{microbatches} microbatches: {reason}{_way_out(name, ranks, microbatches, local)}"
        ) from None
    actions = tuple(tuple(_action(a) for a in order[rank] if _is_pass(a)) for rank in range(ranks))
    return Schedule(name, microbatches, stage_ranks, _renumbered(actions, microbatches))


def _own_name(name: str) -> str:
    """Return our name of a schedule, by any of its names."""
    plain = str(name).replace("_", "").lower().removeprefix("schedule")
    for own in SCHEDULES:
        if own.replace("_", "") == plain:
            return own
    raise ScheduleError(f"there is no schedule {name!r}: use one of {', '.join(SCHEDULES)}")


def _torch_order(
    name: str, ranks: int, microbatches: int, local: int
) -> tuple[dict[int, list[Any]], tuple[int, ...]]:
    """Return ({rank: torch's actions, with None for idle steps}, each stage's rank). Raises what torch raises."""
    from torch.distributed.pipelining import schedules as torch_schedules  # 1 s: for those who train in a pipeline

    try:
        schedule_class = torch_schedules.get_schedule_class(name.replace("_", ""))
    except ValueError:
        raise ScheduleError(f"torch {torch.__version__} has no schedule {name}: use a later torch") from None
    stages = [_Stage(rank, ranks * local, 0, ranks) for rank in range(0, ranks * local, ranks)]
    is_single = issubclass(schedule_class, torch_schedules.PipelineScheduleSingle)
    made = schedule_class(stages[0] if is_single else stages, microbatches)
    if getattr(made, "pipeline_order", None) is None:  # of gpipe and 1f1b older versions say none
        raise ScheduleError(f"torch {torch.__version__} does not say the order of {name}'s actions: use a later torch")
    stage_ranks = {stage: stage for stage in range(ranks)} if is_single else made.stage_index_to_group_rank
    return made.pipeline_order, tuple(stage_ranks[stage] for stage in range(ranks * local))


def _is_pass(action: Any) -> bool:
    """Return whether a step of torch's is a pass of a stage: none is an idle step, nor a reduction of gradients over
    dp, which the executor does as they come."""
    return action is not None and action.computation_type.value != "REDUCE_GRAD"


def _action(action: Any) -> Action:
    kinds = {kind.value: kind for kind in ActionKind}
    kind = kinds.get(action.computation_type.value)
    if kind is None:
        raise ScheduleError(f"torch {torch.__version__} has an action {action}, which is no pass of a stage")
    return Action(kind, action.stage_index, action.microbatch_index)


def _renumbered(actions: tuple[tuple[Action, ...], ...], microbatches: int) -> tuple[tuple[Action, ...], ...]:
    """Return the actions, with forwards of microbatches 1, 2, ... of a stage as of 0, 1, ...

    torch 2.13's list of 1F1B counts the last stage's forwards from 1; what it runs begins with microbatch 0.
    """
    by_stage: dict[int, list[int]] = {}
    for own in actions:
        for action in own:
            if action.kind is ActionKind.FORWARD:
                by_stage.setdefault(action.stage, []).append(action.microbatch)
    late = {stage for stage, found in by_stage.items() if found == list(range(1, microbatches + 1))}

    def mended(action: Action) -> Action:
        if action.kind is ActionKind.FORWARD and action.stage in late:
            return Action(action.kind, action.stage, action.microbatch - 1)
        return action

    return tuple(tuple(mended(action) for action in own) for own in actions)


def _way_out(name: str, ranks: int, microbatches: int, local: int) -> str:
    """Format the nearest numbers of microbatches that torch takes; "" where the number is not at fault."""
    near: list[int] = []
    for steps in (range(microbatches - 1, 0, -1), range(microbatches + 1, microbatches + 2 * ranks + 1)):
        for count in steps:
            try:
                _torch_order(name, ranks, count, local)
            except (ValueError, AssertionError, RuntimeError):
                continue
            near.append(count)
            break
    return f"; {' or '.join(map(str, near))} microbatches would do" if near else ""
