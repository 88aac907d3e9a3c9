"""Chooses how to train: mesh (tp, pp, dp), microbatches, schedule, recomputation and ZeRO-1, for a global batch.

Every mesh of all devices is planned, and a step of it predicted on 1F1B with several numbers of microbatches; the
best meshes then on other schedules, too. To make a step fit, what costs least is tried first: nothing, then ZeRO-1
(the same bytes are sent), then recomputation (a third more compute).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cost_model.costs.hardware import Hardware
from cost_model.errors import AutodistError, MeshError, NoPlanFits, PlanError, ScheduleError
from cost_model.format import bytes_text, seconds_text
from cost_model.graph.op_graph import OpGraph
from cost_model.mesh import Mesh
from cost_model.partition_plan import PartitionPlan
from cost_model.request.pins import roles_by_pin
from cost_model.request.plan_request import PlanRequest
from cost_model.schedule.schedule import Schedule
from cost_model.search.plan_search import SharedSearches
from cost_model.search.planner import plan
from cost_model.text_tables import table
from cost_model.training.estimate import StepEstimate, StepSetup, estimate_step, gradient_bytes, state_bytes
from cost_model.training.stage_work import WorkAnalysis

PLAIN = "1f1b"
OTHERS = ("interleaved_1f1b", "zbv_zero_bubble", "interleaved_zero_bubble")  # two stages a rank
_BUSY = 8  # microbatches a stage, at most: the bubble of 1F1B is then 1/9 of the step, and little is left to gain
_FINALISTS = 4  # meshes that are tried on other schedules


class ScheduleMaker(Protocol):
    """Makes a schedule by name; raises ScheduleError for numbers that do not go together."""

    def __call__(self, name: str, ranks: int, microbatches: int) -> Schedule: ...


@dataclass(frozen=True, slots=True)
class TrainingWishes:
    """A wish: to train on `devices`, all alike, with `global_batch` sequences a step over all of them.

    A field that is None is chosen. `has_masters`: as in StepSetup.
    """

    devices: int
    global_batch: int
    tp: int | None = None
    pp: int | None = None
    dp: int | None = None
    microbatches: int | None = None
    schedule: str | None = None
    recompute: str | None = None
    zero_stage: int | None = None
    has_masters: bool = False

    def __post_init__(self) -> None:
        for name in ("devices", "global_batch"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}: there must be one at least")
        for name, known in (("recompute", ("none", "layers")), ("zero_stage", (0, 1))):
            if getattr(self, name) not in (None, *known):
                raise PlanError(f"{name} is {getattr(self, name)!r}: it is one of {', '.join(map(str, known))}")


@dataclass(frozen=True, slots=True)
class TrainingChoice:
    """The ranked ways: the best of each mesh, those that do not fit last; `impossible`, meshes without one, and why."""

    model: str
    wishes: TrainingWishes
    limit: int  # bytes that a device may hold
    candidates: tuple[StepEstimate, ...]
    impossible: tuple[tuple[Mesh, str], ...]

    @property
    def best(self) -> StepEstimate:
        """The candidate that comes first, which is the choice."""
        return self.candidates[0]

    def fits(self, candidate: StepEstimate) -> bool:
        """Returns whether a candidate's fullest rank keeps within the limit."""
        return candidate.memory_bytes <= self.limit

    def __str__(self) -> str:
        return choice_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the choice as JSON-ready values."""
        return {
            "model": self.model,
            "devices": self.wishes.devices,
            "global_batch": self.wishes.global_batch,
            "hardware": self.best.plan.hardware,
            "sizes": dict(self.best.plan.sizes),
            "limit": self.limit,
            "candidates": [{**c.to_dict(), "fits": self.fits(c)} for c in self.candidates],
            "impossible": [{"tp": m.tp, "pp": m.pp, "dp": m.dp, "why": why} for m, why in self.impossible],
        }


def choose_training(
    graph: OpGraph,
    request: PlanRequest,
    wishes: TrainingWishes,
    make_schedule: ScheduleMaker,
    *,
    model: str,
    fingerprint: str,
) -> TrainingChoice:
    """Predicts the best step of every mesh of `wishes.devices` devices, and ranks them by seconds.

    `graph` is of the model in training mode, with its loss. The request's own mesh and batch are ignored; its memory
    limit, that of the first stage, holds for every device, USABLE of the device's memory without one.

    Raises PlanError (a bad request), MeshError (no mesh can be planned), NoPlanFits (none fits).
    """
    roles_by_pin(graph, request.pin)  # raises here for wrong pins, which every mesh would refuse
    chooser = _Chooser(graph, request, wishes, make_schedule, model, fingerprint)
    found: list[StepEstimate] = []
    impossible: list[tuple[Mesh, AutodistError]] = []
    for mesh in _meshes(wishes, request.hardware):
        try:
            found.append(chooser.best_of(mesh))
        except (MeshError, PlanError, NoPlanFits, ScheduleError) as error:
            impossible.append((mesh, error))
    if not found:
        none = MeshError(f"no mesh of {wishes.devices} devices has the tp, pp and dp that are asked for")
        raise impossible[0][1] if impossible else none
    found.sort(key=chooser.rank)
    ranked = sorted([*map(chooser.on_other_schedules, found[:_FINALISTS]), *found[_FINALISTS:]], key=chooser.rank)
    if ranked[0].memory_bytes > chooser.limit:
        least = min(found, key=lambda c: c.memory_bytes)
        raise NoPlanFits(
            f"training {model} fits on no mesh of {wishes.devices} devices: the least is "
            f"{bytes_text(least.memory_bytes)} on a rank with {least.setup.mesh}, and a device holds "
            f"{bytes_text(chooser.limit)}: use more devices, a smaller dtype, shorter sequences, or an optimizer with "
            "fewer states"
        )
    ranked[0] = replace(ranked[0], plan=chooser.explained(ranked[0].plan))
    return TrainingChoice(model, wishes, chooser.limit, tuple(ranked), tuple((m, str(e)) for m, e in impossible))


def _meshes(wishes: TrainingWishes, hardware: Hardware) -> Iterator[Mesh]:
    """Yields the meshes of all devices, with the axes that are given; tp stays inside a node where it is not given."""
    for tp in _divisors(wishes.devices):
        for pp in _divisors(wishes.devices // tp):
            mesh = Mesh(tp, pp, wishes.devices // (tp * pp))
            asked = (wishes.tp, wishes.pp, wishes.dp)
            if all(want in (None, have) for want, have in zip(asked, (mesh.tp, mesh.pp, mesh.dp), strict=True)) and (
                wishes.tp is not None or tp <= hardware.ranks_per_node
            ):
                yield mesh


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


class _Chooser:
    """Predicts one mesh after another; plans and what does not depend on the schedule are made once."""

    def __init__(
        self,
        graph: OpGraph,
        request: PlanRequest,
        wishes: TrainingWishes,
        make_schedule: ScheduleMaker,
        model: str,
        fingerprint: str,
    ) -> None:
        self.graph, self.request, self.wishes = graph, request, wishes
        self.model, self.fingerprint = model, fingerprint
        self.make_schedule = make_schedule
        self.limit = request.limits[0]
        self.parameter_bytes = sum(op.outputs[0].nbytes for op in graph if op.kind == "param")
        self.shared: SharedSearches = {}
        self.plans: dict[tuple[int, int], PartitionPlan] = {}
        self.analyses: dict[tuple[int, int, int], WorkAnalysis] = {}

    def best_of(self, mesh: Mesh) -> StepEstimate:
        """Returns the best way to run a step on a mesh. Raises MeshError, PlanError or ScheduleError where there is
        none."""
        batch = self.wishes.global_batch
        if batch % mesh.dp:
            raise MeshError(f"{batch} sequences are not the same number for each of {mesh.dp} replicas")
        self._refuse_too_large(mesh)
        replica = batch // mesh.dp
        name = self.wishes.schedule or PLAIN
        return min(self._estimates(mesh, name, self._counts(mesh, replica), replica), key=self.rank)

    def on_other_schedules(self, found: StepEstimate) -> StepEstimate:
        """Returns the best of a step and of the same step on other schedules."""
        mesh, count = found.setup.mesh, found.setup.schedule.microbatches
        if self.wishes.schedule is not None or mesh.pp == 1:
            return found
        others = (
            e for name in OTHERS for e in self._estimates(mesh, name, [count], found.setup.rows * count, strict=False)
        )
        return min([found, *others], key=self.rank)

    def rank(self, estimate: StepEstimate) -> tuple[bool, float, int]:
        """Returns what ways are sorted by, the least first: what fits, by seconds, then what does not, by bytes."""
        fits = estimate.memory_bytes <= self.limit
        return not fits, estimate.seconds if fits else float(estimate.memory_bytes), estimate.setup.mesh.tp

    def explained(self, made: PartitionPlan) -> PartitionPlan:
        """Returns a plan with all that could have been chosen in it, too."""
        return self._plan(made.mesh, explained=True)

    def _counts(self, mesh: Mesh, replica: int) -> list[int]:
        """Returns the numbers of microbatches to try: those that keep a pipeline busy, the fewest first."""
        if self.wishes.microbatches is not None:
            if replica % self.wishes.microbatches:
                raise MeshError(f"{replica} rows of a replica are not {self.wishes.microbatches} microbatches alike")
            return [self.wishes.microbatches]
        every = _divisors(replica)
        busy = [n for n in every if n >= mesh.pp] or every[-1:]
        # One row a microbatch needs least memory, and is tried in any case.
        return [n for n in busy if mesh.pp == 1 or n <= _BUSY * mesh.pp or n == every[-1]]

    def _estimates(
        self, mesh: Mesh, schedule: str, counts: Sequence[int], replica: int, *, strict: bool = True
    ) -> list[StepEstimate]:
        """Returns predictions of one schedule; without `strict` none where it does not go with the numbers."""
        found: list[StepEstimate] = []
        for count in counts:
            try:
                made = self.make_schedule(schedule, mesh.pp, count)
                found.append(self._estimate(mesh, made, replica // count))
                if mesh.pp == 1 and found[-1].memory_bytes <= self.limit:
                    break  # more microbatches are slower, and nothing is gained
            except (ScheduleError, MeshError):
                if strict and count == counts[-1] and not found:
                    raise
        return found

    def _estimate(self, mesh: Mesh, schedule: Schedule, rows: int) -> StepEstimate:
        """Predicts with the least that makes it fit, with all that can be done where nothing does."""
        analysis = self._analysis(mesh.tp, schedule.stages, rows)
        last = None
        for zero, recompute in self._savings(mesh):
            setup = StepSetup(mesh, schedule, rows, recompute, zero, self.wishes.has_masters)
            last = estimate_step(analysis, setup)
            if last.memory_bytes <= self.limit:
                break
        assert last is not None
        return last

    def _savings(self, mesh: Mesh) -> list[tuple[int, str]]:
        """Returns (zero_stage, recompute) in the order in which they are tried."""
        zero, recompute = self.wishes.zero_stage, self.wishes.recompute
        zeros = [zero] if zero is not None else [0, 1] if mesh.dp > 1 else [0]
        recomputes = [recompute] if recompute is not None else ["none", "layers"]
        return [*((z, recomputes[0]) for z in zeros), *((zeros[-1], r) for r in recomputes[1:])]

    def _analysis(self, tp: int, stages: int, rows: int) -> WorkAnalysis:
        key = (tp, stages, rows)
        if key not in self.analyses:
            wanted = self._wanted(Mesh(tp, stages))
            if (tp, stages) not in self.plans:
                self.plans[tp, stages] = self._plan(wanted.mesh, explained=False)
            self.analyses[key] = WorkAnalysis(self.graph, self.plans[tp, stages], wanted, rows, self.shared)
        return self.analyses[key]

    def _plan(self, mesh: Mesh, *, explained: bool) -> PartitionPlan:
        return plan(
            self.graph,
            self._wanted(mesh),
            model=self.model,
            fingerprint=self.fingerprint,
            shared=self.shared,
            explained=explained,
        )

    def _wanted(self, mesh: Mesh) -> PlanRequest:
        """Returns the request for a plan of one replica; of one row, since the step is predicted at others anyway."""
        sizes = tuple({**dict(self.request.sizes), "B": 1}.items())
        devices = (self.request.hardware,) * mesh.pp
        at_once = self.wishes.devices
        return replace(
            self.request, mesh=mesh, sizes=sizes, max_memory=None, devices=devices, ranks_at_once=at_once
        )

    def _refuse_too_large(self, mesh: Mesh) -> None:
        """Raises NoPlanFits for a mesh whose weights, gradients and optimizer alone are too large, before it is
        planned."""
        zero, has_masters = self.wishes.zero_stage != 0 and mesh.dp > 1, self.wishes.has_masters
        share = 1 + gradient_bytes(has_masters) + state_bytes(has_masters) / (mesh.dp if zero else 1)
        least = self.parameter_bytes * share / (mesh.tp * mesh.pp)
        if least > self.limit:
            raise NoPlanFits(
                f"weights, gradients and optimizer take {bytes_text(least)} a rank at least, and a device holds "
                f"{bytes_text(self.limit)}"
            )


# -- as text -----------------------------------------------------------------------------------------------------------

_SHOWN = 12  # meshes


def choice_text(choice: TrainingChoice) -> str:
    """Formats a choice as a table, the best mesh first, and remarks."""
    best, wishes = choice.best, choice.wishes
    sizes = ", ".join(f"{symbol}={n}" for symbol, n in best.plan.sizes if symbol != "B")
    per_second = "tokens/s" if "S" in dict(best.plan.sizes) else "samples/s"
    lines = [
        f"{choice.model}, trained on {wishes.devices} {best.plan.hardware} with {wishes.global_batch} sequences a step"
        + (f"; predicted at {sizes}" if sizes else ""),
        "",
    ]
    rows = [["", "mesh", "schedule", "microbatches", "recompute", "ZeRO", "a step", "idle", per_second, "memory", ""]]
    for number, c in enumerate(choice.candidates[:_SHOWN], 1):
        rows.append([
            str(number),
            str(c.setup.mesh),
            c.setup.schedule.name if c.setup.mesh.pp > 1 else "-",
            f"{c.setup.schedule.microbatches} of {c.setup.rows}",
            c.setup.recompute,
            str(c.setup.zero_stage),
            seconds_text(c.seconds),
            f"{100 * c.timeline.idle_share:.0f} %",
            f"{c.tokens_per_second:.0f}",
            bytes_text(c.memory_bytes),
            "chosen" if number == 1 else "" if choice.fits(c) else "does not fit",
        ])  # fmt: skip
    lines += table(rows, left=(0, 1, 2, 3, 4, 10), flexible=1)
    return "\n".join(line.rstrip() for line in [*lines, "", *_remarks(choice)]).rstrip()


def _remarks(choice: TrainingChoice) -> list[str]:
    best, remarks = choice.best, []
    if (left := len(choice.candidates) - _SHOWN) > 0:
        remarks.append(f"{left} more meshes are slower, or do not fit.")
    parts = [
        ("passes", best.timeline.seconds),
        ("gradients that backward does not hide", best.reduce_seconds),
        ("clipping and optimizer", best.optimizer_seconds),
    ]
    remarks.append(f"{best.setup.mesh}: " + ", ".join(f"{name} {seconds_text(n)}" for name, n in parts) + ".")
    fullest = max(best.memory, key=lambda m: m.total)
    held = [
        ("weights", fullest.weights),
        ("gradients", fullest.gradients),
        ("optimizer", fullest.optimizer),
        ("activations", fullest.activations),
        ("while an op goes backward", fullest.transient),
    ]
    remarks.append("Its fullest rank: " + ", ".join(f"{name} {bytes_text(n)}" for name, n in held) + ".")
    said: dict[str, list[str]] = {}
    for mesh, why in choice.impossible:
        said.setdefault(why, []).append(str(mesh))
    remarks += [f"{'; '.join(meshes)}: {why}" for why, meshes in said.items()]
    return remarks
