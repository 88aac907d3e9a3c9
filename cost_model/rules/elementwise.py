"""Rules of elementwise ops: dims correspond as they broadcast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cost_model.rules.rule import OpRule, Shape, broadcast_letters, rule

_UNARY_LINEAR = ("neg", "scale", "identity", "clone")
_UNARY = (
    "to", "abs", "exp", "log", "sqrt", "rsqrt", "reciprocal", "cos", "sin", "tanh", "sigmoid", "silu", "gelu", "relu",
    "erf", "softplus", "logical_not", "clamp", "square", "pow", "leaky_relu", "elu", "mish", "hardtanh", "floor",
    "round", "dropout", "softcap", "sign", "log1p", "expm1", "isnan", "isinf", "bitwise_not", "relu6", "log_sigmoid",
    "hardswish", "hardsigmoid", "quick_gelu", "nan_to_num", "ceil", "trunc", "fill",
)  # fmt: skip
_NARY = (
    "maximum", "minimum", "where", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor",
    "floordiv", "mod", "atan2", "lerp", "addcmul", "type_as",
)  # fmt: skip


@rule(*_NARY, *_UNARY)
def elementwise(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    linear: tuple[tuple[int, ...], ...] = ()
    return OpRule(broadcast_letters(inputs, outputs[0]), linear)


@rule(*_UNARY_LINEAR)
def linear_unary(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    return OpRule(broadcast_letters(inputs, outputs[0]), ((0,),))


@rule("mul")
def mul(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    # a sum of products with the same factor is the product with the sum
    return OpRule(broadcast_letters(inputs, outputs[0]), ((0,), (1,)) if len(inputs) == 2 else ())


@rule("div")
def div(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    return OpRule(broadcast_letters(inputs, outputs[0]), ((0,),) if len(inputs) == 2 else ())


@rule("add", "sub")
def add(inputs: Sequence[Shape], outputs: Sequence[Shape], attrs: Mapping[str, Any]) -> OpRule:
    # a + b is Partial only when both are: R + P would count R once per rank
    return OpRule(broadcast_letters(inputs, outputs[0]), (tuple(range(len(inputs))),) if len(inputs) == 2 else ())
