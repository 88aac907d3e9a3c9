"""Makes one node of a layer of routed experts, whatever the number of experts.

    before  for e in hit: rows = where(mask[e]); y.index_add_(0, rows, down[e](act(gate[e](x[rows])) * up[e](x[rows])))
    after   %y = experts(%x, %top_k_index, %top_k_weights, %gate_up_proj, %down_proj, "silu", True, 128)

transformers 5 marks modules whose experts it can run in several ways (`use_experts_implementation`): the mark says
which tensors they have and how these are used. Where that is otherwise than in the node (biases, transposed or
interleaved weights, a gate of their own), the loop is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autodist_fx.tracing.hooks import has_attached
from autodist_fx.tracing.versions.forwards import default_gate
from autodist_fx.tracing.versions.tracer_base import SymbolicProxy, SymbolicTracer
from passes.ops.experts import ACTIVATIONS, experts

# What transformers' mark says of a module, and how the node uses its tensors.
_ALIKE = {
    "has_bias": False, "is_transposed": False, "is_concatenated": True, "has_post_expert_norm": False,
    "_is_expert_parallel": False,
}  # fmt: skip
_NUMBERS = torch.linspace(-6, 6, 97, dtype=torch.float64)  # made here: while tracing it would be a node


def experts_forward(
    tracer: SymbolicTracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., SymbolicProxy] | None:
    """Return a forward that makes the node, of a layer of routed experts called with (x, experts chosen, weights).

    None for any other module or call, and for experts that the node could not run.
    """
    said = vars(module)
    gated, down = said.get("has_gate"), module._parameters.get("down_proj")
    if not isinstance(gated, bool) or any(said.get(name, alike) != alike for name, alike in _ALIKE.items()):
        return None
    name = "gate_up_proj" if gated else "up_proj"
    up, activation = module._parameters.get(name), _activation(getattr(module, "act_fn", None))
    if up is None or down is None or activation is None or kwargs or len(module._parameters) > 2:
        return None
    if has_attached(module) or (gated and not default_gate(type(module))):
        return None
    given = [getattr(a, "_metadata", None) for a in args]
    shapes = [tuple(x.shape) for x in given if isinstance(x, torch.Tensor)]
    if len(given) != 3 or [len(shape) for shape in shapes] != [2, 2, 2] or shapes[1] != shapes[2]:
        return None
    count, hidden, inner = down.shape
    if tuple(up.shape) != (count, (1 + gated) * inner, hidden) or shapes[0][1] != hidden:
        return None

    def forward(x: SymbolicProxy, index: SymbolicProxy, weights: SymbolicProxy) -> SymbolicProxy:
        given = (x, index, weights, getattr(module, name), module.down_proj, activation, gated, int(count))
        made: SymbolicProxy = tracer.create_proxy("call_function", experts, given, {})
        return made

    return forward


def _activation(function: Any) -> str | None:
    """Return the name of an activation of ours that computes what `function` does, tried on numbers; None if none
    does."""
    if not isinstance(function, nn.Module) or has_attached(function):
        return None
    try:
        found = function.forward(_NUMBERS)
    except Exception:  # takes no such tensor
        return None
    return next((name for name, ours in ACTIVATIONS.items() if torch.equal(ours(_NUMBERS), found)), None)
