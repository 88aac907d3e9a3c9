"""What a rank runs for a call of some lengths: a program for each way that the model's code goes, made at first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from autodist_fx.calls.input_spec import InputForm
from autodist_fx.calls.lengths import Lengths
from autodist_fx.errors import AutodistError
from passes.fx.guards import Guards

T = TypeVar("T")


@dataclass
class GuardedPrograms(Generic[T]):
    """`found`: (conditions on lengths that what is run was made for, what is run), the usual one first.

    `make(lengths)` is called on all ranks alike for lengths that none of them is for; it raises AutodistError, on all
    ranks alike, where there can be none. `forms`: of the inputs, which tell what their lengths are called.
    """

    found: list[tuple[Guards | None, T]]
    make: Callable[[Lengths], tuple[Guards | None, T]] | None = None
    forms: Mapping[str, InputForm] = field(default_factory=dict)

    def known(self, lengths: Lengths) -> T | None:
        """None: it has to be made first. Lengths that are not given are not asked for."""
        for conditions, program in self.found:
            if conditions is None or not conditions.otherwise(lengths):
                return program
        return None

    def get(self, lengths: Lengths) -> T:
        program = self.known(lengths)
        if program is None:
            assert self.make is not None, "without conditions there is one way"
            self.found.append(self.make(lengths))
            program = self.found[-1][1]
        return program


def only(program: T) -> GuardedPrograms[T]:
    """The same for all lengths."""
    return GuardedPrograms([(None, program)])


def one_way(conditions: Guards | None, program: T, other: Callable[[Lengths], str]) -> GuardedPrograms[T]:
    """For lengths that meet the conditions; for any other AutodistError, of the words that `other` has for them."""

    def refuse(lengths: Lengths) -> tuple[Guards | None, T]:
        raise AutodistError(other(lengths))

    return GuardedPrograms([(conditions, program)], refuse)
