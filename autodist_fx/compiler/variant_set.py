"""`VariantSet`: the variants of one model, by what they are for."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from autodist_fx.compiler.variant import Variant


@dataclass
class VariantSet:
    """The variants made so far of a model in one structure (tracing/model_structure.py).

    `main` is the variant that was asked for first. A model with a cache of its own has pairs of variants: `prompts`,
    the first of which goes with any length that it fits, and one `step`, which follows any of them; both are missing
    until they are needed. `others` are for other calls, or for lengths at which the model's code goes another way.
    `state` has the buffers that calls write, by (tp rank, name in the model), which all variants have in common.
    """

    structure: Hashable
    main: Variant
    prompts: list[Variant] = field(default_factory=list)
    step: Variant | None = None
    others: list[Variant] = field(default_factory=list)
    state: dict[tuple[int, str], object] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Variant, ...]:
        """Every variant, the main one first, then those of prompts."""
        apart = [v for v in (self.step, *self.others) if v is not None and v is not self.main]
        return (self.main, *(v for v in self.prompts if v is not self.main), *apart)

    @property
    def of_calls(self) -> list[Variant]:
        """Every variant that one call runs by itself."""
        return [v for v in (self.main, *self.others) if not v.traced.phase]

    @property
    def groups(self) -> list[list[Variant]]:
        """The main variants in the groups that run one after the other: a prompt's and its step's are one group."""
        if not self.prompts or self.step is None:
            return [[self.main]]
        phases = [self.prompts[0], self.step]
        return [phases] if self.main is self.step else [phases, [self.main]]
