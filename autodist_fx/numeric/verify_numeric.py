"""`verify_numeric`: runs all ranks against each other in
float64, and compares their outputs with the model's own graph.

The model's traced graph and the ranks' emitted graphs run unchanged, at their true sizes (factored.py), on drawn
weights, of which each rank has its slices, and on drawn inputs of a few tokens; with a cache, first a prompt, then a
step.

It shows that the emitted arithmetic, slices, shapes and messages compute the traced function, at these lengths. It
shows nothing about dtypes (all is float64), about the tracing itself, or about lengths and masks that it does not try.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from autodist_fx.calls.lengths import tokens_of
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.numeric.check import CheckedVariant, check_call, drawn_weights
from autodist_fx.numeric.example_values import make_inputs
from autodist_fx.numeric.float64_interpreter import FEW_ELEMENTS, Weights
from autodist_fx.numeric.gradients import check_gradients
from autodist_fx.runtime.cache.kv_cache import encoder_view, local_cache
from autodist_fx.tracing import STATE_PREFIX
from cost_model.errors import VerificationError
from passes.fx.randomness import seeded_nodes
from passes.ops.random import RANDOM_STATE, random_state
from passes.program.rank_program import RankProgram

Programs = Callable[[Variant], Sequence[RankProgram]]
_BATCH, _PROMPT, _STEP, _SOURCE, _KEPT = 2, 5, 2, 6, 2


def verify_numeric(
    variants: Sequence[Variant],
    programs: Programs,
    buffers: Mapping[str, torch.Tensor],
    seed: int = 0,
    *,
    locate: bool = True,
) -> None:
    """Run one variant of a model, or (prompt, step) of a model
    with its own recurrent cache, and compare all ranks with it.

    `buffers` has the real values of buffers by name. `locate`: find the first node that differs, where the model is
    small. For programs of `train`, gradients are compared, too.

    Raises VerificationError, which names the rank, the output, and for a small model the first node that differs.
    AutodistError where the model itself does not run on made-up inputs.
    """
    check = _Conversation(programs, buffers, seed, locate=False)
    try:
        check.run(variants)
    except VerificationError:
        if check.is_small and locate:
            _Conversation(programs, buffers, seed, locate=True).run(variants)
        raise


def verify_numeric_of(compiled: Compilation) -> None:
    """Run `verify_numeric` on the main variants of `compiled`; see CompiledModel.verify_numeric."""
    for variants in compiled.variant_groups:
        verify_numeric(variants, compiled.all_programs, compiled.buffers)


class _Conversation:
    """One run of the check: the calls of a model in the order in which generating makes them."""

    def __init__(
        self, programs: Programs, buffers: Mapping[str, torch.Tensor], seed: int, *, locate: bool
    ) -> None:
        self._programs, self._buffers, self._locate, self._seed = programs, buffers, locate, seed
        self._generator = torch.Generator().manual_seed(seed)
        self.is_small = False

    def run(self, variants: Sequence[Variant]) -> None:
        """Run the calls of one variant, or of (prompt, step). Raises what check_call and check_gradients raise."""
        first = variants[0]
        weights = drawn_weights(self._checked(first), self._buffers, self._seed)
        self.is_small = weights.are_few
        if len(variants) == 2:
            self._own_cache(variants[0], variants[1], weights)
        elif first.traced.use_cache:
            self._cached(first, weights)
        else:
            inputs = self._inputs(first, _PROMPT + _STEP, 0)
            self._call(first, weights, inputs)
            if self._programs(first)[0].grad_sums is not None:
                if not weights.are_few:
                    raise AutodistError(
                        f"the numeric check of gradients takes models of up to {FEW_ELEMENTS} parameters: check a "
                        f"smaller config of the same model (verify without numeric proves gradients of any size)"
                    )
                check_gradients(self._checked(first), weights, inputs)

    def _cached(self, variant: Variant, weights: Weights) -> None:
        """Run an encoder, where there is one, then a prompt and a step on one cache."""
        checked = self._checked(variant)
        alike = (checked.whole_program(), *checked.programs)
        caches: list[Any] = [local_cache(variant.traced.config, program) for program in alike]
        read: dict[str, Any] = {}
        if variant.encoder is not None:
            encoder = self._checked(variant.encoder)
            of_ranks = zip(caches[1:], checked.programs, encoder.programs, strict=True)
            views = [encoder_view(cache, decoder, program) for cache, decoder, program in of_ranks]
            read = self._inputs(variant.encoder, _PROMPT, 0)
            self._call(variant.encoder, weights, read, [caches[0], *views])
        for tokens, past in ((_PROMPT, 0), (_STEP, _PROMPT)):
            inputs = self._inputs(variant, tokens, past)
            self._call(variant, weights, {**inputs, **read}, caches)
            for cache in caches:
                cache.count(tokens_of(inputs))

    def _own_cache(self, prompt: Variant, step: Variant, weights: Weights) -> None:
        """Run a prompt, then a step from the recurrent states that the prompt returns."""
        outputs = self._call(prompt, weights, self._inputs(prompt, _PROMPT, 0))
        states = {name: value for name, value in outputs.items() if name.startswith(STATE_PREFIX)}
        self._call(step, weights, {**self._inputs(step, 1, _PROMPT), **states})

    def _call(
        self, variant: Variant, weights: Weights, inputs: Mapping[str, Any], caches: Sequence[Any] | None = None
    ) -> dict[str, Any]:
        return check_call(self._checked(variant), weights, inputs, caches, locate=self._locate)

    def _inputs(self, variant: Variant, tokens: int, past: int) -> dict[str, torch.Tensor]:
        lengths = {"B": _BATCH, "S": tokens, "T": past + tokens, "E": _SOURCE, "K": _KEPT}
        traced = variant.traced
        inputs = make_inputs(traced.graph_module, traced.specs(), lengths, self._generator)
        return {**inputs, RANDOM_STATE: random_state(self._seed)} if seeded_nodes(traced.graph_module) else inputs

    def _checked(self, variant: Variant) -> CheckedVariant:
        traced = variant.traced
        programs = self._programs(variant)
        return CheckedVariant(traced.graph_module, variant.sources, variant.plan, programs, traced.layer_kinds)
