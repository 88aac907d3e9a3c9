"""Chooses the variants that `save` writes, and names them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from autodist_fx.artifact.variant_format import DECODE, ENCODE, PROMPT, STEP, WHOLE
from autodist_fx.calls.call import FILLED_IN
from autodist_fx.compiler.generation_traits import step_arguments
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import TracingError

if TYPE_CHECKING:
    from autodist_fx.compiler.compilation import Compilation


@dataclass(frozen=True, slots=True)
class Part:
    """One variant to be saved, and its name in the artifact."""

    name: str
    variant: Variant


def parts_of(compiled: Compilation, model: PreTrainedModel) -> list[Part]:
    """Collect the variants to save: those compiled so far, the
    main one first, and those that `generate` and `model(...)` run.

    Variants that are missing are compiled for it. Those that assume values of inputs (value_guards.py), and are not the
    main one, are left out.
    """
    variants = [v for v in compiled.variants if not v.traced.value_guards or v is compiled.main]
    told = {"position_ids"} if compiled.source.positions_of_values else set()
    cached = [v for v in variants if v.traced.use_cache and _is_step(v, told)]
    if isinstance(model, GenerationMixin) and model.can_generate():
        if not cached:
            cached = _cached(compiled, model)
            variants += cached
        asked = ["input_ids", "attention_mask"]
        takes = set(asked) <= inspect.signature(model.forward).parameters.keys()
        if takes and cached and cached[0].encoder is None and not any(_is_whole(v, set(asked)) for v in variants):
            variants.append(compiled.new_variant(use_cache=False, input_names=asked))
    return named_parts(variants)


def _cached(compiled: Compilation, model: PreTrainedModel) -> list[Variant]:
    """Compile the variants that generate; none for a model that has no graph with a cache."""
    try:
        if compiled.source.has_own_cache:
            return [*compiled.phases()]
        return [compiled.new_variant(use_cache=True, fixed=step_arguments(model))]
    except TracingError:
        return []


def named_parts(variants: Sequence[Variant]) -> list[Part]:
    """Name these variants, and the encoders that fill their
    caches; the first of `variants` comes first in the result."""
    parts: list[Part] = []
    for variant in variants:
        if variant.encoder is not None:
            parts.append(Part(_free(ENCODE, parts), variant.encoder))
        phase = {"prompt": PROMPT, "step": STEP}.get(variant.traced.phase)
        parts.append(Part(_free(phase or (DECODE if variant.traced.use_cache else WHOLE), parts), variant))
    return sorted(parts, key=lambda part: part.variant is not variants[0])


def _is_whole(variant: Variant, asked: set[str]) -> bool:
    """True if this is the variant for whole sequences of exactly the inputs `asked`, without other arguments."""
    traced = variant.traced
    return not traced.use_cache and not traced.phase and set(traced.input_names) == asked and not variant.fixed


def _is_step(variant: Variant, told: set[str]) -> bool:
    """Return whether this is a variant of tokens alone, which generates, and takes what it is `told`: images, positions
    of several kinds and those that the model counts have variants of their own beside it."""
    if variant.encoder is not None or variant.traced.phase:
        return True
    positions = variant.specs.get("position_ids")
    return told <= variant.specs.keys() <= FILLED_IN and (positions is None or len(positions.dims) == 2)


def _free(name: str, parts: Sequence[Part]) -> str:
    """Return `name`, or `name` with the first number that no part has."""
    taken = {part.name for part in parts}
    return next(n for i in range(1, len(parts) + 2) if (n := name if i == 1 else f"{name}{i}") not in taken)
