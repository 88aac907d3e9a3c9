"""Runs all ranks' programs in this process on one call: what goes in, what comes out, and the cache between calls."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from autodist_fx.calls.lengths import tokens_of
from autodist_fx.calls.outputs import merged
from autodist_fx.compiler.variant import Variant
from autodist_fx.errors import AutodistError
from autodist_fx.runtime.cache.kv_cache import encoder_view
from autodist_fx.runtime.table_checks import lookups_checked
from autodist_fx.simulation.run_ranks import simulate
from autodist_fx.tracing import STATE_PREFIX
from passes.fx.randomness import seeded_nodes
from passes.ops.random import RANDOM_STATE, random_state


@dataclass
class SimulatedCache:
    """The KV caches of all ranks of a simulation (for a cache of the model's own: its tensors by name), and how many
    tokens they hold."""

    ranks: list[Any]
    variant: Variant  # what has written to it last
    structure: Hashable  # of the model then
    length: int = 0
    encoder_inputs: dict[str, Any] = field(default_factory=dict)  # what the encoder was given, where there is one

    def get_seq_length(self) -> int:
        """Return the number of tokens that it holds."""
        return self.length

    def go_on_with(self, variant: Variant) -> None:
        """Let `variant` write to it from now on. Raises AutodistError where that lays caches out otherwise."""
        if variant is not self.variant:
            self.variant.check_caches(variant)
            self.variant = variant

    def check_structure(self, structure: Hashable) -> None:
        """Raise AutodistError where it was written by the model in another structure than it has now."""
        if structure != self.structure:
            raise AutodistError(
                f"{self.variant.traced.model_class} is not as it was when it wrote this cache (its adapters, layers, "
                "mode or config): start with past_key_values=None"
            )


def step_length(inputs: Mapping[str, Any]) -> int:
    """Return the number of tokens of the step."""
    return int(tokens_of(inputs).shape[1])


def run(variant: Variant, per_rank: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the flat outputs of all ranks together. Raises OutOfTableError for an id outside the table it is for."""
    with lookups_checked(variant.traced.graph_module, per_rank[0]):
        return merged(simulate(list(variant.programs.values()), per_rank))


def run_with_states(
    variant: Variant, filled: Mapping[str, Any], states: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Run a call of a model with a cache of its own: each rank's states, by name, are read and changed."""
    everywhere = {name: value for own in reversed(states) for name, value in own.items()}
    per_rank = []
    for program, own in zip(variant.programs.values(), states, strict=True):
        mine = {name: own.get(name, everywhere.get(name)) for name in program.input_names if name in everywhere}
        per_rank.append({name: filled.get(name, mine.get(name)) for name in program.input_names})
    with lookups_checked(variant.traced.graph_module, filled):
        outputs = simulate(list(variant.programs.values()), per_rank)
    new = {name for of_rank in outputs for name in of_rank if name.startswith(STATE_PREFIX)}
    for own, of_rank in zip(states, outputs, strict=True):
        for name in new:  # a rank that does not make it any more has an old one
            own.pop(name, None)
        own.update({name: value for name, value in of_rank.items() if name in new})
    return {name: value for name, value in merged(outputs).items() if not name.startswith(STATE_PREFIX)}


def encode(variant: Variant, given: Mapping[str, Any], cache: SimulatedCache) -> dict[str, Any]:
    """Fill those layers of `cache` that hold what the encoder gives, and note what it was given; return its outputs."""
    assert variant.encoder is not None
    encoder = variant.encoder
    cache.encoder_inputs = {name: given[name] for name in encoder.traced.input_names if name in given}
    per_rank = [
        {**cache.encoder_inputs, "past_key_values": encoder_view(own, variant.programs[r], encoder.programs[r])}
        for r, own in enumerate(cache.ranks)
    ]
    found = run(encoder, per_rank)
    return {name: value for name, value in found.items() if name != "past_key_values"}


def with_positions(variant: Variant, given: Mapping[str, Any], past: int) -> dict[str, Any]:
    """Add the positions that the graph takes and the caller left to the model, as transformers' generate sets them."""
    ids = tokens_of(given)
    batch, seq = ids.shape[:2]
    filled = dict(given)
    names = variant.traced.input_names
    mask = "decoder_attention_mask" if variant.traced.has_encoder else "attention_mask"
    if mask in names and mask not in filled:
        filled[mask] = torch.ones(batch, past + seq, dtype=torch.long, device=ids.device)
    if "cache_position" in names and "cache_position" not in filled:
        filled["cache_position"] = torch.arange(past, past + seq, device=ids.device)
    if "position_ids" in names and "position_ids" not in filled:
        filled["position_ids"] = torch.arange(past, past + seq, device=ids.device).expand(batch, seq)
    return filled


def with_random_state(variant: Variant, given: Mapping[str, Any], seed: int, step: int) -> dict[str, Any]:
    """Add the input that random ops draw by, where the variant has any. Raises ValueError for numbers out of bounds."""
    if not seeded_nodes(variant.traced.graph_module):
        return dict(given)
    device = next((x.device for x in given.values() if isinstance(x, torch.Tensor)), None)
    return {**given, RANDOM_STATE: random_state(seed, step, device=device)}
