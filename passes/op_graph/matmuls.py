"""op_graph's words for products, norms, reductions and the KV cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.fx.nodes import op_name
from passes.op_graph.handlers import Builder, handles, shape_of


@handles("linear")
def _linear(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    weight = argument(node, 1, "weight")
    if not shape_of(weight):
        return None
    builder.matmul_weights.add(inputs[1].op)
    return "linear", inputs, {"transposed": False}


@handles("matmul", "bmm", "mm")
def _matmul(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    builder.matmul_weights.update(ref.op for ref in inputs)
    return "matmul", inputs, {}


@handles("embedding")
def _embedding(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    if node.target is not torch.nn.functional.embedding:
        return None  # torch.embedding takes the table first
    builder.matmul_weights.add(inputs[1].op)
    return "embedding", inputs, {}


@handles("scaled_dot_product_attention")
def _sdpa(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    dropout = argument(node, 4, "dropout_p", 0.0)
    return None if dropout else ("sdpa", inputs, {})


@handles("layer_norm", "rms_norm")
def _norm(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    return op_name(node), inputs, {"normalized": len(argument(node, 1, "normalized_shape"))}


@handles("softmax", "log_softmax", "cumsum", "flip")
def _along(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    dims = argument(node, 1, "dim", argument(node, 1, "dims"))
    if op_name(node) == "flip" and isinstance(dims, int):
        dims = node.args[1:]  # x.flip(1, 2)
    if not isinstance(dims, (int, tuple, list)):
        return None
    name = op_name(node)
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    return name, inputs, {"dims": given, "linear": name in ("cumsum", "flip")}


@handles("max", "min")
def _max(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """Of two tensors; of all of one; or along a dim, (values, indices)."""
    if len(inputs) == 2:
        return f"{op_name(node)}imum", inputs, {}
    return _reduce(builder, node, inputs)


@handles("mean", "sum", "amax", "amin", "any", "all", "var", "std", "prod", "argmax", "argmin", "norm", "logsumexp")
def _reduce(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    out = node.meta["val"]
    keepdim = len((out[0] if isinstance(out, tuple) else out).shape) == len(shape_of(node.args[0]))
    return "reduce", inputs, {"op": op_name(node), "dims": reduced_dims(node), "keepdim": keepdim}


def reduced_dims(node: Node) -> tuple[int, ...]:
    """What a reduction goes over: every dim where it names none."""
    dims = argument(node, 2 if op_name(node) == "norm" else 1, "dim")  # norm takes p first
    if isinstance(dims, int) and not isinstance(dims, bool):  # x.var(False) is about bias
        return (dims,)
    return tuple(dims) if isinstance(dims, (tuple, list)) and dims else tuple(range(len(shape_of(node.args[0]))))


@handles("update")
def _cache_update(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """Cache.update(key, value, layer, ...)."""
    if node.op != "call_method" or not isinstance(node.args[3], int):
        return None
    return "cache_update", inputs, {"layer": node.args[3]}


@handles("read")
def _cache_read(builder: Builder, node: Node, inputs: list[TensorRef]) -> Any:
    """What an update of another graph left in a layer of the cache."""
    if node.op != "call_method" or not isinstance(node.args[1], int):
        return None
    return "cache_read", [], {"layer": node.args[1]}
