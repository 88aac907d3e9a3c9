"""Runs a compiled model with all ranks in this process: forward, generating, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from autodist_fx.calls.call import FILLED_IN, Call, by_name, read_call
from autodist_fx.calls.lengths import lengths_of
from autodist_fx.calls.outputs import returned
from autodist_fx.compiler.compilation import Compilation
from autodist_fx.compiler.torch_state import refuse_ambient
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.kv_cache import local_cache
from autodist_fx.simulation.backward import glued, run_backward
from autodist_fx.simulation.call import (
    SimulatedCache,
    encode,
    run,
    run_with_states,
    step_length,
    with_positions,
    with_random_state,
)
from autodist_fx.weights.share import share_state


class Simulator(Compilation):
    """A compilation of a model that has weights, run here, a thread a rank."""

    def simulate(self, *args: Any, seed: int = 0, step: int = 0, **inputs: Any) -> Any:
        """Run all ranks in this process, a thread each; return what `model(*args, **inputs)` returns.

        `seed` and `step` choose the random numbers of a model in training mode (`passes.ops.random`): the same on every
        mesh, and others than torch draws.

        With `use_cache` or a cache among the inputs, `past_key_values` in the output is a `SimulatedCache`, to be
        passed to the next call; None starts an empty one. What an encoder reads is given in the first call, in which
        it runs, and may be left out later. Runs in the caller's grad and inference mode. Raises AutodistError where the
        model has no weights, under torch.autocast, and where hooks are registered for all modules.
        """
        self.source.check_weights("simulate")
        refuse_ambient("simulate")
        self.follow()
        call = self._read_call(args, inputs)
        if call.use_cache and self.source.has_own_cache:
            return self._simulate_own_cache({**call.tensors, "past_key_values": call.cache}, call)
        call = self.source.completed(call)
        given, cache = call.tensors, call.cache
        if call.use_cache and not isinstance(cache, SimulatedCache):
            if cache is not None and cache.get_seq_length() > 0:
                raise AutodistError(
                    "simulate cannot split a cache that holds tokens already: start with past_key_values=None and "
                    "pass on the one it returns"
                )
            cache = None
        if cache is not None:
            cache.check_structure(self.structure)
        kept = {} if cache is None else cache.encoder_inputs
        variant = self.variant_for(call, 0 if cache is None else cache.length, kept)
        self._fill(variant)
        if not call.use_cache:
            given = with_random_state(variant, given, seed, step)
            return returned(call, run(variant, [given] * self.mesh.size), variant.output_order)
        encoded: dict[str, Any] = {}
        if cache is None:
            caches: list[Any] = [local_cache(variant.traced.config, p) for p in variant.programs.values()]
            cache = SimulatedCache(caches, variant, self.structure)
            if variant.encoder is not None:
                given = variant.encoder.with_encoder_mask(given)
                encoded = encode(variant, given, cache)
        cache.go_on_with(variant)
        if variant.encoder is not None:
            given = {**cache.encoder_inputs, **given}
        filled = with_positions(variant, given, cache.length)
        outputs = run(variant, [{**filled, "past_key_values": own} for own in cache.ranks])
        cache.length += step_length(given)
        return returned(call, {**encoded, **outputs, "past_key_values": cache}, variant.output_order)

    def gradients(self, *args: Any, seed: int = 0, step: int = 0, **inputs: Any) -> dict[str, torch.Tensor]:
        """Run forward and backward on all ranks in this process: return the gradients that `loss.backward()` of
        `model(*args, **inputs)` leaves in `model`, by the names of its `named_parameters()`, each whole; those it
        leaves at None are left out.

        `seed` and `step` choose the random numbers of a model in training mode, as for `simulate`.

        Needs `compile(..., train=True)`, a model with weights, and inputs that it computes a loss from (`labels=...`).
        Hooks of parameters (`register_hook`) get the whole gradients. The model stays as it is, and so do its own
        `.grad`. Raises AutodistError where one of these is missing, and for what gradients are computed without:
        backward hooks of modules, hooks that run when `.grad` has been added to, torch.autocast. Raises
        CommunicationError where ranks that hold the same elements have different gradients of them.
        """
        if not self.options.train:
            raise AutodistError("these programs are for inference: compile with train=True for gradients")
        self.source.check_weights("gradients")
        refuse_ambient("gradients")
        self.follow()
        call = self.source.completed(self._read_call(args, inputs))
        if call.use_cache:
            raise AutodistError("gradients are of a whole sequence: leave past_key_values and use_cache out")
        variant = self.variant_for(call, 0)
        self._fill(variant)
        programs = list(variant.programs.values())
        given = with_random_state(variant, call.tensors, seed, step)
        found = glued(programs, run_backward(programs, given)[1])
        first_names = self.source.trained_parameters()
        whole = {first_names[name]: gradient for name, gradient in found.items() if name in first_names}
        return self.source.hooked({n: whole[n] for n in dict.fromkeys(first_names.values()) if n in whole})

    def _read_call(self, args: tuple[Any, ...], inputs: dict[str, Any]) -> Call:
        signature = self.source.signature
        return read_call(signature, by_name(signature.argument_names, args, inputs), self.source.always)

    def _simulate_own_cache(self, inputs: dict[str, Any], call: Call) -> Any:
        """Run one call of a model whose cache is its own: the prompt's graph first, then the step's."""
        cache = inputs.pop("past_key_values", None)
        if cache is not None and not isinstance(cache, SimulatedCache):
            raise AutodistError("simulate goes on with the cache of its own last output: start with None")
        if cache is not None:
            cache.check_structure(self.structure)
        given = {name: value for name, value in inputs.items() if value is not None}
        past = 0 if cache is None else cache.length
        tokens = step_length(given)
        if past and tokens != 1:
            raise AutodistError(f"{self.plan.model} takes one token at a time after its prompt, and got {tokens}")
        prompt, step = self.phases()
        variant = step if past else prompt
        refused = [n for n in (call.fixed | variant.fixed) if call.fixed.get(n) != variant.fixed.get(n)]
        refused += [n for n in given if n not in FILLED_IN and n not in variant.traced.input_names]
        if refused:
            raise AutodistError(
                f"with its own cache {self.plan.model} takes no {', '.join(refused)}: call it with use_cache=False and "
                "without past_key_values"
            )
        filled = with_positions(variant, given, past)
        lengths = lengths_of(variant.specs, filled, past)
        variant = self.step_for(lengths) if past else self.prompt_for(lengths)
        self._fill(variant)
        states = [dict(own) for own in cache.ranks] if cache is not None else [{} for _ in range(self.mesh.size)]
        found = run_with_states(variant, filled, states)
        new = SimulatedCache(states, variant, self.structure, past + tokens)
        return returned(call, {**found, "past_key_values": new}, variant.output_order)

    def _fill(self, variant: Variant) -> None:
        """Give every rank's program of `variant`, and of its encoder, the model's weights, and what calls before
        left in buffers."""
        for part in (variant.encoder, variant):
            if part is not None:
                programs = self.all_programs(part)
                self.source.fill(part, programs)
                for program in programs if part.graph.state else ():
                    share_state(program, self._set.state)
