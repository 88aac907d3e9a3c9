"""Chooses tp and pp: plans every mesh of some devices, and ranks them by the user's objective.

latency      seconds of one forward through all stages: of one token, for a model that decodes
throughput   tokens/s of all devices under load: each mesh with as many sequences in flight as it has memory for, up to
             LOAD a device. Stages work on a micro-batch each, so the slowest sets the pace
memory       bytes of the fullest rank

A mesh may take a part of the devices only, N / 2 or N / 4 of them, say. For latency the rest is left over; for
throughput the rest runs more copies of the same split, each with its share of the sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cost_model.errors import AutodistError, MeshError, NoPlanFits, PlanError
from cost_model.format import bytes_text, seconds_text
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.request.pins import roles_by_pin
from cost_model.request.plan_request import PlanRequest
from cost_model.search.plan_search import SharedSearches
from cost_model.search.planner import forward_seconds, plan
from cost_model.text_tables import table

OBJECTIVES = ("latency", "throughput", "memory")
LOAD = 256  # sequences in flight a device, at most: what vLLM admits by default (max_num_seqs)
NEAR = 1.1  # times the best mesh's seconds: a mesh of fewer devices within that is named in a remark


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mesh with its plan. Seconds and bytes are predictions at the plan's sizes (`plan.sizes`)."""

    plan: PartitionPlan
    copies: int  # how many times the split model runs side by side on all devices
    sequences: int  # sequences in flight in one copy, over all its micro-batches
    fits: bool  # weights, caches and activations fit into a device's memory
    seconds: float  # one forward through all stages
    prompt_seconds: float | None  # a prompt as long as what is cached; None without a cache, or with one of its own
    tokens_per_second: float  # over all copies; samples/s for a model without tokens

    @property
    def mesh(self) -> Mesh:
        """The plan's mesh."""
        return self.plan.mesh

    @property
    def memory_bytes(self) -> int:
        """Bytes that the fullest rank holds."""
        return max(stage.memory_bytes for stage in self.plan.stages)


