"""The pipeline search: cuts the op sequence into stages, and decides what crosses each cut.

Cuts are positions in execution order. Dynamic programming places them (stage_partition.py): each stage within its
device's memory, the slowest stage as fast as can be, then the fewest bytes over the hops. A tensor that a stage needs
from before it is either received or computed again from what the stage has (graph inputs go to every rank): a minimum
cut in networkx decides, stage by stage, so that masks and rotary tables are recomputed and hidden states are sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from cost_model.errors import MeshError, NoPlanFits
from cost_model.format import bytes_text
from cost_model.graph.op_graph import SOURCES, Op, OpGraph, TensorRef
from cost_model.search.stage_partition import Spans, prefix_sums, running_totals


@dataclass(frozen=True, slots=True)
class OpCost:
    """The costs that one op adds to the stage that runs it, on its slowest tp rank."""

    seconds: float  # compute and collectives, where devices do not differ
    state_bytes: int  # KV cache that it keeps
    # May a later stage compute it again? (no weights, no collectives, no side effects, no buffer that is written)
    repeatable: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: ops [start, stop) of the sequence, earlier ops that it computes again, and the tensors it receives."""

    start: int
    stop: int
    recomputed: tuple[str, ...]
    received: tuple[TensorRef, ...]


# arrival(k, stage, starts): seconds in which stage k, as `stage` has it, receives its tensors. `starts` are the
# positions where stages begin, or () while unknown: then every tensor is taken to come from stage k - 1.
Arrival = Callable[[int, Stage, Sequence[int]], float]


