"""One mutant: does anybody notice, and does `verify`?"""

from __future__ import annotations

import contextlib
import io
import random
import traceback
from dataclasses import dataclass

import tests.mutations.break_comm
import tests.mutations.break_experts
import tests.mutations.break_gradients
import tests.mutations.break_nodes
import tests.mutations.break_numbers
import tests.mutations.break_weights  # noqa: F401
from autodist_fx.numeric.verify_numeric import verify_numeric
from cost_model.errors import MeshError, VerificationError
from passes.verify.verify import verify
from tests.mutations.mutation import MUTATIONS, NotHere
from tests.mutations.subjects import Programs, Subject


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
    static, numeric = static_verdict(subject, programs), numeric_verdict(subject, programs)
    return Outcome(kind, str(subject), what, subject.behaviour(programs), static, numeric)


def static_verdict(subject: Subject, programs: Programs) -> str:
    """Returns what the proof says, "" where it says yes."""
    made = subject.compiled
    try:
        verify(programs, made.plan, made.op_graph, made.graph)
    except VerificationError as error:
        return str(error)
    except Exception as error:  # a broken program is refused, and never breaks what refuses it
        return f"CRASH {type(error).__name__}: {error} {traceback.format_exc()[-600:]}"
    return ""


def numeric_verdict(subject: Subject, programs: Programs) -> str:
    """Returns what running in float64 says, "" where all is equal."""
    made = subject.compiled
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            verify_numeric([made.main], lambda variant: programs, made.buffers, locate=False)
    except (VerificationError, MeshError) as error:  # MeshError: a message to a rank that does not exist
        return str(error)
    return ""
