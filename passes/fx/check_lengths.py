"""check_lengths: runs the graph at further sizes, and compares it with what it was before sizes became nodes and
literals.

Two numbers that agree at both examples are one to the passes before. Where guards leave few lengths to choose examples
from, that may be chance: of a sequence in chunks of 4, one more than there are chunks, and how far it is from the last
one's start, are 2 and 3 for 2 and 5 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx

from cost_model.errors import AmbiguousLengthsError
from passes.fx import node_meta
from passes.fx.run_passes import PassResult
from passes.fx.shape_propagation import NormalizeContext, ShapeInterpreter


def check_lengths(graph_module: torch.fx.GraphModule, ctx: NormalizeContext) -> PassResult:
    """Changes nothing. Raises AmbiguousLengthsError where a value has another size than before in one of
    `ctx.elsewhere`."""
    for example, before in ctx.elsewhere:
        try:
            now = ShapeInterpreter(graph_module).values(example)
        except Exception as error:  # whatever an op says of sizes that do not go together
            raise AmbiguousLengthsError(f"at {dict(example.symbols)}: {error}") from error
        for node, value in now.items():
            if node in before and _sizes(before[node]) != _sizes(value):
                raise AmbiguousLengthsError(
                    f"at {dict(example.symbols)}: {node.name} ({node_meta.where(node)}) is {_sizes(value)}, and was "
                    f"{_sizes(before[node])}"
                )
    return PassResult(graph_module, len(ctx.elsewhere))


def _sizes(value: Any) -> Any:
    """Return a tensor's shape, an integer, or a tuple of these; None for anything else."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(map(_sizes, value))
    return value if type(value) is int else None


__all__ = ["check_lengths"]