class PipelineSearch:
    """Cuts one graph into stages.

    `costs` are by op; `send_seconds` has the seconds to hand a tensor to another stage, `weight_bytes` the bytes of a
    parameter or buffer on the fullest tp rank. `sizes` are the lengths by symbol ("B", "S", ...) at which the bytes
    over a border are counted; the graph's examples where none is given.
    """

    def __init__(
        self,
        graph: OpGraph,
        costs: Mapping[str, OpCost],
        send_seconds: Mapping[TensorRef, float],
        weight_bytes: Mapping[str, int],
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self.graph = graph
        self.costs = costs
        self.send_seconds = send_seconds
        self.weight_bytes = weight_bytes
        self.sequence = [op.name for op in graph if op.kind not in SOURCES]
        self.position = {name: i for i, name in enumerate(self.sequence)}
        self._state = prefix_sums([costs[name].state_bytes for name in self.sequence])
        self._counts, self._bytes = self._crossing(sizes or {})
        self._divided = self._divided_state()

    # -- where cuts may be -------------------------------------------------------------------------------------------

    def _crossing(self, lengths: Mapping[str, int]) -> tuple[list[int], list[int]]:
        """Returns, for each position, how many tensors that depend on weights are made before it and used after it, and
        their bytes."""
        counts, sizes = [0] * (len(self.sequence) + 1), [0] * (len(self.sequence) + 1)
        outputs = set(self.graph.outputs)
        for name in self.sequence:
            if name not in self.graph.from_weights:
                continue
            for j, spec in enumerate(self.graph[name].outputs):
                ref = TensorRef(name, j)
                users = [self.position[user] for user, _ in self.graph.users.get(ref, ())]
                last = max(users, default=self.position[name])
                if ref in outputs:
                    last = max(last, self.position[name])  # leaves the model from where it is made
                nbytes = spec.at(lengths).nbytes
                counts[self.position[name] + 1] += 1
                sizes[self.position[name] + 1] += nbytes
                counts[last + 1] -= 1
                sizes[last + 1] -= nbytes
        return running_totals(counts), running_totals(sizes)

    def _divided_state(self) -> dict[int, str]:
        """Maps each position where no cut may be to the buffer that ops before it and behind it read or write."""
        return {
            position: name
            for name, users in self.graph.state.items()
            for position in range(self.position[users[0]] + 1, self.position[users[-1]] + 1)
        }

    def candidates(self, enough: int = 1) -> list[int]:
        """Returns the positions worth cutting at: where the fewest tensors cross, and fewer bytes than next to them.

        Where these are not `enough`, because some tensor is used far on, adds those that one more tensor crosses, and
        so on.
        """
        counts = [math.inf if p in self._divided else count for p, count in enumerate(self._counts)]
        sizes = self._bytes
        inner = [
            p
            for p in range(1, len(self.sequence))
            if 0 < counts[p] < math.inf
            and (counts[p], sizes[p]) <= (counts[p - 1] or math.inf, sizes[p - 1])
            and (counts[p], sizes[p]) < (counts[p + 1] or math.inf, sizes[p + 1])
        ]
        places: list[int] = []
        for most in sorted({counts[p] for p in inner}):
            places = [p for p in inner if counts[p] <= most]
            if len(places) >= enough:
                break
        return places

    # -- the cuts ------------------------------------------------------------------------------------------------------

    def solve(
        self,
        stages: int,
        max_memory: Sequence[int] | None = None,
        *,
        seconds: Sequence[Mapping[str, float]] | None = None,
        cuts: Sequence[int] | None = None,
        balance: str = "seconds",
        arrival: Arrival = lambda k, stage, starts: 0.0,
    ) -> list[Stage]:
        """Returns the best `stages` stages, in order.

        max_memory: by stage, the bytes of weights and caches that its device may hold.
        seconds: by stage, of each op on its device, where the stages' devices differ; else `costs` has them.
        cuts: positions to cut at, where they are given and nothing is left to search.
        balance: "seconds" (the slowest stage as fast as can be) or "bytes" (the fullest as empty as can be, as a share
            of its memory, then the slowest as fast as can be); the bytes over the hops decide between equals.
        arrival: seconds to receive a stage's tensors. A stage's seconds are this, its ops', and those of what it
            computes again.

        Raises MeshError when there are fewer places to cut than needed, or a given one divides the ops that read and
        write a buffer; NoPlanFits when memory rules all out.
        """
        alike = {name: cost.seconds for name, cost in self.costs.items()}
        self.times = [dict(s) for s in seconds] if seconds is not None else [alike] * stages
        until = {id(t): prefix_sums([t[name] for name in self.sequence]) for t in self.times}
        self._until = [until[id(t)] for t in self.times]
        self.arrival = arrival
        if cuts is None:
            places = self.candidates(stages - 1) if stages > 1 else []
            cuts = self._place(stages, places, max_memory, balance)
        else:
            divided = next((self._divided[cut] for cut in cuts if cut in self._divided), None)
            if divided is not None:
                raise MeshError(
                    f"a cut divides the ops that read and write {divided}, which is kept from call to call and lies on "
                    "one stage: move the cut, or leave it to the search"
                )
            cuts = [0, *cuts, len(self.sequence)]
            self._check_memory(cuts, max_memory)
        return [self.stage(k, a, b) for k, (a, b) in enumerate(itertools.pairwise(cuts))]

    def _place(
        self,
        stages: int,
        places: list[int],
        max_memory: Sequence[int] | None,
        balance: str,
    ) -> list[int]:
        """Returns the ends of the best stages: 0, a cut among `places` for each border, and the sequence's length."""
        if len(places) < stages - 1:
            raise MeshError(
                f"pp={stages} needs {stages - 1} cuts, but the model has only {len(places)} places to cut it: "
                f"use pp={len(places) + 1} at most"
            )
        ends = [0, *places, len(self.sequence)]
        spans = Spans(len(ends) - 1, stages)
        if max_memory is not None or balance == "bytes":
            held = self._held_between(ends)
            if max_memory is not None:
                spans.restrict(lambda k, i, j: held[i, j], max_memory)
            if balance == "bytes":
                limits = max_memory or [1] * stages
                spans.flatten(lambda k, i, j: held[i, j] / limits[k])
        before = self._before(ends[:-1], stages)
        spans.flatten(lambda k, i, j: before[k][i] + self._until[k][ends[j]] - self._until[k][ends[i]])
        path = spans.shortest(lambda k, i, j: self._bytes[ends[j]] if j < len(ends) - 1 else 0)
        if path is None:
            raise NoPlanFits(self._too_big(stages, max_memory, spans.least(lambda k, i, j: held[i, j])))
        return [ends[i] for i in path]

    def _before(self, starts: Sequence[int], stages: int) -> list[list[float]]:
        """Returns, as [k][i], the seconds of receiving and computing again if stage k began at starts[i].

        Where the stage would end is not known: taken is what all ops from there to the end of the sequence need, which
        in layers that are alike is what the stage's own ops need.
        """
        end = len(self.sequence)
        seconds: list[list[float]] = []
        to_the_end: dict[int, list[Stage]] = {}
        for k in range(stages):
            times = self.times[k]
            if k and id(times) not in to_the_end:  # nothing is needed at 0, where only stage 0 begins
                to_the_end[id(times)] = [
                    self._stage_of(a, end, needed, times) for a, needed in zip(starts, self._needed_at(starts))
                ]
            candidates = to_the_end[id(times)] if k else []
            seconds.append([self._start_seconds(k, stage, ()) for stage in candidates] or [0.0] * len(starts))
        return seconds

    def _start_seconds(self, k: int, stage: Stage, starts: Sequence[int]) -> float:
        """Returns the seconds before a stage's own ops: receiving, and computing again."""
        return sum(self.times[k][name] for name in stage.recomputed) + self.arrival(k, stage, starts)

    def _needed_at(self, starts: Sequence[int]) -> list[list[TensorRef]]:
        """Returns, for each position of `starts` (ascending), the tensors made before it and used there or later."""
        spans = [
            (self.position[ref.op], max(self.position[user] for user, _ in users), ref)
            for ref, users in self.graph.users.items()
            if ref.op in self.position and users
        ]
        spans.sort(key=lambda span: span[0])
        found: list[list[TensorRef]] = []
        crossing: list[tuple[int, int, TensorRef]] = []
        at = 0
        for start in starts:
            while at < len(spans) and spans[at][0] < start:
                crossing.append(spans[at])
                at += 1
            crossing = [span for span in crossing if span[1] >= start]
            found.append([ref for _, _, ref in crossing])
        return found

    def _held_between(self, ends: Sequence[int]) -> dict[tuple[int, int], int]:
        """Returns, by (i, j) for all i < j, the bytes of weights and caches of ops [ends[i], ends[j]); a weight that is
        used twice counts once."""
        found: dict[tuple[int, int], int] = {}
        reads = [
            [ref.op for ref in self.graph[name].inputs if ref.op in self.weight_bytes] for name in self.sequence
        ]
        for i, start in enumerate(ends):
            seen: set[str] = set()
            total = 0
            for j in range(i + 1, len(ends)):
                for names in reads[ends[j - 1] : ends[j]]:
                    for weight in names:
                        if weight not in seen:
                            seen.add(weight)
                            total += self.weight_bytes[weight]
                found[i, j] = total + int(self._state[ends[j]] - self._state[start])
        return found

    def _check_memory(self, cuts: Sequence[int], max_memory: Sequence[int] | None) -> None:
        """Checks the stages of given cuts against the memory of their devices. Raises NoPlanFits naming the stage."""
        if max_memory is None:
            return
        held = self._held_between(cuts)
        for k, limit in enumerate(max_memory):
            if held[k, k + 1] > limit:
                modules = (self.graph[name].module for name in self.sequence[cuts[k] :])
                raise NoPlanFits(
                    f"stage {k}, from {next(filter(None, modules), 'the start')}, holds "
                    f"{bytes_text(held[k, k + 1])} of weights and KV cache, and its device {bytes_text(limit)}: move "
                    "the cuts, or leave them to the search"
                )

    def _too_big(self, stages: int, max_memory: Sequence[int] | None, least: float) -> str:
        """Formats the error that no cut fits. `least`: bytes of the fullest stage if stages are as even as can be."""
        total = sum(self.weight_bytes.values()) + int(self._state[-1])
        limits = [bytes_text(limit) for limit in dict.fromkeys(max_memory or [0])]
        holds = f"a device holds {limits[0]}" if len(limits) == 1 else f"the devices hold {', '.join(limits)}"
        fullest = f", {bytes_text(least)} on the fullest at best" if stages > 1 else ""
        return (
            f"no cut into {stages} stages fits: weights and KV cache take {bytes_text(total)} over the stages of one "
            f"tp rank{fullest}, and {holds}: use more ranks (tp or pp), a smaller dtype, or raise max_memory"
        )

    def crossing(self, position: int) -> list[TensorRef]:
        """Returns the tensors that depend on weights, are made before `position` and used behind it."""
        return [
            ref
            for ref, users in self.graph.users.items()
            if ref.op in self.position
            and ref.op in self.graph.from_weights
            and self.position[ref.op] < position <= max(self.position[user] for user, _ in users)
        ]

    def stage_seconds(self, k: int, stage: Stage, starts: Sequence[int]) -> float:
        """Returns the seconds of stage k, as `stage` has it, in a pipeline whose stages begin at `starts`: its ops,
        what it computes again, and what it receives."""
        own = self._until[k][stage.stop] - self._until[k][stage.start]
        return own + self._start_seconds(k, stage, starts)

    # -- what crosses --------------------------------------------------------------------------------------------------

    def stage(self, k: int, start: int, stop: int) -> Stage:
        """Returns ops [start, stop) as stage k, with what crosses into it. Valid only after `solve`."""
        return self.stage_of_ops(start, stop, self.times[k])

    def stage_of_ops(self, start: int, stop: int, seconds: Mapping[str, float] | None = None) -> Stage:
        """Returns ops [start, stop) as a stage; `seconds` by op on its device, None: as `costs` has them."""
        needed = [
            ref
            for name in self.sequence[start:stop]
            for ref in self.graph[name].inputs
            if ref.op in self.position and self.position[ref.op] < start
        ]
        seconds = seconds or {name: self.costs[name].seconds for name in self.sequence}
        return self._stage_of(start, stop, list(dict.fromkeys(needed)), seconds)

    def _stage_of(self, start: int, stop: int, needed: Sequence[TensorRef], seconds: Mapping[str, float]) -> Stage:
        """Returns the stage of ops [start, stop), which read the tensors `needed` from before `start`."""
        recomputed = self._recompute(needed, seconds)
        inside = set(recomputed)
        wanted = [ref for ref in needed if ref.op not in inside]
        for name in recomputed:
            wanted += [r for r in self.graph[name].inputs if r.op in self.position and r.op not in inside]
        received = tuple(sorted(dict.fromkeys(wanted), key=lambda r: (self.position[r.op], r.index)))
        return Stage(start, stop, tuple(sorted(recomputed, key=self.position.__getitem__)), received)

    def _recompute(self, needed: Sequence[TensorRef], seconds: Mapping[str, float]) -> list[str]:
        """Chooses the ops to compute again so that the tensors `needed` are there at least cost.

        Minimum cut. Each op has two vertices, "its value is wanted here" and "it is computed here"; to want it without
        computing it costs a send, to compute it costs its seconds and makes its inputs wanted. Ops that cost more to
        compute than to send are not followed further: computing them is never part of a minimum.
        """
        if not needed:
            return []
        flow: nx.DiGraph[object] = nx.DiGraph()
        flow.add_nodes_from(("start", "end"))
        stack = [ref.op for ref in needed]
        sends: dict[str, float] = {}
        stuck: list[Op] = []
        for ref in needed:
            flow.add_edge("start", ("wanted", ref.op))  # no capacity: infinite
        seen: set[str] = set()
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            op, cost = self.graph[name], self.costs[name]
            sends[name] = sum(self.send_seconds[TensorRef(name, j)] for j in range(len(op.outputs)))
            can_send = bool(op.outputs) and math.isfinite(sends[name])
            if not cost.repeatable and not can_send:
                flow.add_edge(("wanted", name), "end")  # infinite: what is computed from it must be sent in its place
                stuck.append(op)
                continue
            if not cost.repeatable or (can_send and seconds[name] >= sends[name]):
                flow.add_edge(("wanted", name), "end", capacity=sends[name])
                continue
            if can_send:
                flow.add_edge(("wanted", name), ("computed", name), capacity=sends[name])
            else:
                flow.add_edge(("wanted", name), ("computed", name))  # a number: never sent
            flow.add_edge(("computed", name), "end", capacity=seconds[name])
            for ref in op.inputs:
                if ref.op in self.position:
                    flow.add_edge(("computed", name), ("wanted", ref.op))
                    stack.append(ref.op)
        try:
            _, (side, _) = nx.minimum_cut(flow, "start", "end")
        except nx.NetworkXUnbounded:
            raise MeshError(
                f"{stuck[0]} is needed in a later stage, but can neither be sent there (a length that no input of the "
                f"model has) nor computed again: use fewer stages"
            ) from None
        return [name for name in seen if ("computed", name) in side]


