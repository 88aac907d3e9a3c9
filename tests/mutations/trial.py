"""One mutant: does anybody notice, and does `verify`?"""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass

import break_comm  # noqa: F401  (registers its mutations, as those below)
import break_nodes  # noqa: F401
import break_weights  # noqa: F401
import torch
from mutation import MUTATIONS, NotHere
from subjects import Subject

from autodist_fx.errors import AutodistError
from cost_model.errors import VerificationError
from passes.verify import verify


@dataclass(frozen=True, slots=True)
class Outcome:
    """`behaviour`: see Subject.behaviour. `static`, `numeric`: what the checks said, "" where they saw nothing."""

    kind: str
    subject: str
    what: str
    behaviour: str
    static: str
    numeric: str

    @property
    def missed(self) -> bool:
        return bool(self.behaviour) and not self.static and not self.numeric


@torch.no_grad()
def run_mutant(kind: str, subject: Subject, seed: int) -> Outcome | None:
    """None where the subject has no place for that kind. Same arguments, same mutant."""
    rng = random.Random(f"{kind} {subject} {seed}")
    programs = subject.programs()
    try:
        what = MUTATIONS[kind](programs, rng)
    except NotHere:
        return None
    for program in programs:
        program.graph_module.recompile()
    return Outcome(
        kind, str(subject), what, static=static_verdict(subject, programs), numeric="", behaviour=subject.behaviour(programs)
    )


def static_verdict(subject: Subject, programs: list) -> str:
    made = subject.compiled
    try:
        verify(programs, made.plan, made.op_graph, made.graph)
    except VerificationError as error:
        return str(error)
    except Exception as error:  # a broken program is refused, and never breaks what refuses it
        return f"CRASH {type(error).__name__}: {error} {traceback.format_exc()[-600:]}"
    return ""
