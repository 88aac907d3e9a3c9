"""The pipeline search: where to cut the op sequence into stages, and what crosses each cut.

Cuts are positions in execution order. Dynamic programming places them: the slowest stage as fast as can be, then the
fewest bytes over the hops, each stage within its device's memory. What a stage needs from before it is either received
or computed again from what it has (graph inputs go to every rank): a minimum cut in networkx decides, stage by stage,
so that masks and rotary tables are recomputed and hidden states are sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from cost_model.errors import MeshError, NoPlanFits
from cost_model.op_graph import SOURCES, Op, OpGraph, TensorRef


@dataclass(frozen=True, slots=True)
class OpCost:
    """What one op adds to the stage that runs it, on its slowest tp rank."""

    seconds: float  # compute and collectives
    state_bytes: int  # KV cache that it keeps
    repeatable: bool  # may a later stage compute it again? (no weights, no collectives, no side effects)


@dataclass(frozen=True, slots=True)
class Stage:
    """Ops [start, stop) of the sequence, what it computes again, and the tensors it receives."""

    start: int
    stop: int
    recomputed: tuple[str, ...]
    received: tuple[TensorRef, ...]


class PipelineSearch:
    """Cuts one graph into stages. `send_seconds(ref)` is the time to hand that tensor to another stage;
    `weight_bytes` are a parameter's bytes on the slowest tp rank."""

    def __init__(
        self,
        graph: OpGraph,
        costs: Mapping[str, OpCost],
        send_seconds: Mapping[TensorRef, float],
        weight_bytes: Mapping[str, int],
    ) -> None:
        self.graph = graph
        self.costs = costs
        self.send_seconds = send_seconds
        self.weight_bytes = weight_bytes
        self.sequence = [op.name for op in graph if op.kind not in SOURCES]
        self.position = {name: i for i, name in enumerate(self.sequence)}
        self._seconds = _prefix_sums([costs[name].seconds for name in self.sequence])
        self._state = _prefix_sums([costs[name].state_bytes for name in self.sequence])
        self._from_weights = self._weight_derived()

    # -- where cuts may be -------------------------------------------------------------------------------------------

    def _weight_derived(self) -> set[str]:
        found: set[str] = set()
        for op in self.graph:
            if op.kind == "param" or any(ref.op in found for ref in op.inputs):
                found.add(op.name)
        return found

    def _crossing(self) -> tuple[list[int], list[int]]:
        """At each position: how many tensors, and bytes, derived from weights are made before it and used after."""
        counts, sizes = [0] * (len(self.sequence) + 1), [0] * (len(self.sequence) + 1)
        outputs = set(self.graph.outputs)
        for name in self.sequence:
            if name not in self._from_weights:
                continue
            for j, spec in enumerate(self.graph[name].outputs):
                ref = TensorRef(name, j)
                users = [self.position[user] for user, _ in self.graph.users.get(ref, ())]
                last = max(users, default=self.position[name])
                if ref in outputs:
                    last = max(last, self.position[name])  # leaves the model from where it is made
                counts[self.position[name] + 1] += 1
                sizes[self.position[name] + 1] += spec.nbytes
                counts[last + 1] -= 1
                sizes[last + 1] -= spec.nbytes
        return _running(counts), _running(sizes)

    def candidates(self, enough: int = 1) -> list[int]:
        """Positions worth cutting at: where the fewest tensors cross, and fewer bytes than at their neighbours.

        Where these are not `enough`, because some tensor is used far on, also those that one more tensor crosses.
        """
        counts, sizes = self._crossing()
        inner = [
            p
            for p in range(1, len(self.sequence))
            if counts[p] > 0
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

    def solve(self, stages: int, memory_bytes: Sequence[int] | None = None) -> list[Stage]:
        """The best `stages` stages. `memory_bytes[k]` is what stage k's device holds of weights and caches.

        Raises MeshError when there are fewer places to cut than needed, NoPlanFits when memory rules all out.
        """
        if stages == 1:
            cuts = [0, len(self.sequence)]
            if memory_bytes is not None and self._held(0, len(self.sequence)) > memory_bytes[0]:
                raise NoPlanFits(self._too_big(stages, memory_bytes))
        else:
            cuts = self._place(stages, self.candidates(stages - 1), memory_bytes)
        return [self._stage(a, b) for a, b in itertools.pairwise(cuts)]

    def _place(self, stages: int, places: list[int], memory_bytes: Sequence[int] | None) -> list[int]:
        if len(places) < stages - 1:
            raise MeshError(
                f"pp={stages} needs {stages - 1} cuts, but the model has only {len(places)} places to cut it: "
                f"use pp={len(places) + 1} at most"
            )
        _, crossing = self._crossing()
        ends = [0, *places, len(self.sequence)]
        best: list[dict[int, tuple[float, int, int]]] = [{0: (0.0, 0, -1)}]  # end -> (slowest, bytes over hops, from)
        for k in range(stages):
            row: dict[int, tuple[float, int, int]] = {}
            for j, end in enumerate(ends):
                if (k == stages - 1) != (end == ends[-1]):
                    continue
                for i in range(j):
                    before = best[k].get(i)
                    if before is None or (
                        memory_bytes is not None and self._held(ends[i], end) > memory_bytes[k]
                    ):
                        continue
                    slowest = max(before[0], self._seconds[end] - self._seconds[ends[i]])
                    option = (slowest, before[1] + (crossing[end] if end != ends[-1] else 0), i)
                    if j not in row or option < row[j]:
                        row[j] = option
            best.append(row)
        at = len(ends) - 1
        if at not in best[stages]:
            raise NoPlanFits(self._too_big(stages, memory_bytes))
        cuts = []
        for k in range(stages, -1, -1):
            cuts.append(ends[at])
            at = best[k][at][2]
        return cuts[::-1]

    def _held(self, start: int, stop: int) -> int:
        """Bytes of weights and caches of ops [start, stop); a weight used twice counts once."""
        names = {
            ref.op
            for name in self.sequence[start:stop]
            for ref in self.graph[name].inputs
            if ref.op in self.weight_bytes
        }
        return sum(self.weight_bytes[n] for n in names) + int(self._state[stop] - self._state[start])

    def _too_big(self, stages: int, memory_bytes: Sequence[int] | None) -> str:
        total = sum(self.weight_bytes.values()) + int(self._state[-1])
        limit = max(memory_bytes or [0])
        return (
            f"no cut into {stages} stages fits: weights and KV cache take {total / 2**30:.2f} GiB over the stages of "
            f"one tp rank, and a device holds {limit / 2**30:.2f} GiB: use more ranks (tp or pp), a smaller dtype, or "
            f"raise max_memory"
        )

    def crossing(self, position: int) -> list[TensorRef]:
        """The tensors that depend on weights, are made before `position` and used behind it."""
        return [
            ref
            for ref, users in self.graph.users.items()
            if ref.op in self.position
            and ref.op in self._from_weights
            and self.position[ref.op] < position <= max(self.position[user] for user, _ in users)
        ]

    def stage_seconds(self, start: int, stop: int) -> float:
        """Of ops [start, stop), without sends and what is computed again."""
        return self._seconds[stop] - self._seconds[start]

    # -- what crosses --------------------------------------------------------------------------------------------------

    def _stage(self, start: int, stop: int) -> Stage:
        needed = [
            ref
            for name in self.sequence[start:stop]
            for ref in self.graph[name].inputs
            if ref.op in self.position and self.position[ref.op] < start
        ]
        needed = list(dict.fromkeys(needed))
        recomputed = self._recompute(needed)
        inside = set(recomputed)
        wanted = [ref for ref in needed if ref.op not in inside]
        for name in recomputed:
            wanted += [r for r in self.graph[name].inputs if r.op in self.position and r.op not in inside]
        received = tuple(sorted(dict.fromkeys(wanted), key=lambda r: (self.position[r.op], r.index)))
        return Stage(start, stop, tuple(sorted(recomputed, key=self.position.__getitem__)), received)

    def _recompute(self, needed: Sequence[TensorRef]) -> list[str]:
        """Which ops to compute again so that `needed` is there at least cost.

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
                flow.add_edge(("wanted", name), "end")  # infinite: whatever reads it is to be sent instead
                stuck.append(op)
                continue
            if not cost.repeatable or (can_send and cost.seconds >= sends[name]):
                flow.add_edge(("wanted", name), "end", capacity=sends[name])
                continue
            if can_send:
                flow.add_edge(("wanted", name), ("computed", name), capacity=sends[name])
            else:
                flow.add_edge(("wanted", name), ("computed", name))  # a number: never sent
            flow.add_edge(("computed", name), "end", capacity=cost.seconds)
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


def _prefix_sums(values: Sequence[float]) -> list[float]:
    sums = [0.0]
    for v in values:
        sums.append(sums[-1] + v)
    return sums


def _running(steps: Sequence[int]) -> list[int]:
    total, out = 0, []
    for step in steps:
        total += step
        out.append(total)
    return out