@dataclass(frozen=True, slots=True)
class MeshChoice:
    """The ranked meshes: candidates, the best first, those that do not fit last; `impossible`, meshes without a plan,
    and why."""

    model: str
    devices: int
    objective: str
    candidates: tuple[Candidate, ...]
    impossible: tuple[tuple[Mesh, str], ...]

    @property
    def best(self) -> Candidate:
        """The candidate that comes first, which is the choice."""
        return self.candidates[0]

    def __str__(self) -> str:
        return choice_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the choice as JSON-ready values: the mesh, sizes and predictions of each plan."""
        return {
            "model": self.model,
            "devices": self.devices,
            "hardware": self.best.plan.hardware,
            "objective": self.objective,
            "candidates": [
                {
                    "tp": c.mesh.tp,
                    "pp": c.mesh.pp,
                    "copies": c.copies,
                    "sizes": dict(c.plan.sizes),
                    "sequences": c.sequences,
                    "fits": c.fits,
                    "seconds": c.seconds,
                    "prompt_seconds": c.prompt_seconds,
                    "tokens_per_second": c.tokens_per_second,
                    "memory_bytes": c.memory_bytes,
                }
                for c in self.candidates
            ],
            "impossible": [{"tp": mesh.tp, "pp": mesh.pp, "why": why} for mesh, why in self.impossible],
        }


def choose_mesh(
    graph: OpGraph,
    request: PlanRequest,
    devices: int,
    *,
    model: str,
    fingerprint: str,
    sequences: int | None = None,
) -> MeshChoice:
    """Plans every mesh whose ranks divide `devices`, and ranks them by `request.objective`.

    The request's own mesh is ignored. Its memory limit, that of the first stage, holds for every device; without one,
    USABLE of the device's memory. `sequences`: in flight over all devices under load; None: as many as each mesh has
    memory for, up to LOAD a device. `model` and `fingerprint` are written into the plans.

    Raises PlanError (a bad request), MeshError (no mesh can be planned), NoPlanFits (none fits).
    """
    if request.objective not in OBJECTIVES:
        raise PlanError(f"no mesh is chosen for objective {request.objective!r}: choose one of {', '.join(OBJECTIVES)}")
    if devices < 1:
        raise MeshError(f"{devices} devices: there must be one at least")
    roles_by_pin(graph, request.pin)  # raises here for wrong pins, which every mesh would refuse
    chooser = _Chooser(graph, request, devices, sequences, model, fingerprint)
    candidates: list[Candidate] = []
    impossible: list[tuple[Mesh, AutodistError]] = []
    for mesh in _meshes(devices, len(request.cuts) + 1 if request.cuts else None):
        try:
            candidates.append(chooser.candidate(mesh))
        except (MeshError, PlanError) as error:
            impossible.append((mesh, error))
    if not candidates:
        no_mesh = MeshError(f"no mesh of {devices} devices has pp={len(request.cuts) + 1}: give other cuts, or none")
        raise impossible[0][1] if impossible else no_mesh
    ranked = sorted(candidates, key=lambda c: (not c.fits, _rank(c, request.objective), c.mesh.size))
    if not ranked[0].fits:
        least = min(candidates, key=lambda c: c.memory_bytes)
        raise NoPlanFits(
            f"{model} fits on no mesh of {devices} devices: the least is {bytes_text(least.memory_bytes)} on a rank "
            f"with {least.mesh}, and a device holds {bytes_text(chooser.max_memory)}: use more devices, a smaller "
            f"dtype, or fewer or shorter sequences"
        )
    return MeshChoice(model, devices, request.objective, tuple(ranked), tuple((m, str(e)) for m, e in impossible))


def _meshes(devices: int, pp: int | None) -> Iterator[Mesh]:
    """Yields the meshes whose number of ranks divides `devices`; only those with `pp` stages, if that is given."""
    for ranks in range(1, devices + 1):
        if devices % ranks == 0:
            for tp in range(1, ranks + 1):
                if ranks % tp == 0 and pp in (None, ranks // tp):
                    yield Mesh(tp, ranks // tp)


def _rank(candidate: Candidate, objective: str) -> float:
    """Returns the figure that candidates are sorted by, the least first."""
    if objective == "latency":
        return candidate.seconds
    return -candidate.tokens_per_second if objective == "throughput" else float(candidate.memory_bytes)


class _Chooser:
    """Plans one mesh after another; searches that depend on tp alone are made once."""

    def __init__(
        self, graph: OpGraph, request: PlanRequest, devices: int, sequences: int | None, model: str, fingerprint: str
    ) -> None:
        self.graph = graph
        self.request = request
        self.devices = devices
        self.sequences = sequences
        self.model, self.fingerprint = model, fingerprint
        self.shared: SharedSearches = {}
        self.max_memory = request.limits[0]
        self.is_loaded = request.objective == "throughput"

    def candidate(self, mesh: Mesh) -> Candidate:
        """Plans `mesh`; under load with as many sequences as there are, or as its memory allows.

        Raises MeshError or PlanError when there is no plan.
        """
        copies = self.devices // mesh.size
        if not self.is_loaded:
            return self._planned(mesh, copies, None)
        # Sequences of one micro-batch; a pipeline that is kept full has one micro-batch for each stage.
        share = (self.sequences or LOAD * self.devices) // (copies * mesh.pp)
        found = self._planned(mesh, copies, max(share, 1))
        while not found.fits and self.sequences is None and (fewer := self._fewer(found)):
            found = self._planned(mesh, copies, fewer)
        return found

    def _fewer(self, found: Candidate) -> int:
        """Returns a smaller micro-batch, a power of two, for which the fullest stage may have memory; 0 where its
        weights alone are too large."""
        batch = dict(found.plan.sizes)["B"]
        most = batch - 1
        for stage in found.plan.stages:
            a_sequence = (stage.memory_bytes - stage.weight_bytes) / batch
            if stage.memory_bytes > self.max_memory:
                most = min(most, int((self.max_memory - stage.weight_bytes) / a_sequence))
        return 2 ** int(math.log2(most)) if most >= 1 else 0

    def _planned(self, mesh: Mesh, copies: int, batch: int | None) -> Candidate:
        """Plans `mesh` with micro-batches of `batch` sequences, at the request's own sizes for None; without a memory
        limit where no plan keeps within it."""
        sizes = self.request.sizes if batch is None else (*dict(self.request.sizes, B=batch).items(),)
        in_flight = mesh.pp if batch is not None else 1
        wanted = replace(
            self.request,
            mesh=mesh,
            sizes=sizes,
            in_flight=in_flight,
            max_memory=(self.max_memory,) * mesh.pp,
            ranks_at_once=copies * mesh.size if batch is not None else 0,
        )
        try:
            planned = self._plan(wanted)
        except NoPlanFits:
            planned = self._plan(replace(wanted, max_memory=None))
        used = dict(planned.sizes)
        pace = max(stage.seconds for stage in planned.stages) if in_flight > 1 else planned.predicted_seconds
        return Candidate(
            plan=planned,
            copies=copies,
            sequences=used["B"] * in_flight,
            fits=all(stage.memory_bytes <= self.max_memory for stage in planned.stages),
            seconds=planned.predicted_seconds,
            prompt_seconds=self._prompt_seconds(planned, wanted, used) if used.get("P") and "S" in used else None,
            tokens_per_second=copies * used["B"] * used.get("S", 1) / pace,
        )

    def _plan(self, wanted: PlanRequest) -> PartitionPlan:
        return plan(self.graph, wanted, model=self.model, fingerprint=self.fingerprint, shared=self.shared)

    def _prompt_seconds(self, planned: PartitionPlan, wanted: PlanRequest, used: Mapping[str, int]) -> float:
        """Predicts the seconds to compute what the cache holds as one prompt of one sequence."""
        return forward_seconds(self.graph, planned, wanted, {**used, "B": 1, "S": used["P"], "P": 0}, self.shared)


# -- as text -----------------------------------------------------------------------------------------------------------


def choice_text(choice: MeshChoice) -> str:
    """Formats a choice as a table, the best mesh first, and remarks."""
    sizes = dict(choice.best.plan.sizes)
    at = ", ".join(f"{symbol}={n}" for symbol, n in sizes.items() if symbol != "B" or choice.objective != "throughput")
    hardware = choice.best.plan.hardware
    lines = [f"{choice.model} on {choice.devices} {hardware}, by {choice.objective}; predicted at {at}", ""]
    step = "a token" if sizes.get("P") else "a forward"
    prompt = [f"prompt of {sizes['P']}"] if sizes.get("P") and "S" in sizes else []
    pace = "tokens/s" if "S" in sizes or "P" in sizes else "samples/s"
    rows = [["", "mesh", "copies", "sequences", step, *prompt, pace, "memory", ""]]
    for number, c in enumerate(choice.candidates, 1):
        rows.append([
            str(number),
            str(c.mesh),
            str(c.copies),
            str(c.sequences * c.copies),  # on all devices, as tokens/s are counted
            seconds_text(c.seconds),
            *([seconds_text(c.prompt_seconds)] if c.prompt_seconds is not None else ["-"] * len(prompt)),
            f"{c.tokens_per_second:.0f}",
            bytes_text(c.memory_bytes),
            "chosen" if number == 1 else "" if c.fits else "does not fit",
        ])  # fmt: skip
    lines += table(rows, left=(0, 1, 8 if prompt else 7), flexible=1)
    return "\n".join(line.rstrip() for line in [*lines, "", *_remarks(choice)]).rstrip()


def _remarks(choice: MeshChoice) -> Sequence[str]:
    best, remarks = choice.best, []
    left = choice.devices - best.mesh.size
    if choice.objective == "latency":
        if left:
            are = "is" if left == 1 else "are"
            remarks.append(f"{left} of {choice.devices} devices {are} left over: more ranks would be slower.")
        fewer = [c for c in choice.candidates if c.fits and c.mesh.size < best.mesh.size]
        if near := [c for c in fewer if c.seconds <= NEAR * best.seconds]:
            small = min(near, key=lambda c: c.mesh.size)
            slower = small.seconds / best.seconds - 1
            remarks.append(f"{small.mesh}, with {small.mesh.size} of the devices, is only {slower:.0%} slower.")
    if choice.objective == "throughput" and best.copies > 1:
        remarks.append(f"{best.copies} copies of {best.mesh} side by side, each with its share of the sequences.")
    if choice.objective == "throughput" and any(c.mesh.pp > 1 for c in choice.candidates):
        remarks.append("Tokens/s of pp > 1 are those of a pipeline that as many micro-batches as stages keep full.")
    remarks += [f"{mesh}: {why}" for mesh, why in choice.impossible]
    return remarks
