"""Makes one node of a layer of routed experts, whatever the number of experts.

    before  for e in hit: rows = where(mask[e]); y.index_add_(0, rows, down[e](act(gate[e](x[rows])) * up[e](x[rows])))
    after   %y = experts(%x, %top_k_index, %top_k_weights, %gate_up_proj, %down_proj, None, None,
                         (("silu", "gate"), ("mul", "%0", "up")), "halves", False, 128)

transformers 5 marks modules whose experts it can run in several ways (`use_experts_implementation`): the mark says
which tensors they have and how these are used, and `_apply_gate` or `act_fn` what happens between the two products
(expert_gates.py). Where that is otherwise than in the node (a norm behind each expert, a gate that casts), the loop is
traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autodist_fx.tracing.control_flow.expert_gates import traced_gate
from autodist_fx.tracing.hooks import has_attached
from autodist_fx.tracing.versions.tracer_base import SymbolicProxy, SymbolicTracer
from passes.ops.experts import experts

_FLAGS = ("has_gate", "has_bias", "is_transposed")  # of transformers' mark; the node does either way
_NEVER = ("has_post_expert_norm", "_is_expert_parallel")


def experts_forward(
    tracer: SymbolicTracer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[..., SymbolicProxy] | None:
    """Return a forward that makes the node, of a layer of routed experts called with (x, experts chosen, weights).

    None for any other module or call, and for experts that the node could not run.
    """
    said = vars(module)
    flags = [said.get(name) for name in _FLAGS]
    if not all(isinstance(flag, bool) for flag in flags) or any(said.get(name) for name in _NEVER):
        return None
    gated, biased, transposed = map(bool, flags)
    names = ["gate_up_proj" if gated else "up_proj", "down_proj"]
    names += [f"{name}_bias" for name in names] if biased else []
    held = {name: module._parameters.get(name) for name in names}
    if len(list(module.parameters())) != len(names) or any(tensor is None for tensor in held.values()):
        return None
    if any(map(has_attached, module.modules())):
        return None
    sizes = _sizes(held, *flags)
    if sizes is None or not _is_call(module, args, kwargs, sizes[1]):
        return None
    count, _, inner = sizes
    traced = traced_gate(module, gated, inner)
    if traced is None:
        return None
    parts, gate = traced

    def forward(*args: Any, **kwargs: Any) -> SymbolicProxy:
        given = _in_order(module, args, kwargs)
        tensors = [getattr(module, name) for name in names] + [None, None] * (not biased)
        made: SymbolicProxy = tracer.create_proxy(
            "call_function", experts, (*given, *tensors, gate, parts, transposed, count), {}
        )
        return made

    return forward


def _sizes(
    held: dict[str, nn.Parameter | None], gated: Any, biased: Any, transposed: Any
) -> tuple[int, int, int] | None:
    """Return (experts, hidden, inner) of the tensors; None if they do not go together."""
    up, down, *biases = (tuple(tensor.shape) for tensor in held.values() if tensor is not None)
    if len(down) != 3:
        return None
    count, hidden, inner = (down[0], down[2], down[1]) if transposed else down
    width = inner * 2 if gated else inner
    wanted: list[tuple[int, ...]] = [(count, hidden, width) if transposed else (count, width, hidden), down]
    wanted += [(count, width), (count, hidden)] if biased else []
    return (int(count), int(hidden), int(inner)) if [up, down, *biases] == wanted else None


def _in_order(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return inspect.signature(type(module).forward).bind(module, *args, **kwargs).args[1:]


def _is_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: int) -> bool:
    """Return whether the arguments are x [rows, hidden], experts chosen [rows, k], and weights [rows, k]."""
    try:
        given = [getattr(a, "_metadata", None) for a in _in_order(module, args, kwargs)]
    except TypeError:
        return False
    shapes = [tuple(x.shape) for x in given if isinstance(x, torch.Tensor)]
    if len(given) != 3 or [len(shape) for shape in shapes] != [2, 2, 2]:
        return False
    return shapes[1] == shapes[2] and shapes[0][1] == hidden
