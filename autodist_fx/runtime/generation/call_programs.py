"""`CallPrograms`: a rank's programs for calls of the model outside of generating, one for each kind of call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from autodist_fx.calls.call import Call
from autodist_fx.calls.model_signature import ModelSignature
from passes.program.rank_program import RankProgram


@dataclass(frozen=True, slots=True)
class CallProgram:
    """This rank's program for a call, and the names of the outputs of all ranks, flat, in the model's order."""

    program: RankProgram
    output_order: Sequence[str]


class CallPrograms(Protocol):
    """Programs for calls without a cache, found as `simulate` finds its own (calls/made_for.py)."""

    @property
    def signature(self) -> ModelSignature:
        """Return the signature of the model's forward."""

    def program_for(self, call: Call) -> CallProgram:
        """Return the program that was made for just this call, with its weights; made at first use, by all ranks
        together.

        Called on all ranks alike, and raises AutodistError on all ranks alike where there can be none.
        """
