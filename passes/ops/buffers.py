"""Writes buffers from a graph: what a model keeps from one call to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx


def write_buffers(values: Sequence[torch.Tensor], buffers: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Writes each of `values` into the buffer at its position, of the same shape, and returns `values`.

    One op for all that a call leaves, so that whatever reads a new value comes after the writes. The graph reads the
    buffers before it, and nowhere else.
    """
    with torch.no_grad():
        for value, buffer in zip(values, buffers, strict=True):
            buffer.copy_(value)
    return tuple(values)


def written_buffers(graph_module: torch.fx.GraphModule) -> tuple[str, ...]:
    """Returns the paths of the buffers that a graph writes."""
    return tuple(
        str(buffer.target)
        for node in graph_module.graph.nodes
        if node.op == "call_function" and node.target is write_buffers
        for buffer in node.args[1]
    )


# torch.fx drops nodes without users
torch.fx.node._side_effectful_functions.add(write_buffers)
