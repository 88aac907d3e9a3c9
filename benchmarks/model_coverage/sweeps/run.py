"""Asks a type's model all questions of the sweeps, split over ranks that are threads, and simulated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel

import autodist_fx as adx
from autodist_fx.api.compiled_model import CompiledModel
from cost_model.mesh import Mesh
from model_coverage.build import build
from model_coverage.subject import Subject, is_rounding
from model_coverage.sweeps import calls, generation
from model_coverage.sweeps.question import Question
from model_coverage.sweeps.ranks import on_ranks
from model_coverage.verdict import Entry, guarded, mesh_name

GAIN = 1.6  # of matrices, so that what a token attends to decides about the next one
_QUESTIONS: Mapping[str, Callable[..., Any]] = {"generation": generation.questions, "calls": calls.questions}
Found = dict[str, dict[str, dict[str, Entry]]]  # by sweep, kind, and where: "2x1", or "simulate 2x1"


def run_sweeps(
    task: str,
    class_name: str,
    subject: Subject,
    sweeps: Sequence[str],
    meshes: Sequence[tuple[int, int]],
    seconds: float,
) -> Found:
    """Asks every question, and returns what came of each.

    `subject` is the type's; `seconds` limits each simulated call, and all that is asked of the ranks of a mesh takes
    no more than twice as long.
    """
    model = build(task, class_name, subject.dtype, GAIN)
    found: Found = {sweep: {} for sweep in sweeps}
    asked: dict[tuple[str, str], Question] = {}
    for sweep in sweeps:
        for question in _QUESTIONS[sweep](model, task, subject.padded):
            entries = found[sweep][question.name] = {}
            if question.unasked is None:
                asked[sweep, question.name] = question
            else:
                entries["transformers"] = question.unasked
    for mesh in meshes if asked else ():
        simulated = {name: question for (sweep, name), question in asked.items() if sweep == "calls"}
        for name, entry in _simulate(model, mesh, simulated, seconds).items():
            found["calls"][name][f"simulate {mesh_name(mesh)}"] = entry
        if model.can_generate():
            for (sweep, name), entry in _over_ranks(model, mesh, asked, 2 * seconds).items():
                found[sweep][name][mesh_name(mesh)] = _as_simulated(entry, found[sweep][name], mesh)
    return found


def _simulate(
    model: PreTrainedModel, mesh: tuple[int, int], asked: Mapping[str, Question], seconds: float
) -> dict[str, Entry]:
    """A call after the other, of one compiled model."""
    made: list[CompiledModel] = []

    def check(question: Question) -> Entry:
        if not made:
            made.append(adx.compile(model, tp=mesh[0], pp=mesh[1], input_names=tuple(question.call)))
        entry = question.judge(question.ask(made[0].simulate))
        case = Subject(model, question.call, question.expected, model.dtype, True)
        if entry["verdict"] == "wrong" and is_rounding(case, made[0], entry):
            return {"verdict": "right", "error": entry["error"], "rounds": True}
        return entry

    return {name: guarded(partial(check, question), seconds) for name, question in asked.items()}


def _over_ranks(
    model: PreTrainedModel, mesh: tuple[int, int], asked: Mapping[tuple[str, str], Question], seconds: float
) -> dict[tuple[str, str], Entry]:
    """One start of the ranks, and then one question after the other; what a rank raises is its answer."""
    answers: dict[tuple[str, str], list[Any]] = {key: [] for key in asked}

    def work(split: Any) -> None:
        for key, question in asked.items():
            try:
                answers[key].append(question.ask(split))
            except Exception as error:
                answers[key].append(error)

    def start() -> Entry:
        on_ranks(model, Mesh(*mesh), work)
        return {}

    def check(key: tuple[str, str]) -> Entry:
        entries = []
        for answer in answers[key]:
            if isinstance(answer, Exception):
                raise answer
            entries.append(asked[key].judge(answer))
        return next((entry for entry in entries if entry["verdict"] != "right"), entries[0])

    failure = guarded(start, seconds)
    size = mesh[0] * mesh[1]
    return {key: guarded(partial(check, key), seconds) if len(answers[key]) == size else failure for key in asked}


def _as_simulated(entry: Entry, entries: Mapping[str, Entry], mesh: tuple[int, int]) -> Entry:
    """The entry of a call over ranks; where its simulation differs by rounding alone, so may the ranks, as much."""
    simulated = entries.get(f"simulate {mesh_name(mesh)}", {})
    if entry["verdict"] == "wrong" and simulated.get("rounds") and entry.get("error", 1.0) <= 2 * simulated["error"]:
        return {"verdict": "right", "error": entry["error"], "rounds": True}
    return entry


__all__ = ["run_sweeps"]
