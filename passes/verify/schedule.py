"""Proves, before anything runs, that the ranks of a pipeline never wait for each other for ever, neither in a training
step nor with several microbatches of a model that runs in flight.

The messages are those of the programs' own sends and recvs: forward as they stand in the graph; backward a stage waits
for the gradients of all that it sent, goes back, and sends those of all that it received. A rank goes through the
actions of its schedule, with the programs of all its stages. Two kinds of transport are gone through:

    with channels      a send waits for nobody, a recv for the first message of its channel (Gloo, memory)
    by rendezvous      a send waits for its recv, whatever else there is between two ranks (the strictest reading of
                       NCCL); receives are posted where `rendezvous_order` has them

Which rank goes on when decides nothing here: what has been sent stays sent, and a rank that may go on may do so later,
too. So one run that ends proves that every run ends, and one that stops shows where every run stops.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from cost_model.errors import ScheduleError, VerificationError
from cost_model.schedule.messages import (
    Message,
    Receive,
    StageValue,
    Step,
    received_by,
    rendezvous_order,
    sent_by,
)
from cost_model.schedule.schedule import Action, ActionKind, Schedule
from passes.ops.comm import COLLECTIVES, recv, send
from passes.program.rank_program import RankProgram
from passes.verify.core.messages import comm_nodes, message
from passes.verify.core.report import fail

Place = tuple[int, int]  # (pipeline rank, tp rank)
Programs = Sequence[RankProgram]  # of ranks 0, 1, ... of a mesh


def verify_schedule(programs: Sequence[Programs], schedule: Schedule) -> None:
    """Proves a schedule; `programs[m]` are those that run microbatch m, of all ranks of a mesh whose stages are the
    schedule's.

    Raises VerificationError, which names the ranks that wait for each other, at which action and for what; or a message
    that nobody receives, or that another one is taken for.
    """
    ranks = _ranks(programs, schedule)
    _Run(ranks, _in_place(ranks)).run()
    try:
        steps = [rendezvous_order(schedule, [m.lanes[t].values for m in ranks.microbatches]) for t in range(ranks.tp)]
    except ScheduleError as error:
        raise VerificationError(str(error)) from None
    _Run(ranks, _by_rendezvous(ranks, steps)).run()


def verify_in_flight(programs: Programs) -> None:
    """Proves that microbatches of the same programs, of all ranks of a mesh, may follow each other through the stages:
    each rank runs them in order, and lets go of what one has sent before the one after the next. More are gone through
    than there are stages. Raises VerificationError as `verify_schedule` does.
    """
    stages = programs[0].mesh.pp
    ranks = _ranks([programs] * (stages + 3), Schedule.in_order(stages, stages + 3))
    _Run(ranks, _bounded(ranks)).run()


def check_rendezvous(
    programs: Sequence[Programs], schedule: Schedule, steps: Sequence[Sequence[Sequence[Step]]]
) -> None:
    """Proves that nobody waits for ever on a transport without channels, where ranks post receives as
    `steps[tp rank][pipeline rank]` has them. Raises VerificationError."""
    ranks = _ranks(programs, schedule)
    _Run(ranks, _by_rendezvous(ranks, steps)).run()


# -- what the programs say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Lane:
    """The stages' programs of one tp rank, which talk to each other: what each sends to which."""

    programs: tuple[RankProgram, ...]  # by stage
    nodes: tuple[tuple[Node, ...], ...]  # by stage: sends, recvs and collectives, in order
    values: tuple[StageValue, ...]  # in the order of their channels


@dataclass(frozen=True, slots=True)
class _Microbatch:
    """The programs that run a microbatch.

    `borders[stage]`: before which of its collectives, by their number, any rank of a stage sends or receives, and the
    first. Those up to the next border are met one after the other by all of the group.
    """

    lanes: tuple[_Lane, ...]  # by tp rank
    borders: tuple[frozenset[int], ...]


@dataclass(frozen=True, slots=True)
class _Ranks:
    schedule: Schedule
    tp: int
    microbatches: tuple[_Microbatch, ...]

    def name(self, place: Place) -> str:
        """Formats a rank: "rank 1", with its tp rank where there are several."""
        return f"rank {place[0]}" + (f" (tp rank {place[1]})" if self.tp > 1 else "")


