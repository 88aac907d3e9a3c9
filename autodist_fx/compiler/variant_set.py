"""`VariantSet`: the variants of one model, sorted by use."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from autodist_fx.compiler.variant import Variant


@dataclass
class VariantSet:
    """The variants made so far for a model in one structure (tracing/model_structure.py).

    `main` is the variant that was asked for first. A model with its own recurrent cache has `prompts`, prefill variants
    with different guards, and `steps`, any of which follows any of them; both are empty until they are needed. `others`
    are for other calls, or for lengths at which guards come out otherwise. `state` has the buffers that calls write, by
    (tp rank, name in the model); all variants share them.
    """

    structure: Hashable
    main: Variant
    prompts: list[Variant] = field(default_factory=list)
    steps: list[Variant] = field(default_factory=list)
    others: list[Variant] = field(default_factory=list)
    state: dict[tuple[int, str], object] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Variant, ...]:
        """Every variant, the main one first, then those of prompts."""
        return (self.main, *(v for v in (*self.prompts, *self.steps, *self.others) if v is not self.main))

    @property
    def of_calls(self) -> list[Variant]:
        """Every variant that serves a call by itself: all but
        prompt and step of a model with its own recurrent cache."""
        return [v for v in (self.main, *self.others) if not v.traced.phase]

    @property
    def groups(self) -> list[list[Variant]]:
        """The main variants in groups, each of which runs in order: prompt and step form one group."""
        if not self.prompts or not self.steps:
            return [[self.main]]
        phases = [self.prompts[0], self.steps[0]]
        return [phases] if self.main is self.steps[0] else [phases, [self.main]]
