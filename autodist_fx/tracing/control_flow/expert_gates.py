"""Traces the inside of routed experts, what lies between their two products, as steps that the node lists.

    before  gate, up = gate_up[..., ::2], gate_up[..., 1::2]; return (up.clamp(-7.0, 7.0) + 1) * F.silu(gate)
    after   "pairs", (("clamp", "up", -7.0, 7.0), ("add", "%0", 1), ("silu", "gate"), ("mul", "%1", "%2"))

The module's own Python runs on a proxy. Where it does anything but take gate and up apart and compute elementwise,
there is no such list.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional as F

from passes.ops.experts import GATE_OPS, Gate, Parts, is_gate

_TAKE_APART = ("chunk", "split", "getitem", "narrow")
_ALSO_CALLED = {"truediv": "div", "true_divide": "div", "multiply": "mul", "subtract": "sub", "clip": "clamp"}
# By function, as they are before anything is patched to be traced.
_FUNCTIONS = {
    getattr(home, name): name
    for home in (F, torch, operator) for name in (*GATE_OPS, *_TAKE_APART, *_ALSO_CALLED) if hasattr(home, name)
}  # fmt: skip


def traced_gate(module: nn.Module, gated: bool, inner: int) -> tuple[Parts, Gate] | None:
    """Return how gate and up lie, and the steps, of `_apply_gate` of transformers' experts, or of their `act_fn` if not
    `gated`; None where it is no list of steps. `inner`: number of elements of up."""
    graph = Graph()
    inside = Proxy(graph.placeholder("inside"), GraphAppendingTracer(graph))
    try:
        made = module._apply_gate(inside) if gated else module.act_fn(inside)
        if not isinstance(made, Proxy) or made.node.graph is not graph:
            return None
        steps = _Steps(inner * 2 if gated else inner, inner)
        last = steps.operand(made.node)
    except Exception:  # Python that looks at values; operations that are no elementwise ones of ours
        return None
    gate, parts = tuple(steps.found), steps.parts
    if parts is None or last != (f"%{len(gate) - 1}" if gate else "up") or not is_gate(gate, parts):
        return None
    return parts, gate


class _Refused(Exception):
    """A node that is no step."""


class _Steps:
    """The steps that a graph's nodes are. `found` grows as operands are asked for."""

    def __init__(self, width: int, inner: int) -> None:
        self.width, self.inner = width, inner
        self.found: dict[tuple[Any, ...], str] = {}
        self.parts: Parts | None = None
        self.known: dict[Node, Any] = {}  # node -> its operand's name, or which elements it takes of the whole

    def operand(self, node: Node) -> str:
        """Return the name by which steps call what a node makes. Raises _Refused."""
        value = self._value(node)
        return value if isinstance(value, str) else self._part(value)

    def _value(self, node: Node) -> Any:
        if node not in self.known:
            self.known[node] = self._made(node)
        return self.known[node]

    def _made(self, node: Node) -> Any:
        if node.op == "placeholder":
            return torch.arange(self.width, device="cpu").unsqueeze(0)
        name = str(node.target) if node.op == "call_method" else _FUNCTIONS.get(node.target, "")
        if name in _TAKE_APART:
            args, kwargs = map_arg((node.args, node.kwargs), self._value)
            if isinstance(args[0], str):
                raise _Refused(f"{node} takes apart what was computed")
            take: Any = node.target if callable(node.target) else getattr(torch.Tensor, name)
            return take(*args, **kwargs)
        return self._step(_ALSO_CALLED.get(name, name), node)

    def _step(self, name: str, node: Node) -> str:
        if name not in GATE_OPS:
            raise _Refused(f"{node} is no elementwise operation")
        kwargs = dict(node.kwargs)
        if kwargs.pop("inplace", False):
            raise _Refused(f"{node} writes in place")
        args, kwargs = map_arg((node.args, kwargs), self.operand)
        signature = inspect.signature(GATE_OPS[name])
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        operands, defaults = list(bound.args), [p.default for p in signature.parameters.values()]
        while operands[-1] == defaults[len(operands) - 1]:
            operands.pop()
        return self.found.setdefault((name, *operands), f"%{len(self.found)}")

    def _part(self, elements: Any) -> str:
        """Return "gate" or "up", by the elements that are taken of the whole."""
        counted = torch.arange(self.inner, device="cpu").unsqueeze(0)
        lies: dict[tuple[Parts, str], torch.Tensor] = {("one", "up"): counted}
        if self.width > self.inner:
            lies = {
                ("halves", "gate"): counted, ("halves", "up"): counted + self.inner,
                ("pairs", "gate"): 2 * counted, ("pairs", "up"): 2 * counted + 1,
            }  # fmt: skip
        found = [key for key, wanted in lies.items() if isinstance(elements, torch.Tensor) and elements.equal(wanted)]
        if not found or (self.parts or found[0][0]) != found[0][0]:
            raise _Refused("it takes neither gate nor up")
        self.parts = found[0][0]
        return found[0][1]
