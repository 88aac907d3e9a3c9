"""A profile of a split as it ran: what each rank spent, by op, beside the prediction; as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from autodist_fx.errors import AutodistError
from autodist_fx.report.html_parts import note, section
from cost_model.explain.html import element, section_table
from cost_model.format import name_pattern, seconds_text
from cost_model.plan.data import PlanData
from cost_model.text_tables import Section

PROFILE_VERSION = 1
OPS_SHOWN = 24
PHASES = {"forward": "A forward pass", "prefill": "A prompt and its first token", "decode": "A step of decoding"}
_ABOUT = (
    "ops: kernels, and what Python and torch spend to call them. waiting: for other ranks, in front of a collective or "
    "in a recv. moving: collectives and sends themselves. around: the program is chosen and announced, its inputs are "
    "made. outside: transformers' loop on the rank that leads, waiting for it on the others."
)


@dataclass(frozen=True, slots=True)
class OpTime:
    """The seconds of ops of one kind in one place of a layer, over all layers, on the rank where they take longest."""

    place: str
    kind: str
    times: int
    seconds: float
    waiting: float  # in front of collectives, not among `seconds`
    predicted: float | None  # None: the plan has no such op


@dataclass(frozen=True, slots=True)
class RankTimes:
    """The seconds of one rank. Together they are the whole: `seconds` of its phase, but for the clocks' own."""

    rank: int
    ops: float
    waiting: float
    moving: float
    around: float
    outside: float


