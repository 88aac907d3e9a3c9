"""Translates norms, reductions and scans into op-graph kinds and attributes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx import node_meta
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.op_graph.handlers import Builder, Found, Handler, ModuleHandler, shape_of


def _norm(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    return op_name(node), inputs, {"normalized": len(argument(node, 1, "normalized_shape"))}


def _along(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    dims = argument(node, 1, "dim", argument(node, 1, "dims"))
    if op_name(node) == "flip" and isinstance(dims, int):
        dims = node.args[1:]  # x.flip(1, 2)
    if not isinstance(dims, (int, tuple, list)):
        return None
    name = op_name(node)
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    return name.removeprefix("safe_"), inputs, {"dims": given, "linear": name in ("cumsum", "flip")}


def _roll(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    dims = argument(node, 2, "dims")
    if isinstance(dims, int):
        dims = (dims,)
    if not isinstance(dims, (tuple, list)) or not dims:
        return None  # over all elements, as if there was one dim
    return "roll", inputs, {"dims": tuple(dims), "linear": True}


def _max(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates max and min: of two tensors; of all elements of one; or along a dim, as (values, indices)."""
    if len(inputs) == 2:
        return f"{op_name(node)}imum", inputs, {}
    return _reduce(builder, node, inputs)


def _reduce(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    out = node_meta.val(node)
    keepdim = len((out[0] if isinstance(out, tuple) else out).shape) == len(shape_of(node.args[0]))
    return "reduce", inputs, {"op": op_name(node), "dims": reduced_dims(node), "keepdim": keepdim}


def reduced_dims(node: Node) -> tuple[int, ...]:
    """Returns the dims that a reduction goes over: every dim where it names none."""
    dims = argument(node, 2 if op_name(node) == "norm" else 1, "dim")  # norm takes p first
    if isinstance(dims, int) and not isinstance(dims, bool):  # x.var(False) is about bias
        return (dims,)
    return tuple(dims) if isinstance(dims, (tuple, list)) and dims else tuple(range(len(shape_of(node.args[0]))))


def _layer_norm_module(
    builder: Builder, module: torch.nn.Module, inputs: list[TensorRef], state: Mapping[str, TensorRef]
) -> Found:
    if len(inputs) != 1 or not isinstance(module, torch.nn.LayerNorm) or "weight" not in state:
        return None
    known = [state[name] for name in ("weight", "bias") if name in state]
    return "layer_norm", [*inputs, *known], {"normalized": len(module.normalized_shape)}


HANDLERS: dict[str, Handler] = {
    "layer_norm": _norm, "rms_norm": _norm,
    "softmax": _along, "safe_softmax": _along, "log_softmax": _along, "cumsum": _along, "flip": _along,
    "roll": _roll,
    "max": _max, "min": _max,
    "mean": _reduce, "sum": _reduce, "amax": _reduce, "amin": _reduce, "any": _reduce, "all": _reduce, "var": _reduce,
    "std": _reduce, "prod": _reduce, "argmax": _reduce, "argmin": _reduce, "norm": _reduce, "logsumexp": _reduce,
}  # fmt: skip
MODULES: dict[str, ModuleHandler] = {"LayerNorm": _layer_norm_module}
KINDS = ("layer_norm", "rms_norm", "softmax", "log_softmax", "cumsum", "flip", "roll", "maximum", "minimum", "reduce")
