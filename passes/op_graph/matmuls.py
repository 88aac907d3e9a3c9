"""Translates products, and the KV cache that attention reads, into op-graph kinds and attributes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.fx
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx.arguments import argument
from passes.op_graph.handlers import Builder, Found, Handler, ModuleHandler, shape_of


def _linear(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    weight = argument(node, 1, "weight")
    if not shape_of(weight):
        return None
    builder.matmul_weights.add(inputs[1].op)
    return "linear", inputs, {"transposed": False}


def _matmul(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    builder.matmul_weights.update(ref.op for ref in inputs)
    return "matmul", inputs, {}


def _embedding(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    if node.target is not torch.nn.functional.embedding or argument(node, 3, "max_norm") is not None:
        return None  # torch.embedding takes the table first; rows that are too long are written anew
    builder.matmul_weights.add(inputs[1].op)
    return "embedding", inputs, {}


def _experts(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates a layer of routed experts; which experts a rank holds is no attribute."""
    builder.matmul_weights.update(ref.op for ref in inputs[3:5])
    names = ("gate", "parts", "transposed", "experts")
    return "experts", inputs, dict(zip(names, node.args[7:11], strict=True))


def _sdpa(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    dropout = argument(node, 4, "dropout_p", 0.0)
    return None if dropout else ("sdpa", inputs, {})


def _cache_update(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates Cache.update(key, value, layer, ...)."""
    if node.op != "call_method" or not isinstance(node.args[3], int):
        return None
    return "cache_update", inputs, {"layer": node.args[3]}


def _cache_read(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    """Translates the read of what another graph's update left in a layer of the cache."""
    if node.op != "call_method" or not isinstance(node.args[1], int):
        return None
    return "cache_read", [], {"layer": node.args[1]}


def _weights(state: Mapping[str, TensorRef]) -> list[TensorRef]:
    """Returns the parameters of a layer, weight first."""
    return [state[name] for name in ("weight", "bias") if name in state]


def _linear_module(
    builder: Builder, module: torch.nn.Module, inputs: list[TensorRef], state: Mapping[str, TensorRef]
) -> Found:
    if len(inputs) != 1 or not isinstance(module, torch.nn.Linear):
        return None
    builder.matmul_weights.add(state["weight"].op)
    return "linear", [*inputs, *_weights(state)], {"transposed": False}


def _conv1d_module(
    builder: Builder, module: torch.nn.Module, inputs: list[TensorRef], state: Mapping[str, TensorRef]
) -> Found:
    """Translates transformers' Conv1D: y = x @ weight + bias, weight [i, o]."""
    weight = getattr(module, "weight", None)
    if len(inputs) != 1 or not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        return None
    builder.matmul_weights.add(state["weight"].op)
    return "linear", [*inputs, *_weights(state)], {"transposed": True}


def _embedding_module(
    builder: Builder, module: torch.nn.Module, inputs: list[TensorRef], state: Mapping[str, TensorRef]
) -> Found:
    if len(inputs) != 1 or type(module) is not torch.nn.Embedding or module.max_norm is not None:
        return None
    builder.matmul_weights.add(state["weight"].op)
    return "embedding", [*inputs, *_weights(state)], {}


HANDLERS: dict[str, Handler] = {
    "linear": _linear,
    "matmul": _matmul, "bmm": _matmul, "mm": _matmul,
    "embedding": _embedding,
    "experts": _experts,
    "scaled_dot_product_attention": _sdpa,
    "update": _cache_update,
    "read": _cache_read,
}  # fmt: skip
MODULES: dict[str, ModuleHandler] = {
    "Linear": _linear_module,
    "Conv1D": _conv1d_module,
    "Embedding": _embedding_module,
}
KINDS = ("linear", "matmul", "embedding", "experts", "sdpa", "cache_update", "cache_read")
