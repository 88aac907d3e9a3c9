"""Collectives per layer, counted in a plan."""

from __future__ import annotations

import re

from autodist_fx.api.compiled_model import CompiledModel

_NUMBERED = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


def collectives_per_layer(compiled: CompiledModel) -> tuple[float, float] | None:
    """(all_reduces, all_gathers) of ops that stand in numbered modules, over the number of those modules; None without
    any.

    The numbered module is the outermost one ("model.layers.3" of "model.layers.3.mlp.experts.1.up_proj"). Those
    outside, as of an embedding that is cut by its vocabulary, come once whatever the depth, and are not counted.
    """
    layers: set[str] = set()
    reduces = gathers = 0
    for op in compiled.plan.ops:
        found = _NUMBERED.match(op.module)
        if not found:
            continue
        if op.weight:
            layers.add(found.group())
        made_whole = [placement for placement, gather in zip(op.outputs, op.gather) if gather]
        reduces += sum(placement.is_partial for placement in made_whole)
        gathers += sum(placement.is_shard for placement in made_whole)
    return (reduces / len(layers), gathers / len(layers)) if layers else None