def _ranks(programs: Sequence[Programs], schedule: Schedule) -> _Ranks:
    count, mesh = schedule.microbatches, programs[0][0].mesh
    if len(programs) != count:
        raise VerificationError(
            f"schedule {schedule.name} has {count} microbatches, and the programs are of {len(programs)}"
        )
    read: dict[tuple[int, ...], _Microbatch] = {}  # most run the same programs
    for each in programs:
        if mesh.pp != schedule.stages or [(p.rank, p.mesh) for p in each] != [(r, mesh) for r in range(mesh.size)]:
            raise VerificationError(
                f"schedule {schedule.name} has {schedule.stages} stages, and the programs are of ranks "
                f"{[p.rank for p in each]} of a mesh of {each[0].mesh}"
            )
        read.setdefault(tuple(map(id, each)), _read(each))
    return _Ranks(schedule, mesh.tp, tuple(read[tuple(map(id, each))] for each in programs))


def _read(programs: Programs) -> _Microbatch:
    mesh = programs[0].mesh
    lanes = tuple(_lane([programs[mesh.rank(stage, t)] for stage in range(mesh.pp)]) for t in range(mesh.tp))
    return _Microbatch(lanes, tuple(_borders([lane.nodes[stage] for lane in lanes]) for stage in range(mesh.pp)))


def _lane(programs: Programs) -> _Lane:
    nodes = tuple(tuple(comm_nodes(program)) for program in programs)
    values = [_value(p, node) for p, own in zip(programs, nodes, strict=True) for node in own if node.target is send]
    return _Lane(tuple(programs), nodes, tuple(sorted(values, key=lambda v: v.channel)))


def _borders(nodes: Sequence[Sequence[Node]]) -> frozenset[int]:
    """Returns the borders between a stage's collectives, given the comm nodes of each of its ranks."""
    found = {0}
    for own in nodes:
        count = 0
        for node in own:
            if node.target in COLLECTIVES:
                count += 1
            else:
                found.add(count)
    return frozenset(found)


def _value(program: RankProgram, node: Node) -> StageValue:
    """Returns the value that a send or recv names; of a recv its name is as that of the send, which is the op's."""
    source, target, channel = message(program, node)
    (stage, t), (other, other_t) = program.mesh.coordinates(source), program.mesh.coordinates(target)
    if t != other_t or stage >= other:
        fail(program, node, f"it leads from stage {stage}, tp rank {t} to stage {other}, tp rank {other_t}")
    name = node.args[0].name if node.target is send and isinstance(node.args[0], Node) else node.name
    return StageValue(stage, other, channel, bool(node.kwargs.get("gradient")), name)


# -- what a rank comes to, in order ------------------------------------------------------------------------------------


class _Kind(enum.Enum):
    SEND = "sends"
    RECEIVE = "waits for"
    MEET = "comes to"  # all ranks of a group at once
    LET_GO = "lets go of"  # waits until all that it has sent with an action, or before, is received


@dataclass(frozen=True, slots=True)
class _Event:
    """Something that a rank comes to. A send or receive is of a `message`; `ranks` are all that a meeting takes, of a
    message or of collectives; equal events of several ranks are one meeting."""

    kind: _Kind
    action: Action | None = field(compare=False)  # in which; None: a posted receive is between two
    message: Message | None = None
    ranks: tuple[Place, ...] = ()
    collectives: tuple[Action, int] | None = None  # of which pass, from which one on


_Events = dict[Place, list[_Event]]


def _in_place(ranks: _Ranks) -> _Events:
    """Returns what each rank comes to where its programs send and receive in place, on a transport with channels."""
    schedule = ranks.schedule
    return {
        (rank, t): [event for action in schedule.actions[rank] for event in _passes(ranks, t, action)]
        for rank in range(schedule.ranks)
        for t in range(ranks.tp)
    }


def _bounded(ranks: _Ranks) -> _Events:
    """Returns the same where a rank lets go of what an action has sent before the action after the next."""
    found: _Events = {}
    for (rank, t), own in _in_place(ranks).items():
        found[rank, t] = bounded = []
        before = None
        for event in own:
            action = event.action
            if action is not None and action is not before and action.microbatch > 1:
                bounded.append(_Event(_Kind.LET_GO, Action(action.kind, action.stage, action.microbatch - 2)))
            bounded.append(event)
            before = action
    return found