@dataclass(frozen=True, slots=True)
class PhaseProfile:
    """A phase: "forward", "prefill" or "decode". `seconds` by the clock, without clocks between the nodes, and
    `timed_seconds` with them; `predicted`: by the plan for these sizes."""

    phase: str
    seconds: float
    timed_seconds: float
    predicted: float | None
    ranks: tuple[RankTimes, ...]
    ops: tuple[OpTime, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """A measurement of a model on a mesh. `about` has the sizes in words."""

    model: str
    mesh: str
    about: str
    phases: tuple[PhaseProfile, ...]
    version: int = PROFILE_VERSION

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self), indent=1)

    def save(self, path: str | Path) -> None:
        """Write it as JSON. Raises AutodistError where it cannot be written."""
        try:
            Path(path).write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise AutodistError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read what `save` wrote. Raises AutodistError for a file that is no profile."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            if found["version"] != PROFILE_VERSION:
                raise AutodistError(f"{path} is a profile of version {found['version']}: measure it again")
            phases = tuple(
                PhaseProfile(
                    **{
                        **phase,
                        "ranks": tuple(RankTimes(**rank) for rank in phase["ranks"]),
                        "ops": tuple(OpTime(**op) for op in phase["ops"]),
                    }
                )
                for phase in found["phases"]
            )
            return cls(str(found["model"]), str(found["mesh"]), str(found["about"]), phases)
        except OSError as error:
            raise AutodistError(f"cannot read the profile {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise AutodistError(f"{path} is no profile that autodist-fx profile --save wrote: {error}") from error


def phase_profile(phase: str, of_ranks: Sequence[Mapping[str, Any]], plan: PlanData | None) -> PhaseProfile:
    """Put together what all ranks measured of a phase (runtime/execution/phase_times.py), in their order. `plan` was
    made for its sizes; None: no prediction."""
    ranks = tuple(_rank_times(rank, found) for rank, found in enumerate(of_ranks))
    by_rank = [_by_op(found["nodes"], plan) for found in of_ranks]
    ops = []
    for key in dict.fromkeys(key for found in by_rank for key in found):
        most = max((found[key] for found in by_rank if key in found), key=lambda op: op.seconds)
        ops.append(most)
    ops.sort(key=lambda op: -(op.seconds + op.waiting))
    return PhaseProfile(
        phase,
        max(float(found["seconds"]) for found in of_ranks),
        max(float(found["timed_seconds"]) for found in of_ranks),
        None if plan is None else sum(stage.seconds for stage in plan.stages),
        ranks,
        tuple(ops),
    )


def _rank_times(rank: int, found: Mapping[str, Any]) -> RankTimes:
    nodes = found["nodes"]
    received = sum(n["seconds"] for n in nodes if n["kind"] == "recv")
    moving = sum(n["seconds"] for n in nodes if n["is_comm"]) - received
    waiting = sum(n["waiting"] for n in nodes) + received
    program = float(found["program_seconds"])
    within = max(program, float(found["model_seconds"] or program))
    return RankTimes(
        rank,
        ops=program - moving - waiting,
        waiting=waiting,
        moving=moving,
        around=within - program,
        outside=max(0.0, float(found["timed_seconds"]) - within),
    )


def _by_op(nodes: Sequence[Mapping[str, Any]], plan: PlanData | None) -> dict[tuple[str, str], OpTime]:
    """Add up one rank's nodes by place and kind."""
    found: dict[tuple[str, str], OpTime] = {}
    for node in nodes:
        known = [plan.op(name) for name in node["ops"] if plan is not None and plan.has_op(name)]
        places = list(dict.fromkeys(name_pattern(op.module) for op in known))
        place = "|".join([*places[:1], *(p.rpartition(".")[2] for p in places[1:])])
        predicted: float | None = None
        if known:
            predicted = sum(op.comm_seconds if node["is_comm"] else op.compute_seconds for op in known)
        before = found.get((place, node["kind"]), OpTime(place, node["kind"], 0, 0.0, 0.0, None))
        found[place, node["kind"]] = OpTime(
            place,
            node["kind"],
            before.times + 1,
            before.seconds + node["seconds"],
            before.waiting + node["waiting"],
            predicted if before.predicted is None else before.predicted + (predicted or 0.0),
        )
    return found


def profile_sections(profile: Profile) -> list[Section]:
    """Return the tables: for each phase the ranks, then the ops."""
    sections = []
    for phase in profile.phases:
        title = PHASES.get(phase.phase, phase.phase)
        whole = f"{title}: {seconds_text(phase.seconds)}"
        if phase.predicted is not None:
            whole += f", predicted {seconds_text(phase.predicted)}"
        rows: list[tuple[str, ...]] = [("rank", "ops", "waiting", "moving", "around", "outside")]
        for rank in phase.ranks:
            spent = (rank.ops, rank.waiting, rank.moving, rank.around, rank.outside)
            rows.append((str(rank.rank), *map(seconds_text, spent)))
        timed = f"with clocks between the nodes {seconds_text(phase.timed_seconds)}"
        sections.append(Section(whole, tuple(rows), (timed,), left=(0,)))
        rows = [("ops", "kind", "times", "measured", "predicted", "waiting")]
        for op in phase.ops[:OPS_SHOWN]:
            predicted = "-" if op.predicted is None else seconds_text(op.predicted)
            waiting = seconds_text(op.waiting) if op.waiting else "-"
            rows.append((op.place or "-", op.kind, f"x{op.times}", seconds_text(op.seconds), predicted, waiting))
        left = phase.ops[OPS_SHOWN:]
        lines = (f"and {len(left)} more, {seconds_text(sum(op.seconds for op in left))} together",) if left else ()
        sections.append(Section(f"{title}, by op", tuple(rows), lines, left=(0, 1), flexible=0))
    return sections


def profile_section(profile: Profile) -> Element:
    """Build the page's section "As it ran"."""
    tables = [
        element(
            "div",
            element("h3", part.title),
            element("div", section_table(part), cls="scroll", tabindex="0", role="region", aria_label=part.title),
            *(note(line) for line in part.lines),
        )
        for part in profile_sections(profile)
    ]
    said = f"{profile.model} on {profile.mesh}, {profile.about}. {_ABOUT}"
    return section("profile", "As it ran", "As it ran", element("p", said), *tables)


def profile_header(profile: Profile) -> list[str]:
    """Return the lines above the tables."""
    return [f"{profile.model} on {profile.mesh}, {profile.about}", _ABOUT]
