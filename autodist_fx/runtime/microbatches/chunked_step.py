"""Divides the tokens of a step among chunks, each of which goes on with the cache that those before have filled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autodist_fx.calls.lengths import Lengths
from autodist_fx.runtime.generation.step import Step
from autodist_fx.runtime.microbatches.count import Microbatches
from autodist_fx.runtime.microbatches.divided_call import spans
from autodist_fx.runtime.microbatches.forecast import StageSeconds, by_tokens
from autodist_fx.runtime.microbatches.in_flight import InFlight
from passes.program.rank_program import RankProgram

LEAST_TOKENS = 64  # of a chunk that nobody asked for: products of fewer rows are far from what a core reaches


def chunks(step: Step, count: int) -> list[Step]:
    """Return a step in `count` parts of its tokens, in order; each has the mask up to its last token."""
    tokens, past, mask = step.input_ids.shape[1], step.cache.tokens, step.attention_mask
    return [
        replace(
            step,
            input_ids=step.input_ids[:, start:stop].contiguous(),
            attention_mask=None if mask is None else mask[:, : past + stop],
            position_ids=None if step.position_ids is None else step.position_ids[:, start:stop].contiguous(),
            cache_position=step.cache_position[start:stop],
        )
        for start, stop in spans(tokens, count)
    ]


def chunk_count(step: Step, wanted: Microbatches, step_seconds: StageSeconds | None) -> InFlight:
    """Return in how many chunks a step of many tokens is run, and why, where its tokens may be divided at all."""
    batch, tokens = step.input_ids.shape
    mask = step.attention_mask
    if mask is not None and tuple(mask.shape) != (batch, step.cache.tokens + tokens):
        return InFlight(1, "the mask is not one of all tokens so far")
    if wanted != "auto":
        return InFlight(min(wanted, tokens), "as asked for")
    if step_seconds is None or tokens < 2 * LEAST_TOKENS:
        return InFlight(1, f"fewer tokens than two chunks of {LEAST_TOKENS}")
    filling = by_tokens(step_seconds, {"B": batch, "S": tokens, "P": step.cache.tokens}, LEAST_TOKENS)
    return InFlight(filling.count, str(filling), filling)


def chunk_programs(
    step: Step, parts: list[Step], program_of: Callable[[Lengths], object]
) -> list[RankProgram] | None:
    """Return the program of each chunk; None where one of them is for whole steps alone. `program_of(lengths)` is None
    where there is none for these sizes."""
    found, past = [], step.cache.tokens
    for part in parts:
        batch, tokens = part.input_ids.shape
        program = program_of({"B": batch, "S": tokens, "P": past, "T": past + tokens})
        if not isinstance(program, RankProgram) or program.whole_steps:
            return None
        found.append(program)
        past += tokens
    return found
