"""`CallPrograms`: a rank's programs for calls of the model outside of generating, one for each kind of call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from autodist_fx.calls.call import Call
from autodist_fx.calls.model_signature import ModelSignature
from autodist_fx.runtime.microbatches.forecast import StageSeconds
from passes.program.rank_program import RankProgram


@dataclass(frozen=True, slots=True)
class CallProgram:
    """This rank's program for a call, and the names of the outputs of all ranks, flat, in the model's order.
    `serves(other)` says, alike on all ranks, whether it is the program for another call, too; `stage_seconds` what each
    stage is predicted to take."""

    program: RankProgram
    output_order: Sequence[str]
    serves: Callable[[Call], bool]
    stage_seconds: StageSeconds


class CallPrograms(Protocol):
    """Programs for calls without a cache, and for steps with inputs that no usual step has, found as `simulate` finds
    its own (calls/made_for.py)."""

    @property
    def signature(self) -> ModelSignature:
        """Return the signature of the model's forward."""

    @property
    def positions_of_values(self) -> bool:
        """Return whether the model counts positions that a call leaves out by its tokens or mask."""

    def completed(self, call: Call) -> Call:
        """Return the call with the positions that the model's own Python counts where it leaves them out."""

    def program_for(self, call: Call) -> CallProgram:
        """Return the program that was made for just this call, with its weights; made at first use, by all ranks
        together.

        Called on all ranks alike, and raises AutodistError on all ranks alike where there can be none.
        """

    @property
    def step_seconds(self) -> StageSeconds:
        """Return what predicts the seconds of each stage in a step that generates."""

    def is_usual(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Return whether what the graphs that generate assume of values holds for a step with these inputs."""

    def program_for_step(self, tensors: Mapping[str, torch.Tensor], past: int) -> RankProgram:
        """Return the program for a step that generates, with these inputs and `past` tokens in its cache, which it
        reads and writes as all others do; made at first use, by all ranks together.

        Called on all ranks alike, and raises AutodistError on all ranks alike where there can be none.
        """