def _by_rendezvous(ranks: _Ranks, steps: Sequence[Sequence[Sequence[Step]]]) -> _Events:
    """Returns the same where receives are posted, and sender and receiver meet."""
    schedule = ranks.schedule
    found: _Events = {}
    for t in range(ranks.tp):
        for rank in range(schedule.ranks):
            own = found[rank, t] = []
            for step in steps[t][rank]:
                if isinstance(step, Receive):
                    own.append(_met(ranks, t, None, step.message))
                elif isinstance(step, Action):
                    own += _with_meetings(ranks, t, step)
    return found


def _with_meetings(ranks: _Ranks, t: int, action: Action) -> Iterator[_Event]:
    """Yields what a rank comes to in an action all of whose receives from other ranks are posted elsewhere."""
    for event in _passes(ranks, t, action):
        if event.message is None or _is_local(ranks.schedule, event.message):
            yield event
        elif event.kind is _Kind.SEND:
            yield _met(ranks, t, action, event.message)


def _met(ranks: _Ranks, t: int, action: Action | None, message: Message) -> _Event:
    owners = ranks.schedule.stage_ranks
    places = ((owners[message.sender], t), (owners[message.receiver], t))
    return _Event(_Kind.MEET, action, message, places)


def _passes(ranks: _Ranks, t: int, action: Action) -> Iterator[_Event]:
    """Yields what a rank comes to in an action: its program's comm nodes, or, backward, gradients and what its
    collectives owe."""
    microbatch, stage = ranks.microbatches[action.microbatch], action.stage
    lane = microbatch.lanes[t]
    group = tuple((ranks.schedule.stage_ranks[stage], other) for other in range(ranks.tp))
    if action.kind is not ActionKind.FORWARD:
        values = [_value(lane.programs[stage], node) for node in lane.nodes[stage] if node.target in (send, recv)]
        yield from (_Event(_Kind.RECEIVE, action, m) for m in received_by(action, values))
        if ranks.tp > 1:
            yield _Event(_Kind.MEET, action, None, group, (action, 0))
        yield from (_Event(_Kind.SEND, action, m) for m in sent_by(action, values))
        return
    count = 0
    for node in lane.nodes[stage]:
        if node.target in COLLECTIVES:
            if count in microbatch.borders[stage]:
                yield _Event(_Kind.MEET, action, None, group, (action, count))
            count += 1
        else:
            kind = _Kind.SEND if node.target is send else _Kind.RECEIVE
            yield _Event(kind, action, Message(_value(lane.programs[stage], node), action.microbatch))


def _is_local(schedule: Schedule, message: Message) -> bool:
    return schedule.stage_ranks[message.sender] == schedule.stage_ranks[message.receiver]


