"""`GuardedPrograms`: a rank's programs, one for each outcome of the model's guards on sizes, made at first use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from autodist_fx.calls.input_spec import InputSpec
from autodist_fx.calls.lengths import Lengths
from passes.fx.guards import Guards

T = TypeVar("T")


@dataclass
class GuardedPrograms(Generic[T]):
    """A rank's programs by the guards that must hold for them. `found`: (guards, variant), the usual one first; guards
    None hold for all sizes.

    `make(lengths)` makes a variant where none of them is for these lengths. It is called on all ranks alike, and raises
    AutodistError on all ranks alike where there can be none. `specs`: of the inputs, which tell what their lengths are
    called.
    """

    found: list[tuple[Guards | None, T]]
    make: Callable[[Lengths], tuple[Guards | None, T]] | None = None
    specs: Mapping[str, InputSpec] = field(default_factory=dict)

    def get(self, lengths: Lengths, before_making: Callable[[Lengths], None] | None = None) -> T:
        """Return the variant whose guards hold at these sizes; guards on sizes that are not given are not asked.
        Each variant's guards are evaluated once, up to those that hold. `before_making(lengths)` is called where
        there is none yet, so that other ranks can be told to make it, too."""
        if (known := self.known(lengths)) is not None:
            return known
        assert self.make is not None, "without guards there is one variant, for all lengths"
        if before_making is not None:
            before_making(lengths)
            if (known := self.known(lengths)) is not None:  # made meanwhile, for another group of rows
                return known
        self.found.append(self.make(lengths))
        return self.found[-1][1]

    def known(self, lengths: Lengths) -> T | None:
        """Return the first variant whose guards hold; None where there is none."""
        return next((v for guards, v in self.found if guards is None or not guards.violated(lengths)), None)


def only(variant: T) -> GuardedPrograms[T]:
    """Return the programs of a model without guards: one variant for all sizes."""
    return GuardedPrograms([(None, variant)])
