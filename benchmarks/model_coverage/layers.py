"""all_reduce per layer, counted in a plan."""

from __future__ import annotations

import re

from autodist_fx.compiled import CompiledModel

_NUMBERED = re.compile(r"^(.*?\.)?\d+(?=\.|$)")


def all_reduces_per_layer(compiled: CompiledModel) -> float | None:
    """all_reduces of ops that stand in numbered modules, over the number of those modules; None without any.

    The numbered module is the outermost one ("model.layers.3" of "model.layers.3.mlp.experts.1.up_proj"). Those
    outside, as of an embedding that is cut by its vocabulary, come once whatever the depth, and are not counted.
    """
    layers: set[str] = set()
    count = 0
    for op in compiled.plan.ops:
        found = _NUMBERED.match(op.module)
        if not found:
            continue
        if op.weight:
            layers.add(found.group())
        count += sum(1 for placement, gather in zip(op.outputs, op.gather) if gather and placement.is_partial)
    return count / len(layers) if layers else None