# -- going through them ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Run:
    """One run of all ranks, up to where nobody can go on."""

    ranks: _Ranks
    events: _Events
    at: dict[Place, int] = field(default_factory=dict)
    mail: dict[tuple[object, ...], deque[Message]] = field(default_factory=dict)  # by channel, in the order of sends
    sent: dict[Place, dict[int, deque[Message]]] = field(default_factory=dict)  # the same, of each sender
    met: dict[_Event, set[Place]] = field(default_factory=dict)

    def run(self) -> None:
        """Raises VerificationError where not all ranks come to their end, or something is left."""
        self.at = dict.fromkeys(self.events, 0)
        ready = deque(self.events)
        while ready:
            ready.extend(self._go_on(ready.popleft()))
        if any(self.at[place] < len(own) for place, own in self.events.items()):
            raise VerificationError(self._circle())
        for left in self.mail.values():
            if left:
                lost = left[0]
                raise self._error(f"stage {lost.sender} sends {lost}, and stage {lost.receiver} never waits for it")

    def _go_on(self, place: Place) -> list[Place]:
        """Runs a rank as far as it can go; returns the ranks that may go on with what it did."""
        woken: list[Place] = []
        own = self.events[place]
        while self.at[place] < len(own):
            event = own[self.at[place]]
            if event.kind is _Kind.MEET:
                here = self.met.setdefault(event, set())
                here.add(place)
                if len(here) < len(event.ranks):
                    break
                del self.met[event]
                for other in here:
                    self.at[other] += 1
                woken += [other for other in here if other != place]
                continue
            if event.kind is _Kind.LET_GO:
                if self._unread(place, event) is not None:
                    break
                self.at[place] += 1
                continue
            assert event.message is not None
            mail = self.mail.setdefault(self._channel(place[1], event.message), deque())
            if event.kind is _Kind.SEND:
                mail.append(event.message)
                self.sent.setdefault(place, {})[id(mail)] = mail
                woken.append((self.ranks.schedule.stage_ranks[event.message.receiver], place[1]))
            elif not mail:
                break
            else:
                self._take(place, event, mail.popleft())
                woken.append((self.ranks.schedule.stage_ranks[event.message.sender], place[1]))
            self.at[place] += 1
        return woken

    def _unread(self, place: Place, event: _Event) -> Message | None:
        """Returns a message that a rank has sent with an action, or before, and that nobody has received yet."""
        assert event.action is not None
        own = (message for mail in self.sent.get(place, {}).values() for message in mail)
        return next((message for message in own if message.microbatch <= event.action.microbatch), None)

    def _channel(self, t: int, message: Message) -> tuple[object, ...]:
        owners = self.ranks.schedule.stage_ranks
        return t, owners[message.sender], owners[message.receiver], message.value.channel, message.backward

    def _take(self, place: Place, event: _Event, got: Message) -> None:
        assert event.message is not None
        wanted = event.message
        if (got.microbatch, got.sender, got.receiver) != (wanted.microbatch, wanted.sender, wanted.receiver):
            raise self._error(f"{self.ranks.name(place)} at {event.action} waits for {wanted} and gets {got}")

    def _circle(self) -> str:
        """Formats who waits for whom, from a rank that waits back to itself, or to one that has ended."""
        place = next(p for p, own in self.events.items() if self.at[p] < len(own))
        path: list[Place] = []
        while place not in path and self.at[place] < len(self.events[place]):
            path.append(place)
            place = self._awaited(place)
        waits = [self._wait(p) for p in (path[path.index(place) :] if place in path else path)]
        if place not in path:
            waits.append(f"{self.ranks.name(place)} has ended")
        return f"schedule {self.ranks.schedule.name}: these wait for each other for ever: {'; '.join(waits)}"

    def _awaited(self, place: Place) -> Place:
        """Returns the rank that a waiting rank waits for."""
        event = self.events[place][self.at[place]]
        if event.kind is _Kind.MEET:
            return next(p for p in event.ranks if not self._is_at(p, event))
        if event.kind is _Kind.LET_GO:
            unread = self._unread(place, event)
            assert unread is not None
            return self.ranks.schedule.stage_ranks[unread.receiver], place[1]
        assert event.message is not None
        return self.ranks.schedule.stage_ranks[event.message.sender], place[1]

    def _is_at(self, place: Place, event: _Event) -> bool:
        own, at = self.events[place], self.at[place]
        return at < len(own) and own[at] == event

    def _wait(self, place: Place) -> str:
        event = self.events[place][self.at[place]]
        other = self.ranks.name(self._awaited(place))
        at = event.action if event.action is not None else self._next_action(place)
        if event.kind is _Kind.LET_GO:
            return f"{self.ranks.name(place)} waits behind {at} for {other} to receive {self._unread(place, event)}"
        if event.message is None:
            return f"{self.ranks.name(place)} waits at {at} for {other} to come to a collective"
        if event.kind is _Kind.MEET and self.ranks.schedule.stage_ranks[event.message.sender] == place[0]:
            return f"{self.ranks.name(place)} waits at {at} for {other} to receive {event.message}"
        return f"{self.ranks.name(place)} waits at {at} for {event.message} from {other}"

    def _next_action(self, place: Place) -> str:
        """Formats where a posted receive stands: before which action."""
        later = (e.action for e in self.events[place][self.at[place] :] if e.action is not None)
        action = next(later, None)
        return "the end" if action is None else str(action)

    def _error(self, what: str) -> VerificationError:
        return VerificationError(f"schedule {self.ranks.schedule.name}: {what}")
