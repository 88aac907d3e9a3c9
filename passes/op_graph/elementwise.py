"""Translates elementwise functions and modules into op-graph kinds and attributes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from cost_model.graph.op_graph import TensorRef
from passes.fx import node_meta
from passes.fx.nodes import op_name
from passes.op_graph.handlers import Builder, Found, Handler, ModuleHandler

# What torch calls it -> the kind of op.
FUNCTION_KINDS = {
    # of one tensor
    "neg": "neg", "pow": "pow", "invert": "logical_not", "logical_not": "logical_not", "bitwise_not": "logical_not",
    "not": "logical_not", "clone": "identity", "contiguous": "identity", "detach": "identity", "square": "square",
    "clamp": "clamp", "clip": "clamp", "clamp_min": "clamp", "clamp_max": "clamp", "nan_to_num": "nan_to_num",
    "to": "to", "float": "to", "half": "to", "bfloat16": "to", "double": "to", "bool": "to", "long": "to", "int": "to",
    "type": "to", "abs": "abs", "exp": "exp", "log": "log", "sqrt": "sqrt", "rsqrt": "rsqrt",
    "reciprocal": "reciprocal", "cos": "cos", "sin": "sin", "tanh": "tanh", "sigmoid": "sigmoid", "silu": "silu",
    "gelu": "gelu", "relu": "relu", "erf": "erf", "softplus": "softplus", "leaky_relu": "leaky_relu", "elu": "elu",
    "mish": "mish", "hardtanh": "hardtanh", "floor": "floor", "round": "round", "sign": "sign", "log1p": "log1p",
    "expm1": "expm1", "isnan": "isnan", "isinf": "isinf", "relu6": "relu6", "log_sigmoid": "log_sigmoid",
    "logsigmoid": "log_sigmoid", "hardswish": "hardswish", "hardsigmoid": "hardsigmoid", "ceil": "ceil",
    "trunc": "trunc",
    # of several
    "add": "add", "iadd": "add", "add_": "add", "sub": "sub", "isub": "sub", "rsub": "sub", "mul": "mul", "imul": "mul",
    "mul_": "mul", "truediv": "div", "div": "div", "true_divide": "div", "floordiv": "floordiv", "mod": "mod",
    "maximum": "maximum", "minimum": "minimum", "where": "where", "masked_fill": "masked_fill",
    "masked_fill_": "masked_fill", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "and": "and",
    "or": "or", "xor": "xor", "logical_and": "and", "logical_or": "or", "bitwise_and": "and", "bitwise_or": "or",
    "type_as": "type_as", "lerp": "lerp", "atan2": "atan2", "addcmul": "addcmul",
}  # fmt: skip
# nn modules that are one elementwise function of their input
MODULE_KINDS = {
    "SiLU": "silu", "GELU": "gelu", "ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid",
    "ReLU6": "relu6", "Softplus": "softplus", "LeakyReLU": "leaky_relu", "ELU": "elu", "Mish": "mish",
    "Hardswish": "hardswish", "Identity": "identity",
}  # fmt: skip


def _elementwise(builder: Builder, node: Node, inputs: list[TensorRef]) -> Found:
    if not isinstance(node_meta.val(node), torch.Tensor):
        return None
    kind = FUNCTION_KINDS[op_name(node)]
    rounded = node.kwargs.get("rounding_mode") is not None
    by_a_number = len(inputs) == 1 and not rounded
    if by_a_number and (kind == "mul" or (kind == "div" and _is_divided(builder, node, inputs[0]))):
        kind = "scale"  # linear in its one tensor
    elif kind == "div" and len(inputs) == 2 and rounded:
        kind = "floordiv"
    return kind, inputs, {}


def _is_divided(builder: Builder, node: Node, tensor: TensorRef) -> bool:
    """Returns whether `tensor` is what is divided, and the divisor a number or a size."""
    divided = node.args[0]
    return isinstance(divided, Node) and builder.refs.get(divided) == tensor


def _module(kind: str) -> ModuleHandler:
    def handler(
        builder: Builder, module: torch.nn.Module, inputs: list[TensorRef], state: Mapping[str, TensorRef]
    ) -> Found:
        return None if len(inputs) != 1 or state else (kind, inputs, {})

    return handler


HANDLERS: dict[str, Handler] = dict.fromkeys(FUNCTION_KINDS, _elementwise)
MODULES: dict[str, ModuleHandler] = {name: _module(kind) for name, kind in MODULE_KINDS.items()}
KINDS = tuple(dict.fromkeys((*FUNCTION_KINDS.values(), *MODULE_KINDS.values(), "scale", "floordiv")))
