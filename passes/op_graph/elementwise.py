"""op_graph's words for elementwise ops, functions and modules alike."""

from __future__ import annotations

ELEMENTWISE = {
    "add": "add", "iadd": "add", "add_": "add", "sub": "sub", "isub": "sub", "rsub": "sub", "mul": "mul", "imul": "mul",
    "mul_": "mul", "truediv": "div", "div": "div", "true_divide": "div", "neg": "neg", "floordiv": "floordiv",
    "mod": "mod", "pow": "pow", "maximum": "maximum", "minimum": "minimum", "where": "where",
    "masked_fill": "masked_fill", "masked_fill_": "masked_fill", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt", "ge": "ge", "and": "and", "or": "or", "xor": "xor", "logical_and": "and", "logical_or": "or",
    "bitwise_and": "and", "bitwise_or": "or", "invert": "logical_not", "logical_not": "logical_not",
    "bitwise_not": "logical_not", "not": "logical_not", "to": "to", "float": "to", "half": "to", "bfloat16": "to",
    "double": "to", "bool": "to", "long": "to", "int": "to", "type": "to", "type_as": "type_as", "clone": "clone",
    "contiguous": "identity", "detach": "identity", "lerp": "lerp", "square": "square", "clamp": "clamp",
    "clip": "clamp", "clamp_min": "clamp", "clamp_max": "clamp", "nan_to_num": "nan_to_num",
}  # fmt: skip
for _name in (
    "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "sin", "tanh", "sigmoid", "silu", "gelu", "relu", "erf",
    "softplus", "leaky_relu", "elu", "mish", "hardtanh", "floor", "round", "sign", "log1p", "expm1", "isnan", "isinf",
    "relu6", "log_sigmoid", "hardswish", "hardsigmoid", "ceil", "trunc", "dropout",
):  # fmt: skip
    ELEMENTWISE[_name] = _name
ELEMENTWISE["logsigmoid"] = "log_sigmoid"

# nn modules that are one elementwise function of their input
ELEMENTWISE_MODULES = {
    "Dropout": "dropout", "SiLU": "silu", "GELU": "gelu", "ReLU": "relu", "Tanh": "tanh", "Sigmoid": "sigmoid",
    "ReLU6": "relu6", "Softplus": "softplus", "LeakyReLU": "leaky_relu", "ELU": "elu", "Mish": "mish",
    "Hardswish": "hardswish", "Identity": "identity",
}  # fmt: skip
