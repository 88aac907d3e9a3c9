"""Regions of a model's code that run without gradients (`with torch.no_grad():`), as `detach` nodes of its graph.

    with torch.no_grad():                      gate = sigmoid(lm_head(h))
        gate = sigmoid(lm_head(h))       ->    detach = gate.detach()
    logits = lm_head(h * gate)                 logits = lm_head(h * detach)

A graph has no contexts, and would lead gradients through what such a region computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Node

_CONTEXTS = (torch.no_grad, torch.inference_mode)
_depth = threading.local()


def depth() -> int:
    """Return how many regions without gradients this thread is in, of those entered while `patch_contexts` holds."""
    return getattr(_depth, "value", 0)


def patch_contexts(patch: Callable[[Any, str, Any], None]) -> None:
    """Count entries and exits of torch's contexts without gradients. `patch(owner, name, value)` is undone later."""
    _depth.value = 0
    for context in _CONTEXTS:
        patch(context, "__enter__", _counting(context.__enter__, 1))
        patch(context, "__exit__", _counting(context.__exit__, -1))


def _counting(method: Callable[..., Any], step: int) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        _depth.value = depth() + step
        return method(*args)

    return counted


class GradientRegions:
    """Knows, of a trace's nodes, which a gradient leads through; made where the trace begins, on the thread of it."""

    def __init__(self, model: nn.Module, examples: dict[str, object]) -> None:
        self._around = depth()
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._leaves = {name: any(True for _ in module.parameters()) for name, module in model.named_modules()}
        self._inputs = {n for n, x in examples.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        self._leading: set[Node] = set()

    def ends_in(self, node: Node, value: object) -> bool:
        """Note a new node, whose example is `value`; return whether gradients end in it, and would not in its graph."""
        if node.target == "detach" or not self._leads(node):
            return False
        self._leading.add(node)
        return depth() > self._around and isinstance(value, torch.Tensor) and value.is_floating_point()

    def _leads(self, node: Node) -> bool:
        if any(n in self._leading for n in node.all_input_nodes):
            return True
        if node.op == "call_module":
            return self._leaves.get(str(node.target), False)
        return node.target in (self._inputs if node.op == "placeholder" else self._parameters)
