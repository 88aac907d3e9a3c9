"""Tensors that a model writes in place with an operator (`x += y`): every name of one reads the result.

    before  add = x + y; use(add); later(x)      # a proxy knows no `+=`: Python takes `x = x + y` for it
    after   add = x + y; use(add); later(add)

`encoder_hidden_states += positions` in a decoder changes what the model returns of its encoder, too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx import Node, Proxy


def _written(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def write(proxy: Any, other: Any) -> Any:
        known, writes = getattr(proxy, "_metadata", None), getattr(proxy.tracer, "written_in_place", None)
        if writes is None or proxy.tracer.answers is not None or not isinstance(known, torch.Tensor):
            return NotImplemented  # of two ways through a module, what one writes is nothing to the other
        result = operation(proxy, other)
        found = getattr(result, "_metadata", None)
        if isinstance(found, torch.Tensor) and found.dtype != known.dtype:
            result = result.to(known.dtype)  # it keeps its own
        if isinstance(result, Proxy):
            writes.append((proxy.node, result.node))
        return result

    return write


# Operators that write into a tensor. `patches` gives these to proxies while it traces.
IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "__iadd__": _written(operator.add), "__isub__": _written(operator.sub), "__imul__": _written(operator.mul),
    "__itruediv__": _written(operator.truediv), "__iand__": _written(operator.and_), "__ior__": _written(operator.or_),
}  # fmt: skip


def read_what_was_written(graph: torch.fx.Graph, writes: Sequence[tuple[Node, Node]]) -> None:
    """Let nodes behind a write that read the tensor by another name read what was written, in place. `writes` are
    (the tensor, what it became), in the order in which they were traced."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for tensor, became in writes:
        for user in list(tensor.users):
            if position[user] > position.get(became, len(position)):
                user.replace_input_with(tensor, became)
